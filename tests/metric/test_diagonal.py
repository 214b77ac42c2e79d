import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import DataError, RequestError
from fisher_ray.metric import Diagonal
from tests.metric.estimating import assert_close, assert_equal, integer_rows, merged_in_any_order, random_rows, summed
from tests.reference import estimators as reference


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 20), max_size=5), order=st.randoms(use_true_random=False))
def test_parts_merged_in_any_order_equal_the_whole_exactly(seed, cuts, order):
    rows = integer_rows(20, 7, seed)
    expected = {"diagonal": np.diag(reference.outer_products(rows.numpy()))}
    assert_equal(summed(Diagonal(7), rows[:3], rows[3:3], rows[3:]), expected)
    assert_equal(merged_in_any_order(lambda: Diagonal(7), rows, cuts, order), expected)


@given(seed=st.integers(0, 99), rank=st.integers(1, 9))
def test_eigenpairs_forms_and_trace_are_those_of_the_dense_diagonal(seed, rank):
    rows, vectors, estimator = random_rows(30, 6, seed), random_rows(6, 4, seed + 1), Diagonal(6)
    arrays = summed(estimator, rows)
    dense = np.diag(np.diag(reference.outer_products(rows.numpy())))

    eigvals, eigvecs = estimator.eigendecompose(arrays, rank)

    keep = min(rank, 6)
    assert (eigvals.shape, eigvecs.shape, eigvals.dtype, eigvecs.dtype) == ((keep,), (6, keep), *[torch.float64] * 2)
    assert_close(eigvals, np.sort(np.diag(dense))[::-1][:keep].copy(), 1e-12)
    assert_close(torch.from_numpy(dense) @ eigvecs, eigvecs * eigvals, 1e-12)
    assert torch.equal(eigvecs.sum(0), torch.ones(keep, dtype=torch.float64))
    assert_close(
        estimator.quadratic_forms(arrays, vectors), np.diag(vectors.T.numpy() @ dense @ vectors.numpy()), 1e-11
    )
    assert math.isclose(estimator.trace(arrays), np.trace(dense), rel_tol=1e-14)


def test_equal_entries_come_in_the_order_of_their_coordinates():
    rows = torch.tensor([[1.0, -2.0, 1.0, 0.0, 2.0, 1e-9]])
    eigvals, eigvecs = Diagonal(6).eigendecompose(summed(Diagonal(6), rows), 6)
    assert eigvals.tolist() == [4, 4, 1, 1, float(rows[0, 5].double()) ** 2]  # small is not rounding
    assert eigvecs.argmax(0).tolist() == [1, 4, 0, 2, 5]

    _, eigvecs = Diagonal(3000).eigendecompose(summed(Diagonal(3000), torch.ones(1, 3000)), 3000)
    assert torch.equal(eigvecs, torch.eye(3000, dtype=torch.float64))


def test_rows_of_float32_are_squared_in_float64_and_what_was_returned_stays():
    rows, estimator = random_rows(10, 5, dtype=torch.float32), Diagonal(5)
    first = summed(estimator, rows)["diagonal"]
    second = summed(estimator, rows)["diagonal"]
    np.testing.assert_allclose(first, rows.double().square().sum(0), rtol=1e-14, atol=0)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rows", [torch.zeros(4, 5), torch.zeros(0, 5)])
def test_of_zero_no_eigenvector_comes_back(rows):
    arrays = summed(Diagonal(5), rows)
    eigvals, eigvecs = Diagonal(5).eigendecompose(arrays, 3)
    assert (eigvals.shape, eigvecs.shape, Diagonal(5).trace(arrays)) == ((0,), (5, 0), 0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_seen_after_merging_and_refused(broken):
    rows = random_rows(20, 4)
    good = summed(Diagonal(4), rows)
    rows[7, 2] = broken
    merged = Diagonal(4).merge(good, summed(Diagonal(4), rows))
    assert not math.isfinite(Diagonal(4).trace(merged))
    with pytest.raises(DataError, match="NaN or infinity"):
        Diagonal(4).eigendecompose(merged, 4)


@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (4,)])
def test_rows_of_other_coordinates_are_refused(shape):
    with pytest.raises(RequestError, match="an estimator of 4 coordinates"):
        Diagonal(4).add(torch.zeros(shape))


@pytest.mark.gpu
def test_rows_on_a_gpu_are_summed_there_to_the_same():
    rows = random_rows(50, 30)
    np.testing.assert_allclose(
        summed(Diagonal(30), rows.cuda())["diagonal"], summed(Diagonal(30), rows)["diagonal"], rtol=1e-12
    )
