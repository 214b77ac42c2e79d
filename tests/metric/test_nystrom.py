import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import DataError, RequestError
from fisher_ray.metric import Nystrom, nystrom
from fisher_ray.metric.nystrom import random_orthonormal
from tests.metric.estimating import assert_close, assert_equal, integer_rows, merged_in_any_order, random_rows, summed
from tests.reference import estimators as reference


def integer_test_matrix(dim, size, seed):
    """In place of orthonormal columns: products with rows of integers are exact."""
    return integer_rows(dim, size, seed)


def rebuilt(estimator, arrays, rank):
    eigvals, eigvecs = estimator.eigendecompose(arrays, rank)
    return ((eigvecs * eigvals) @ eigvecs.T).numpy()


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 20), max_size=5), order=st.randoms(use_true_random=False))
def test_parts_merged_in_any_order_equal_the_whole_exactly(seed, cuts, order):
    rows = integer_rows(20, 9, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nystrom, "random_orthonormal", integer_test_matrix)
        merged = merged_in_any_order(lambda: Nystrom(9, 4, 7), rows, cuts, order)
    matrix = reference.outer_products(rows.numpy())
    assert_equal(
        merged, {"sketch": matrix @ integer_test_matrix(9, 4, 7).numpy(), "trace": np.array([np.trace(matrix)])}
    )


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 20), max_size=5), order=st.randoms(use_true_random=False))
def test_parts_merged_in_any_order_are_the_sketch_of_the_matrix(seed, cuts, order):
    rows = random_rows(20, 9, seed)
    merged = merged_in_any_order(lambda: Nystrom(9, 4, seed), rows, cuts, order)
    matrix = reference.outer_products(rows.numpy())
    np.testing.assert_allclose(merged["sketch"], matrix @ random_orthonormal(9, 4, seed).numpy(), rtol=0, atol=1e-12)
    assert math.isclose(Nystrom(9, 4, seed).trace(merged), np.trace(matrix), rel_tol=1e-14)


def test_the_test_matrix_is_orthonormal_and_its_seeds_alone():
    state = torch.random.get_rng_state()
    columns = random_orthonormal(30, 10, 5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_close(columns.T @ columns, torch.eye(10, dtype=torch.float64), 1e-14)
    random_orthonormal.cache_clear()
    assert torch.equal(random_orthonormal(30, 10, 5), columns)
    assert float((random_orthonormal(30, 10, 6).T @ columns).abs().max()) < 0.9
    # Gram–Schmidt of the draws, whose signs are no solver's
    draws = torch.randn(30, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert bool(((draws * columns).sum(0) > 0).all())


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("rank", [1, 5, 99])
def test_eigenpairs_forms_and_trace_are_those_of_the_dense_approximation(size, rank):
    rows, vectors, estimator = random_rows(40, 12), random_rows(12, 5, 1), Nystrom(12, size, 3)
    arrays = summed(estimator, rows)
    matrix = reference.outer_products(rows.numpy())
    dense = reference.nystrom(matrix, random_orthonormal(12, size, 3).numpy())

    eigvals, eigvecs = estimator.eigendecompose(arrays, rank)

    keep = min(rank, size)
    assert (eigvals.shape, eigvecs.shape, eigvals.dtype, eigvecs.dtype) == ((keep,), (12, keep), *[torch.float64] * 2)
    assert_close(eigvals, np.linalg.eigvalsh(dense)[::-1][:keep].copy(), 1e-11)
    assert_close(eigvecs.T @ eigvecs, torch.eye(keep, dtype=torch.float64), 1e-13)
    assert_close(torch.from_numpy(dense) @ eigvecs, eigvecs * eigvals, 1e-11)
    assert bool((eigvecs.max(0).values == eigvecs.abs().max(0).values).all())
    assert eigvecs.is_contiguous()
    assert_close(
        estimator.quadratic_forms(arrays, vectors), np.diag(vectors.T.numpy() @ dense @ vectors.numpy()), 1e-11
    )
    assert math.isclose(estimator.trace(arrays), np.trace(matrix), rel_tol=1e-14)


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-140, 1e-3, 1.0, 1e140]), size=st.sampled_from([8, 9, 30]))
def test_at_full_size_the_eigendecomposition_is_the_dense_one(seed, scale, size):
    rows = random_rows(30, 8, seed) * torch.logspace(0, -3, 8, dtype=torch.float64) * scale
    matrix, estimator = reference.outer_products(rows.numpy()), Nystrom(8, size, seed)
    arrays = summed(estimator, rows)
    assert arrays["sketch"].shape == (8, 8)
    noise = 1e-14 * np.trace(matrix)
    np.testing.assert_allclose(rebuilt(estimator, arrays, 8), matrix, rtol=0, atol=noise)
    eigvals, _ = estimator.eigendecompose(arrays, 8)
    assert_close(eigvals, np.linalg.eigvalsh(matrix)[::-1].copy(), noise)


