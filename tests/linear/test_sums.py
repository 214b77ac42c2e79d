from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import DataError, RequestError
from fisher_ray.linear import Columns, GramSum, ridge_path, standardise
from fisher_ray.linear import sums as sums_module
from tests.reference.linear import standardised


def rows(num_rows, num_columns, num_classes=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_columns, generator=generator, dtype=dtype)
    return x, torch.randint(0, num_classes, (num_rows,), generator=generator)


def summed(x, labels, num_classes=3, cuts=()):
    sums = GramSum.zeros(x.shape[1], num_classes)
    edges = [0, *cuts, len(x)]
    for start, stop in pairwise(edges):
        sums.add(x[start:stop], labels[start:stop])
    return sums


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(sums_module, "TILE", 8)
    monkeypatch.setattr(sums_module, "BLOCK_ROWS", 16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("num_columns", [1, 7, 8, 9, 29])
def test_sums_over_tiles_and_blocks_equal_the_products_of_whole_matrices(num_columns):
    x, labels = rows(45, num_columns, dtype=torch.float64)
    sums = summed(x, labels)
    onehot = torch.nn.functional.one_hot(labels, 3).double()
    np.testing.assert_allclose(np.triu(sums.gram), np.triu(x.T @ x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sums.cross, onehot.T @ x, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(sums.counts, onehot.sum(0))
    assert (sums.num_rows, sums.num_columns, sums.num_classes) == (45, num_columns, 3)


@pytest.mark.usefixtures("small_tiles")
def test_rows_that_weigh_two_are_added_twice():
    x, labels = rows(45, 9, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    weighted = GramSum.zeros(9, 3)
    weighted.add(100 + x, labels, weights)
    keep = torch.cat([torch.arange(45)[labels == 0], *2 * [torch.arange(45)[labels == 1]]])
    expected = summed(100 + x[keep], labels[keep])
    np.testing.assert_allclose(np.triu(weighted.gram), np.triu(expected.gram), rtol=1e-12)
    np.testing.assert_allclose(weighted.cross, expected.cross, rtol=1e-12)
    np.testing.assert_allclose(weighted.counts, expected.counts, rtol=1e-12)
    assert weighted.num_rows == pytest.approx(len(keep))


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0, 1000.0])
def test_the_standardised_gram_of_float32_rows_is_right_to_1e5_however_far_from_zero(offset):
    x, labels = rows(5000, 1100)
    x = torch.relu(x) * torch.logspace(-3, 3, 1100) + offset * torch.logspace(-3, 3, 1100)
    gram, mean, inverse = standardise(summed(x, labels))
    columns, true_mean, true_scale = standardised(x.numpy())
    expected = np.triu(columns.T @ columns)
    assert np.abs(np.triu(gram) - expected).max() <= 1e-5 * len(x)
    assert np.linalg.norm(np.triu(gram) - expected) <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(mean, true_mean, rtol=1e-10)
    np.testing.assert_allclose(inverse, 1 / true_scale, rtol=1e-6)


@given(st.sets(st.integers(1, 59), max_size=6), st.permutations(range(7)))
def test_cuts_and_merge_order_change_nothing_but_rounding(cuts, order):
    x, labels = rows(60, 9)
    edges = [0, *sorted(cuts), 60]
    parts = [summed(x[a:b], labels[a:b]) for a, b in pairwise(edges)]
    merged = GramSum.zeros(9, 3)
    for i in order:
        if i < len(parts):
            merged.merge(GramSum.from_arrays(parts[i].to_arrays()))
    whole = summed(x, labels)
    np.testing.assert_allclose(np.triu(merged.gram), np.triu(whole.gram), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(merged.cross, whole.cross, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(merged.counts, whole.counts)


def test_adding_arrays_element_by_element_merges_sums():
    x, labels = rows(40, 5)
    first, second = summed(x[:13], labels[:13]).to_arrays(), summed(x[13:], labels[13:]).to_arrays()
    merged = GramSum.from_arrays({name: first[name] + second[name] for name in first})
    np.testing.assert_allclose(np.triu(merged.gram), np.triu(summed(x, labels).gram), rtol=1e-5, atol=1e-4)
    assert all(array.dtype == np.float64 for array in merged.to_arrays().values())


def test_read_only_arrays_are_taken_without_a_copy_fitted_and_merged_from_but_not_added_to():
    x, labels = rows(40, 5)
    arrays = summed(x, labels).to_arrays()
    for array in arrays.values():
        array.flags.writeable = False
    sums = GramSum.from_arrays(arrays)
    assert all(np.shares_memory(arrays[name], array) for name, array in sums.to_arrays().items())
    ridge_path(sums, [0.1, 1.0])
    merged = GramSum.zeros(5, 3)
    merged.merge(sums)
    np.testing.assert_array_equal(merged.gram, sums.gram)
    with pytest.raises(RequestError, match="read-only"):
        sums.add(x, labels)
    with pytest.raises(RequestError, match="read-only"):
        sums.merge(merged)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("chosen", [slice(None), slice(3, 21), slice(-5, None), slice(1, 29, 3)])
def test_chosen_columns_are_standardised_as_if_they_were_alone(chosen):
    x, labels = rows(40, 29, dtype=torch.float64)
    index = np.arange(29)[chosen]
    scales = np.linspace(0.5, 2.0, len(index))
    gram, mean, inverse = standardise(summed(x, labels), Columns(index, scales, 29))
    alone, alone_mean, alone_inverse = standardise(summed(x[:, chosen], labels))
    np.testing.assert_allclose(np.triu(gram), np.triu(alone) * np.outer(scales, scales), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(mean, alone_mean, rtol=1e-12)
    np.testing.assert_allclose(inverse, alone_inverse * scales, rtol=1e-10)


@pytest.mark.parametrize("index", [[], [3, 2], [1, 1], [0, 29], [-1, 3]])
def test_columns_that_are_not_there_are_refused(index):
    with pytest.raises(RequestError, match=r"none, or not ascending in \[0, 29\)"):
        Columns(np.array(index, int), np.ones(len(index)), 29)


@pytest.mark.parametrize("scales", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_scales_that_are_not_positive_are_refused(scales):
    with pytest.raises(RequestError, match="2 columns need as many positive scales"):
        Columns(np.array([0, 1]), np.array(scales), 29)


def test_an_empty_call_adds_nothing():
    sums = GramSum.zeros(4, 3)
    sums.add(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert sums.num_rows == 0


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([0, 1]), r"\(B, 4\)"),
        (torch.zeros(2, 4), torch.tensor([0]), r"\(1,\)"),
        (torch.zeros(2, 4), torch.tensor([0, 3]), r"label 3 is not in \[0, 3\)"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), "label -1"),
        (torch.tensor([[0.0] * 4, [0, 0, float("nan"), 0]]), torch.tensor([0, 1]), "row 1 of these 2 is NaN"),
        (torch.tensor([[float("inf")] * 4, [0.0] * 4]), torch.tensor([0, 1]), "row 0 of these 2"),
    ],
)
def test_rows_that_do_not_fit_are_named_and_leave_the_sums_as_they_were(x, labels, message):
    sums = GramSum.zeros(4, 3)
    with pytest.raises(DataError, match=message):
        sums.add(x, labels)
    assert not any(array.any() for array in sums.to_arrays().values())


def test_arrays_of_another_shape_or_dtype_and_sums_of_other_columns_are_refused():
    with pytest.raises(DataError, match="not float64"):
        GramSum(np.zeros((4, 4)), np.zeros((3, 5)), np.zeros(3))
    with pytest.raises(DataError, match="float32"):
        GramSum(np.zeros((4, 4), np.float32), np.zeros((3, 4)), np.zeros(3))
    with pytest.raises(DataError, match="do not merge"):
        GramSum.zeros(4, 3).merge(GramSum.zeros(5, 3))


@pytest.mark.gpu
def test_rows_on_a_cuda_device_give_the_same_sums():
    x, labels = rows(3000, 1500)
    on_device = GramSum.zeros(1500, 3)
    on_device.add(x.cuda(), labels.cuda())
    np.testing.assert_allclose(on_device.gram, summed(x, labels).gram, rtol=1e-5, atol=1e-2)
