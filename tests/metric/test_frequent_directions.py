import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import DataError, RequestError
from fisher_ray.metric import FrequentDirections
from tests.metric.estimating import (
    assert_close,
    assert_equal,
    integer_rows,
    merged_in_any_order,
    random_rows,
    read_only,
    summed,
)
from tests.reference import estimators as reference

ROUNDING = 1e-12
"""Of the trace: what inequalities may be missed by."""


def spectrum(kind, dim, order):
    """Scales of the coordinates before they are rotated."""
    scales = {
        "flat": torch.ones(dim),
        "polynomial": torch.arange(1, dim + 1) ** -1.0,
        "exponential": torch.logspace(0, -6, dim),
        "low-rank": (torch.arange(dim) < order.randint(1, dim)).float(),
        "spiked": torch.where(torch.arange(dim) < 2, 30.0, 1.0),
    }
    return scales[kind]


def random_case(seed):
    """Rows of some spectrum and arrangement, and a size."""
    order = Random(seed)
    dim, num_rows, size = order.randint(1, 20), order.randint(1, 60), order.randint(1, 12)
    kind = order.choice(["flat", "polynomial", "exponential", "low-rank", "spiked"])
    rotation = torch.linalg.qr(random_rows(dim, dim, seed))[0]
    rows = (random_rows(num_rows, dim, seed + 1) * spectrum(kind, dim, order)) @ rotation
    match order.choice(["as they are", "duplicates", "zeros", "coordinates", "sorted"]):
        case "duplicates":
            rows = rows[[order.randrange(num_rows) for _ in range(num_rows)]]
        case "zeros":
            rows[[order.randrange(num_rows) for _ in range(num_rows)]] = 0
        case "coordinates":  # one at a time: what is dropped first may come back later
            rows = torch.eye(dim, dtype=torch.float64)[[order.randrange(dim) for _ in range(num_rows)]]
        case "sorted":
            rows = rows[rows.norm(dim=1).argsort()]
    return rows * 10.0 ** order.randint(-6, 6), size, order


def sketched(arrays):
    return arrays["sketch"].T @ arrays["sketch"]


def assert_within_bounds(arrays, rows, size):
    matrix = reference.outer_products(rows.numpy())
    slack = ROUNDING * np.trace(matrix)
    missing = np.linalg.eigvalsh(matrix - sketched(arrays))
    bound = FrequentDirections(len(matrix), size).error_bound(arrays)
    tails = reference.tails(matrix)
    assert missing[0] >= -slack
    assert missing[-1] <= bound + slack
    for k in range(min(size, len(matrix)) + 1):
        assert bound <= tails[k] / (size + 1 - k) + slack
        assert k == size or missing[-1] <= tails[k] / (size - k) + slack


def test_the_bounds_hold_in_a_thousand_cases_whatever_the_parts_and_the_order_of_merging():
    for seed in range(1000):
        rows, size, order = random_case(seed)
        dim = rows.shape[1]
        cuts = [order.randint(0, len(rows)) for _ in range(order.choice([0, 0, 1, 3, 8]))]

        arrays = merged_in_any_order(lambda dim=dim, size=size: FrequentDirections(dim, size), rows, cuts, order)

        assert arrays["sketch"].shape == (min(size, dim), dim)
        assert math.isclose(arrays["trace"][0], float(rows.square().sum()), rel_tol=1e-12)
        assert_within_bounds(arrays, rows, size)


def test_rows_read_between_and_added_one_by_one_are_under_the_same_bounds():
    rows, estimator = random_rows(50, 8) * torch.logspace(0, -2, 8), FrequentDirections(8, 3)
    for end, row in enumerate(rows, start=1):
        estimator.add(row[None])
        if end % 7 == 0:
            assert_within_bounds(estimator.to_arrays(), rows[:end], 3)
    assert_within_bounds(estimator.to_arrays(), rows, 3)
    unread = summed(FrequentDirections(8, 3), *rows[:, None])
    np.testing.assert_array_equal(estimator.to_arrays()["sketch"], unread["sketch"])  # reading changes nothing


