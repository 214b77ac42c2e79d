import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import DataError, ModelError, RequestError
from fisher_ray.metric import ClassGapSum, class_gaps
from tests.reference import normalisation as reference

DIM, CLASSES = 4, 3
WHOLE = st.lists(
    st.tuples(st.lists(st.integers(-9, 9), min_size=DIM, max_size=DIM), st.integers(0, CLASSES - 1)), max_size=12
)


def summed(rows, labels, num_classes=CLASSES):
    sums = ClassGapSum(rows.shape[1], num_classes)
    sums.add(rows, labels)
    return sums.to_arrays()


def sums_of(pairs, dtype=torch.float32):
    rows = torch.tensor([row for row, _ in pairs], dtype=dtype).reshape(len(pairs), DIM)
    return summed(rows, torch.tensor([label for _, label in pairs], dtype=torch.long))


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype == np.float64
        np.testing.assert_array_equal(actual[name], value)


def random_rows(num_rows, dim=DIM, seed=0, dtype=torch.float64):
    """Rows and labels; the coordinates' means differ by class more and more, and are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (num_rows,), generator=generator)
    rows = torch.randn(num_rows, dim, generator=generator, dtype=dtype)
    return rows + labels[:, None] * torch.linspace(0, 2, dim, dtype=dtype) + 3, labels


@given(pairs=WHOLE)
def test_the_sums_equal_a_loop_over_the_rows(pairs):
    arrays = sums_of(pairs)
    for label in range(CLASSES):
        mine = [row for row, other in pairs if other == label]
        assert arrays["counts"][label] == len(mine)
        assert arrays["sums"][label].tolist() == [sum(row[j] for row in mine) for j in range(DIM)]
    assert arrays["squares"].tolist() == [sum(row[j] ** 2 for row, _ in pairs) for j in range(DIM)]


@given(parts=st.lists(WHOLE, min_size=1, max_size=5), order=st.randoms(use_true_random=False))
def test_merging_whole_numbers_in_any_parts_and_order_is_exact(parts, order):
    arrays = [sums_of(part) for part in parts]
    order.shuffle(arrays)
    assert_equal(reduce(ClassGapSum.merge, arrays), sums_of([pair for part in parts for pair in part]))


@given(a=WHOLE, b=WHOLE, c=WHOLE)
def test_merging_read_only_sums_is_associative_and_commutative(a, b, c):
    a, b, c = (sums_of(pairs) for pairs in (a, b, c))
    for value in (*a.values(), *b.values(), *c.values()):
        value.flags.writeable = False
    merge = ClassGapSum.merge
    assert_equal(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_equal(merge(a, b), merge(b, a))
    assert_equal(merge(a, sums_of([])), a)


def test_sums_can_be_read_and_added_to_again():
    rows, labels = random_rows(10)
    sums = ClassGapSum(DIM, CLASSES)
    sums.add(rows[:4].round(), labels[:4])
    first = sums.to_arrays()
    sums.add(rows[4:].round(), labels[4:])
    assert_equal(sums.to_arrays(), summed(rows.round(), labels))
    assert_equal(first, summed(rows[:4].round(), labels[:4]))


@given(seed=st.integers(0, 999), num_rows=st.integers(12, 40))
def test_gaps_equal_the_mean_over_all_pairs(seed, num_rows):
    rows, labels = random_rows(num_rows, seed=seed)
    expected = [reference.gap(column, labels.tolist()) for column in rows.T.tolist()]
    gaps = class_gaps(summed(rows, labels))
    assert gaps.dtype == torch.float64
    torch.testing.assert_close(gaps, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@given(pairs=WHOLE)
def test_gaps_of_any_class_sizes_equal_the_mean_over_all_pairs_or_are_refused(pairs):
    labels = [label for _, label in pairs]
    sizes = [labels.count(label) for label in set(labels)]
    if all(size < 2 for size in sizes):
        with pytest.raises(DataError, match=rf"no two of {len(pairs)} rows are of one class: .* give more rows"):
            class_gaps(sums_of(pairs))
    elif len(sizes) == 1:
        with pytest.raises(DataError, match=rf"all {len(pairs)} rows are of one class: .* give rows of other classes"):
            class_gaps(sums_of(pairs))
    else:
        expected = [reference.gap([row[j] for row, _ in pairs], labels) for j in range(DIM)]
        actual = class_gaps(sums_of(pairs))
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_class_of_one_row_counts_in_the_pairs_of_two_classes_alone():
    rows = torch.tensor([[2.0], [3.0], [5.0]])
    assert class_gaps(summed(rows, torch.tensor([0, 0, 1]))).tolist() == [2 * 3 - (2 * 5 + 3 * 5) / 2]


@pytest.mark.parametrize("constant", [0.1, -0.7, 1e-8, 123.4])
def test_a_coordinate_that_is_the_same_in_all_rows_has_no_gap(constant):
    for seed in range(30):
        rows, labels = random_rows(10 + seed, seed=seed)
        rows[:, 1] = constant
        gaps = class_gaps(summed(rows, labels))
        assert float(gaps[1]) == 0
        assert bool((gaps[[0, 2, 3]] != 0).all())


def test_a_gap_far_smaller_than_the_coordinate_is_found():
    labels = torch.arange(1000) % 2
    rows = 1 + 1e-5 * (2 * labels.double()[:, None] - 1)  # products of 1 + 1e-10 and 1 - 1e-10
    assert math.isclose(float(class_gaps(summed(rows, labels))[0]), 2e-10, rel_tol=1e-4)


def test_float32_rows_are_summed_in_float64():
    rows = torch.tensor([[1.0], [2.0**-40], [1 + 2.0**-20]])
    arrays = summed(rows, torch.tensor([0, 0, 1]))
    assert arrays["sums"][:, 0].tolist() == [1 + 2.0**-40, 1 + 2.0**-20, 0]
    assert arrays["squares"].tolist() == [1 + 2.0**-80 + 1 + 2.0**-19 + 2.0**-40]


@given(pairs=WHOLE)
def test_rows_given_by_their_kept_entries_have_the_sums_of_rows_filled_with_zeros(pairs):
    rows = torch.tensor([row for row, _ in pairs], dtype=torch.float32).reshape(len(pairs), DIM)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.long)
    coordinates = torch.tensor([3, 0], dtype=torch.int32).expand(len(pairs), 2)
    sums = ClassGapSum(DIM, CLASSES)
    sums.add_sparse(rows[:, [3, 0]], coordinates, labels)
    rows[:, 1:3] = 0
    assert_equal(sums.to_arrays(), summed(rows, labels))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_their_coordinates(broken):
    rows, labels = random_rows(12)
    rows[3, 2] = broken
    merged = ClassGapSum.merge(summed(rows, labels), summed(*random_rows(12, seed=1)))
    with pytest.raises(DataError, match=r"the sum of 1 of 4 coordinates is NaN or infinite \(2\)"):
        class_gaps(merged)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_out_of_range_is_refused_and_leaves_the_sums_as_they_were(label):
    sums, labels = ClassGapSum(DIM, CLASSES), torch.tensor([0, label])
    with pytest.raises(DataError, match=rf"label {label} is not in \[0, 3\)"):
        sums.add(torch.ones(2, DIM), labels)
    with pytest.raises(DataError, match=rf"label {label} is not in \[0, 3\)"):
        sums.add_sparse(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), labels)
    assert_equal(sums.to_arrays(), ClassGapSum(DIM, CLASSES).to_arrays())


def test_rows_of_another_shape_are_refused():
    sums, labels = ClassGapSum(DIM, CLASSES), torch.tensor([0, 1])
    with pytest.raises(ModelError, match="do not have 4 coordinates"):
        sums.add(torch.ones(2, DIM + 1), labels)
    with pytest.raises(ModelError, match=r"coordinate 4 is not in \[0, 4\)"):
        sums.add_sparse(torch.ones(2, 1), torch.full((2, 1), DIM), labels)
    for rows in (torch.ones(3, DIM), torch.ones(2, 1, DIM), torch.ones(DIM)):
        with pytest.raises(RequestError, match=r"are not \(K, ...\) and \(K,\)"):
            sums.add(rows, labels)


@pytest.mark.gpu
def test_rows_on_a_gpu_are_summed_there_to_the_same():
    rows, labels = random_rows(20)
    sums = ClassGapSum(DIM, CLASSES)
    sums.add(rows[:10].round().cuda(), labels[:10])
    coordinates = torch.arange(DIM).expand(10, DIM)
    sums.add_sparse(rows[10:].round().cuda(), coordinates.cuda(), labels[10:].cuda())
    assert_equal(sums.to_arrays(), summed(rows.round(), labels))