@given(seed=st.integers(0, 999), rank=st.integers(1, 6), size=st.integers(8, 20))
def test_a_matrix_of_no_more_directions_than_the_sketch_is_recovered(seed, rank, size):
    rows = random_rows(40, rank, seed) @ random_rows(rank, 20, seed + 1)
    matrix, estimator = reference.outer_products(rows.numpy()), Nystrom(20, size, seed)
    arrays = summed(estimator, rows)
    eigvals, _ = estimator.eigendecompose(arrays, 20)
    assert len(eigvals) == rank
    # A draw that hardly meets one of the directions costs digits: ten of sixteen are left. With fewer than two columns
    # more than the rank (Tropp et al.'s condition) it may cost all of them.
    np.testing.assert_allclose(rebuilt(estimator, arrays, 20), matrix, rtol=0, atol=1e-10 * np.trace(matrix))


@given(seed=st.integers(0, 999), size=st.integers(1, 15))
def test_the_estimate_is_never_above_the_matrix(seed, size):
    rows = random_rows(40, 15, seed) * torch.logspace(0, -4, 15, dtype=torch.float64)
    matrix, estimator = reference.outer_products(rows.numpy()), Nystrom(15, size, seed)
    missing = matrix - rebuilt(estimator, summed(estimator, rows), size)
    assert np.linalg.eigvalsh(missing)[0] >= -1e-13 * np.trace(matrix)


@pytest.mark.parametrize("spectrum", ["step", "slow decay", "fast decay"])
def test_the_error_is_within_the_published_bound_in_expectation(spectrum):
    """Theorem 4.1 of Tropp et al. (2017), real case, Schatten 1-norm.

    For ``1 ≤ r < ℓ − 1``, the estimate cut to rank ``r`` has ``E ‖M − M̂_r‖₁ ≤ (1 + r/(ℓ − r − 1)) ‖M − M_r‖₁``. It is
    stated for Gaussian and for orthonormal columns: the estimate depends on nothing but their span.

    Budget: means of ``T = 1500`` seeds. An error lies between that of ``M_r`` and the trace, so a mean is above its
    expectation by ``t = (trace − ‖M − M_r‖₁) √(ln(10⁶) / 2T)`` with a probability of at most 10⁻⁶ (Hoeffding); for 3
    matrices and 8 ranks each, a test fails by chance with 2.4 · 10⁻⁵ at most, once for all as the seeds are fixed.
    """
    dim, size, num_seeds, ranks = 40, 10, 1500, range(1, 9)
    places = np.arange(1.0, dim + 1)
    eigvals = {"step": np.where(places <= 4, 1, 0.03), "slow decay": places**-0.5, "fast decay": places**-2}[spectrum]
    rows = torch.diag(torch.from_numpy(eigvals).sqrt()) @ torch.linalg.qr(random_rows(dim, dim))[0]
    matrix = reference.outer_products(rows.numpy())
    errors = np.zeros((num_seeds, len(ranks)))
    for seed in range(num_seeds):
        estimator = Nystrom(dim, size, seed)
        values, vectors = (found.numpy() for found in estimator.eigendecompose(summed(estimator, rows), size))
        for place, rank in enumerate(ranks):
            cut = (vectors[:, :rank] * values[:rank]) @ vectors[:, :rank].T
            errors[seed, place] = np.trace(matrix - cut)  # positive semidefinite, as the test above has it
    last = reference.trace_norm(matrix - cut)
    assert math.isclose(errors[-1, -1], last, rel_tol=1e-12)

    for place, rank in enumerate(ranks):
        best = eigvals[rank:].sum()
        chance = (eigvals.sum() - best) * math.sqrt(math.log(1e6) / 2 / num_seeds)
        assert best <= errors[:, place].min() * (1 + 1e-12)
        assert errors[:, place].mean() <= (1 + rank / (size - rank - 1)) * best + chance


@pytest.mark.parametrize(("dim", "size"), [(300, 40), (300, 300), (9, 8), (9, 9)])
def test_fewer_and_repeated_rows_of_float32_have_no_more_directions_than_they_can_have(dim, size):
    rows = random_rows(3, dim, dtype=torch.float32)
    rows[:, -2:] = 0
    estimator = Nystrom(dim, size, 1)
    arrays = summed(estimator, rows, torch.zeros(5, dim), torch.zeros(0, dim), rows.repeat(30, 1))
    eigvals, eigvecs = estimator.eigendecompose(arrays, dim)
    assert len(eigvals) == 3
    assert float(eigvecs[-2:].abs().max()) < 1e-11
    expected = 31 * reference.outer_products(rows.numpy())
    np.testing.assert_allclose(rebuilt(estimator, arrays, dim), expected, rtol=0, atol=1e-11 * np.trace(expected))