def test_the_smallest_singular_value_is_taken_from_all():
    # σ² = 9, 4, 1 of coordinates, two rows to keep: 9 − 1, 4 − 1
    rows = torch.diag(torch.tensor([2.0, 3.0, 1.0]))
    arrays = summed(FrequentDirections(3, 2), rows)
    np.testing.assert_allclose(sketched(arrays), np.diag([3.0, 8.0, 0.0]), rtol=0, atol=1e-14)
    assert (arrays["trace"].tolist(), arrays["shrinkage"].shape) == ([14.0], (1,))
    assert math.isclose(FrequentDirections(3, 2).error_bound(arrays), 1, rel_tol=1e-14)

    both = FrequentDirections(3, 2).merge(arrays, arrays)  # of rank 2
    np.testing.assert_allclose(sketched(both), np.diag([6.0, 16.0, 0.0]), rtol=0, atol=1e-13)
    assert math.isclose(FrequentDirections(3, 2).error_bound(both), 2, rel_tol=1e-14)


@given(
    seed=st.integers(0, 99),
    rank=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_rows_of_no_more_directions_than_the_sketch_has_rows_lose_nothing(seed, rank, cuts, order):
    rows = random_rows(40, rank, seed) @ random_rows(rank, 11, seed + 1)
    arrays = merged_in_any_order(lambda: FrequentDirections(11, 5), rows, cuts, order)
    np.testing.assert_allclose(sketched(arrays), reference.outer_products(rows.numpy()), rtol=0, atol=1e-10)
    assert FrequentDirections(11, 5).error_bound(arrays) == 0


@pytest.mark.parametrize("size", [6, 7, 100])
def test_a_sketch_of_as_many_rows_as_coordinates_is_exact(size):
    rows, order = random_rows(500, 6) * torch.logspace(0, -4, 6), Random(0)
    arrays = merged_in_any_order(lambda: FrequentDirections(6, size), rows, [100, 107, 300], order)
    assert arrays["sketch"].shape == (6, 6)
    np.testing.assert_allclose(sketched(arrays), reference.outer_products(rows.numpy()), rtol=0, atol=1e-11)
    assert FrequentDirections(6, size).error_bound(arrays) == 0


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 5), max_size=5), order=st.randoms(use_true_random=False))
def test_as_few_rows_as_the_sketch_has_are_the_sketch(seed, cuts, order):
    rows = integer_rows(5, 9, seed)
    arrays = merged_in_any_order(lambda: FrequentDirections(9, 5), rows, cuts, order)
    np.testing.assert_array_equal(sketched(arrays), reference.outer_products(rows.numpy()))


