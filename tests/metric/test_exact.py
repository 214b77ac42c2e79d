import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import DataError, RequestError
from fisher_ray.metric import Exact, exact
from tests.metric.estimating import assert_close, assert_equal, integer_rows, merged_in_any_order, random_rows, summed
from tests.reference import estimators as reference

REACHES = {
    "whole": [(0, 12, 12)],
    "block": [(0, 5, 5), (5, 6, 6), (6, 12, 12)],
    "adjacent": [(0, 4, 7), (4, 7, 12), (7, 12, 12)],
    "uneven": [(0, 2, 6), (2, 5, 5), (5, 5, 5), (5, 6, 6), (6, 9, 12), (9, 12, 12)],
}
STRUCTURES = pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)


def dense(rows, reach):
    return reference.keep_structure(reference.outer_products(rows.numpy()), reach)


@pytest.fixture(params=[1, 3, 256])
def panel(request, monkeypatch):
    """Rows of a panel: one, some, and more than there are coordinates."""
    monkeypatch.setattr(exact, "PANEL", request.param)


@STRUCTURES
@pytest.mark.usefixtures("panel")
def test_the_sums_unpacked_are_the_outer_products_where_the_structure_reaches(reach):
    rows, estimator = integer_rows(20, 12), Exact(12, reach)
    matrix = estimator.dense(summed(estimator, rows[:7], rows[7:7], rows[7:]))
    np.testing.assert_array_equal(matrix.numpy(), dense(rows, reach))


@STRUCTURES
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 20), max_size=5), order=st.randoms(use_true_random=False))
def test_parts_merged_in_any_order_equal_the_whole_exactly(reach, seed, cuts, order):
    rows = integer_rows(20, 12, seed)
    merged = merged_in_any_order(lambda: Exact(12, reach), rows, cuts, order)
    assert_equal(merged, summed(Exact(12, reach), rows))


@STRUCTURES
@pytest.mark.usefixtures("panel")
def test_forms_and_trace_are_those_of_the_dense_matrix(reach):
    rows, vectors, estimator = random_rows(20, 12), random_rows(12, 5, 1), Exact(12, torch.tensor(reach))
    arrays, matrix = summed(estimator, rows), dense(rows, reach)
    forms = np.diag(vectors.T.numpy() @ matrix @ vectors.numpy())
    assert_close(estimator.quadratic_forms(arrays, vectors), forms, 1e-10)
    assert math.isclose(estimator.trace(arrays), np.trace(matrix), rel_tol=1e-14)


@STRUCTURES
@pytest.mark.usefixtures("panel")
@pytest.mark.parametrize("rank", [1, 5, 12, 99])
def test_eigenpairs_are_the_leading_ones_of_the_dense_matrix(reach, rank):
    rows, estimator = random_rows(40, 12), Exact(12, reach)
    matrix = dense(rows, reach)

    eigvals, eigvecs = estimator.eigendecompose(summed(estimator, rows), rank)

    keep = min(rank, 12)
    assert (eigvals.shape, eigvecs.shape, eigvals.dtype, eigvecs.dtype) == ((keep,), (12, keep), *[torch.float64] * 2)
    assert_close(eigvals, np.linalg.eigvalsh(matrix)[::-1][:keep].copy(), 1e-11)
    assert_close(eigvecs.T @ eigvecs, torch.eye(keep, dtype=torch.float64), 1e-13)
    assert_close(torch.from_numpy(matrix) @ eigvecs, eigvecs * eigvals, 1e-11)
    assert bool((eigvecs.max(0).values == eigvecs.abs().max(0).values).all())


def test_negative_eigenvalues_that_a_structure_makes_do_not_come_back():
    rows, estimator = torch.ones(1, 3), Exact(3, [(0, 1, 2), (1, 2, 3), (2, 3, 3)])
    eigvals, eigvecs = estimator.eigendecompose(summed(estimator, rows), 3)
    assert_close(eigvals, np.array([1 + math.sqrt(2), 1.0]), 1e-14)  # and 1 − √2
    assert eigvecs.shape == (3, 2)


def test_fewer_and_repeated_rows_of_float32_have_no_more_directions_than_they_can_have():
    rows = random_rows(9, 300, dtype=torch.float32)
    rows[:, 290:] = 0
    estimator = Exact(300)
    arrays = summed(estimator, rows, rows[:4], torch.zeros(3, 300))
    eigvals, eigvecs = estimator.eigendecompose(arrays, 300)
    assert len(eigvals) == 9
    assert float(eigvecs[290:].abs().max()) < 1e-13
    assert_close(estimator.dense(arrays), dense(torch.cat([rows, rows[:4]]), [(0, 300, 300)]), 1e-12)


@pytest.mark.parametrize("rows", [torch.zeros(4, 5), torch.zeros(0, 5)])
def test_of_zero_no_eigenvector_comes_back(rows):
    arrays = summed(Exact(5), rows)
    eigvals, eigvecs = Exact(5).eigendecompose(arrays, 3)
    assert (eigvals.shape, eigvecs.shape, Exact(5).trace(arrays)) == ((0,), (5, 0), 0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_seen_after_merging_and_refused(broken):
    rows = random_rows(20, 4)
    good = summed(Exact(4), rows)
    rows[7, 2] = broken
    merged = Exact(4).merge(summed(Exact(4), rows), good)
    assert not math.isfinite(Exact(4).trace(merged))
    with pytest.raises(DataError, match="NaN or infinity"):
        Exact(4).eigendecompose(merged, 4)


def test_what_was_returned_stays_when_rows_are_added():
    rows, estimator = integer_rows(10, 5), Exact(5)
    first = summed(estimator, rows)
    before = {name: array.copy() for name, array in first.items()}
    second = summed(estimator, rows)
    assert_equal(first, before)
    assert_equal(second, {name: 2 * array for name, array in first.items()})


@pytest.mark.parametrize("dim", [1, 255, 256, 257, 1000])
def test_little_more_than_a_triangle_is_stored(dim):
    (packed,) = Exact(dim).to_arrays().values()
    assert packed.ndim == 1
    assert dim * (dim + 1) / 2 <= packed.size <= dim * (dim + exact.PANEL) / 2


@pytest.mark.parametrize(
    "reach",
    [
        [],
        [(1, 6, 6)],
        [(0, 3, 3), (4, 6, 6)],
        [(0, 4, 4), (3, 6, 6)],
        [(0, 3, 3)],
        [(0, 6, 7)],
        [(0, 3, 2), (3, 6, 6)],
        [(0, 6, 6), (6, 5, 6), (5, 6, 6)],
    ],
)
def test_a_reach_that_does_not_tile_the_coordinates_is_refused(reach):
    with pytest.raises(RequestError, match="follow each other from 0 to 6"):
        Exact(6, reach)


@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (4,)])
def test_rows_of_other_coordinates_are_refused(shape):
    with pytest.raises(RequestError, match="an estimator of 4 coordinates"):
        Exact(4).add(torch.zeros(shape))


@pytest.mark.gpu
def test_rows_on_a_gpu_are_summed_there_to_the_same():
    rows = random_rows(50, 300)
    on_gpu = summed(Exact(300), rows[:20].cuda(), rows[20:].cuda())
    np.testing.assert_allclose(on_gpu["packed"], summed(Exact(300), rows)["packed"], rtol=1e-12, atol=1e-12)