@pytest.mark.parametrize(("dim", "size"), [(50, 20), (20, 20), (5, 5), (2, 2)])
def test_rounding_that_many_sums_leave_is_no_direction(dim, size):
    rows, estimator = random_rows(2, dim, dtype=torch.float32), Nystrom(dim, size, 1)
    arrays = summed(estimator, *[rows] * 5000)
    eigvals, _ = estimator.eigendecompose(arrays, dim)
    assert len(eigvals) == 2
    expected = 5000 * reference.outer_products(rows.numpy())
    np.testing.assert_allclose(rebuilt(estimator, arrays, dim), expected, rtol=0, atol=1e-11 * np.trace(expected))


@pytest.mark.parametrize("noise", [0.0, 1e-15, 1e-12, 1e-9])
@pytest.mark.parametrize("seed", range(20))
def test_noise_on_the_sketch_is_no_direction(seed, noise):
    rows, estimator = random_rows(2, 50, seed), Nystrom(50, 20, seed)
    arrays = dict(summed(estimator, rows))
    arrays["sketch"] = arrays["sketch"] + noise * random_rows(50, 20, seed + 1).numpy()
    eigvals, eigvecs = estimator.eigendecompose(arrays, 20)
    assert len(eigvals) == 2
    assert_close(eigvecs.T @ eigvecs, torch.eye(2, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_sketch_that_no_matrix_has_gives_nothing(size):
    estimator = Nystrom(5, size, 0)
    arrays = {"sketch": -random_orthonormal(5, size, 0).numpy(), "trace": np.array([1.0])}
    assert len(estimator.eigendecompose(arrays, 5)[0]) == 0


@pytest.mark.parametrize(("times", "num_above"), [(0.3, 1), (3.0, 2)])
def test_an_eigenvalue_counts_above_the_rounding_of_the_whole_matrix(times, num_above):
    rows = torch.zeros(2, 1000, dtype=torch.float64)
    rows[0, 0], rows[1, 1] = 1, math.sqrt(times * 1000 * torch.finfo(torch.float64).eps)
    estimator = Nystrom(1000, 10, 0)
    assert len(estimator.eigendecompose(summed(estimator, rows), 10)[0]) == num_above


@pytest.mark.parametrize("rows", [torch.zeros(4, 5), torch.zeros(0, 5)])
@pytest.mark.parametrize("size", [1, 5])
def test_of_zero_no_eigenvector_comes_back(rows, size):
    arrays, estimator = summed(Nystrom(5, size, 0), rows), Nystrom(5, size, 0)
    eigvals, eigvecs = estimator.eigendecompose(arrays, 3)
    assert (eigvals.shape, eigvecs.shape, estimator.trace(arrays)) == ((0,), (5, 0), 0)
    assert estimator.quadratic_forms(arrays, random_rows(5, 2)).tolist() == [0, 0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e200])
def test_rows_that_are_not_finite_are_seen_after_merging_and_refused(broken):
    rows, estimator = random_rows(20, 4), Nystrom(4, 2, 0)
    good = summed(Nystrom(4, 2, 0), rows)
    rows[7, 2] = broken
    merged = estimator.merge(good, summed(Nystrom(4, 2, 0), rows))
    assert not math.isfinite(estimator.trace(merged))
    for use in (estimator.eigendecompose, lambda arrays, _: estimator.quadratic_forms(arrays, rows[:4])):
        with pytest.raises(DataError, match="NaN or infinity"):
            use(merged, 4)


def test_what_was_returned_stays_when_rows_are_added():
    rows, estimator = random_rows(10, 5), Nystrom(5, 2, 0)
    first = summed(estimator, rows)
    before = {name: array.copy() for name, array in first.items()}
    second = summed(estimator, rows)
    assert_equal(first, before)
    np.testing.assert_allclose(second["sketch"], 2 * first["sketch"], rtol=1e-12)
    np.testing.assert_allclose(second["trace"], 2 * first["trace"], rtol=1e-12)


def test_a_size_below_one_and_rows_of_other_coordinates_are_refused():
    with pytest.raises(RequestError, match="of 0 columns was asked for: give at least 1"):
        Nystrom(4, 0, 0)
    with pytest.raises(RequestError, match="an estimator of 4 coordinates"):
        Nystrom(4, 2, 0).add(torch.zeros(3, 5))


@pytest.mark.gpu
def test_rows_on_a_gpu_are_summed_there_to_the_same():
    rows = random_rows(50, 30)
    on_gpu = summed(Nystrom(30, 8, 0), rows[:20].cuda(), rows[20:].cuda())
    np.testing.assert_allclose(on_gpu["sketch"], summed(Nystrom(30, 8, 0), rows)["sketch"], rtol=0, atol=1e-11)