@given(seed=st.integers(0, 999))
def test_which_of_two_is_merged_into_the_other_makes_no_difference(seed):
    rows, estimator = random_rows(60, 9, seed), FrequentDirections(9, 4)
    left, right = (summed(FrequentDirections(9, 4), part) for part in (rows[:17], rows[17:]))
    one, other = estimator.merge(left, right), estimator.merge(right, left)
    np.testing.assert_allclose(sketched(one), sketched(other), rtol=0, atol=1e-10)
    for name in ("trace", "shrinkage"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_rows", [2, 40])
@pytest.mark.parametrize("rank", [1, 3, 99])
def test_eigenpairs_forms_and_trace_are_those_of_the_sketch(num_rows, rank):
    rows, vectors, estimator = random_rows(num_rows, 12), random_rows(12, 5, 1), FrequentDirections(12, 4)
    arrays = summed(estimator, rows)
    matrix = sketched(arrays)

    eigvals, eigvecs = estimator.eigendecompose(arrays, rank)

    keep = min(rank, num_rows, 4)
    assert (eigvals.shape, eigvecs.shape, eigvals.dtype, eigvecs.dtype) == ((keep,), (12, keep), *[torch.float64] * 2)
    assert_close(eigvals, np.linalg.eigvalsh(matrix)[::-1][:keep].copy(), 1e-11)
    assert_close(eigvecs.T @ eigvecs, torch.eye(keep, dtype=torch.float64), 1e-13)
    assert_close(torch.from_numpy(matrix) @ eigvecs, eigvecs * eigvals, 1e-11)
    assert bool((eigvecs.max(0).values == eigvecs.abs().max(0).values).all())
    assert_close(
        estimator.quadratic_forms(arrays, vectors), np.diag(vectors.T.numpy() @ matrix @ vectors.numpy()), 1e-11
    )
    assert math.isclose(estimator.trace(arrays), float(rows.square().sum()), rel_tol=1e-14)


@pytest.mark.parametrize("dim", [9, 300])
def test_fewer_and_repeated_rows_of_float32_have_no_more_directions_than_they_can_have(dim):
    rows = random_rows(3, dim, dtype=torch.float32)
    rows[:, -2:] = 0
    estimator = FrequentDirections(dim, 8)
    arrays = summed(estimator, rows, torch.zeros(30, dim), rows.repeat(20, 1))
    eigvals, eigvecs = estimator.eigendecompose(arrays, dim)
    assert len(eigvals) == 3
    assert float(eigvecs[-2:].abs().max()) < 1e-13
    expected = 21 * reference.outer_products(rows.numpy())
    np.testing.assert_allclose(sketched(arrays), expected, rtol=0, atol=1e-13 * np.trace(expected))


@pytest.mark.parametrize("rows", [torch.zeros(4, 5), torch.zeros(90, 5), torch.zeros(0, 5)])
def test_of_zero_no_eigenvector_comes_back(rows):
    estimator = FrequentDirections(5, 2)
    arrays = estimator.merge(summed(FrequentDirections(5, 2), rows), summed(FrequentDirections(5, 2), rows))
    eigvals, eigvecs = estimator.eigendecompose(arrays, 3)
    assert (eigvals.shape, eigvecs.shape) == ((0,), (5, 0))
    assert (estimator.trace(arrays), estimator.error_bound(arrays)) == (0, 0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("num_rows", [1, 3, 50])
def test_rows_that_are_not_finite_are_seen_after_merging_and_refused(broken, num_rows):
    rows, estimator = random_rows(num_rows, 4), FrequentDirections(4, 3)
    good = summed(FrequentDirections(4, 3), rows)
    rows[num_rows // 2, 2] = broken
    merged = estimator.merge(good, summed(FrequentDirections(4, 3), rows))
    assert not math.isfinite(estimator.trace(merged))
    assert merged["sketch"].shape == (3, 4)
    with pytest.raises(DataError, match="NaN or infinity"):
        estimator.eigendecompose(read_only(merged), 4)


def test_what_was_returned_stays_when_rows_are_added():
    rows, estimator = integer_rows(3, 5), FrequentDirections(5, 4)
    first = summed(estimator, rows)
    before = {name: array.copy() for name, array in first.items()}
    second = summed(estimator, integer_rows(1, 5, 1))
    assert_equal(first, before)
    assert_equal({"sketch": second["sketch"][:3]}, {"sketch": first["sketch"][:3]})


def test_a_size_below_one_and_rows_of_other_coordinates_are_refused():
    with pytest.raises(RequestError, match="of 0 rows were asked for: give at least 1"):
        FrequentDirections(4, 0)
    with pytest.raises(RequestError, match="an estimator of 4 coordinates"):
        FrequentDirections(4, 2).add(torch.zeros(3, 5))


@pytest.mark.gpu
def test_rows_on_a_gpu_are_under_the_same_bounds():
    rows = random_rows(200, 30)
    assert_within_bounds(summed(FrequentDirections(30, 7), rows[:90].cuda(), rows[90:].cuda()), rows, 7)
