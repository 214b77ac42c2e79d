import math
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import ConfigError, DataError
from fisher_ray.metric import FisherSum, held_out_damping
from fisher_ray.metric.damping import HELD_OUT, is_held_out
from fisher_ray.models import mlp
from tests.gradients.networks import NETWORKS, make
from tests.metric.fitting import (
    compress,
    decompose,
    fisher_sums,
    kronecker_bases,
    mean_fisher,
    settings,
    sides,
    whole_bases,
)
from tests.reference import metric as reference

SMALL = [name for name in NETWORKS if name != "cnn"]  # the cnn's matrix of all parameters would take 121 GB


def random_scores(num_samples, num_classes, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, num_classes, dim, generator=generator, dtype=dtype)


def uneven_scores(num_samples, dim, seed=0):
    """Scores whose coordinates differ in size by 100."""
    return random_scores(num_samples, 3, dim, seed) * torch.logspace(0, -2, dim, dtype=torch.float64)


def new_sum(dim):
    return FisherSum(settings(dim), {"fc": dim}, seed=0)


@pytest.mark.parametrize("name", SMALL)
def test_the_sum_equals_outer_products_from_one_backward_per_sample_and_class(name):
    model, inputs = make(name, 6)
    index = torch.arange(40, 46)
    held = is_held_out(index)
    assert 0 < int(held.sum()) < 6

    scores = compress(model, inputs, whole_bases(model))
    _, arrays = fisher_sums(scores, index)

    assert {value.dtype for value in arrays.values()} == {np.dtype(np.float64)}
    assert arrays["counts"].tolist() == [int((~held).sum()), int(held.sum())]
    for actual, rows in zip(sides(arrays, scores.shape[-1]), (~held, held), strict=True):
        expected = reference.fisher(model, inputs[rows])
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-10, atol=1e-12)


@given(cuts=st.lists(st.integers(0, 23), max_size=6), order=st.randoms(use_true_random=False))
def test_merging_any_split_of_the_rows_in_any_order_equals_the_whole(cuts, order):
    scores, index = random_scores(23, 4, 9), torch.arange(100, 123)
    sums, whole = fisher_sums(scores, index)
    edges = sorted([0, *cuts, 23])
    parts = [fisher_sums(scores[a:b], index[a:b])[1] for a, b in pairwise(edges)]
    order.shuffle(parts)
    merged = reduce(sums.merge, parts)

    assert merged.keys() == whole.keys()
    for name, expected in whole.items():
        np.testing.assert_allclose(merged[name], expected, rtol=1e-12, atol=1e-12)


def test_a_sum_can_be_read_and_added_to_again():
    scores, sums = random_scores(10, 2, 5), new_sum(5)
    for rows in (slice(0, 4), slice(4, 10)):
        sums.add(scores[rows], torch.arange(10)[rows])
        arrays = sums.to_arrays()

    for name, expected in fisher_sums(scores)[1].items():
        np.testing.assert_allclose(arrays[name], expected, rtol=1e-12, atol=1e-12)


@given(start=st.integers(0, 2**40), order=st.permutations(range(12)), cut=st.integers(0, 12))
def test_the_held_out_split_depends_on_the_sample_index_alone(start, order, cut):
    index = start + torch.tensor(order)
    scores = torch.eye(12, dtype=torch.float64)[:, None]  # each sample is its own coordinate
    sums = new_sum(12)
    for rows in (slice(0, cut), slice(cut, 12)):
        sums.add(scores[index[rows] - start], index[rows])

    alone = torch.tensor([bool(is_held_out(torch.tensor([start + place]))) for place in range(12)])
    np.testing.assert_array_equal(sides(sums.to_arrays(), 12), np.stack([np.diag(~alone), np.diag(alone)]))


@given(start=st.integers(0, 2**31), stride=st.integers(1, 100))
def test_samples_with_any_short_period_are_held_out_in_proportion(start, stride):
    # 1000 steps of ‖stride · φ‖ >= 0.005 go around at least 5 times: half an arc more or less, 1/5 · 1/5 / 2
    held = is_held_out(start + stride * torch.arange(1000))
    assert abs(float(held.double().mean()) - 1 / HELD_OUT) < 0.03


def test_neighbours_are_held_out_every_3_to_8_rows():
    places = is_held_out(torch.arange(100_000)).nonzero()[:, 0]
    assert int(places[0]) == 0
    assert set(places.diff().tolist()) <= {3, 5, 8}


def test_float32_scores_of_few_samples_have_no_more_directions_than_they_can_have():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = mlp((20, 32, 16, 10)).eval(), torch.randn(24, 20)
    scores = compress(model, inputs, kronecker_bases(model, inputs, 800))
    assert scores.dtype == torch.float32
    assert scores.shape[-1] > 24 * 9

    eigvals = decompose(scores, 800, 0.0).eigvals

    assert len(eigvals) == 24 * 9  # the C scores of a sample, weighted, depend on each other
    assert float(eigvals[-1]) > 1e-6 * float(eigvals[0])


@given(seed=st.integers(0, 99), dim=st.integers(1, 12))
def test_at_full_rank_the_eigendecomposition_rebuilds_the_fisher(seed, dim):
    scores = uneven_scores(40, dim, seed)
    part = decompose(scores, dim, 0.0)
    eigvals, eigvecs = part.eigvals, part.eigvecs

    assert part.damping == 0
    assert (eigvals.dtype, eigvecs.dtype) == (torch.float64, torch.float64)
    assert bool((eigvals[:-1] >= eigvals[1:]).all())
    assert bool((eigvecs.max(0).values == eigvecs.abs().max(0).values).all())
    torch.testing.assert_close(eigvecs.T @ eigvecs, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-12)
    rebuilt, expected = (eigvecs * eigvals) @ eigvecs.T, mean_fisher(fisher_sums(scores)[1], dim)
    np.testing.assert_allclose(rebuilt.numpy(), expected, rtol=0, atol=1e-13 * float(eigvals[0]) * dim)


@pytest.mark.parametrize("rank", [1, 4, 9, 10, 99])
def test_the_rank_cut_is_the_best_low_rank_matrix(rank):
    scores = uneven_scores(50, 10)
    part = decompose(scores, rank, 0.0)

    assert part.eigvecs.shape == (10, min(rank, 10))
    assert part.eigvecs.is_contiguous()
    expected = reference.best_low_rank(mean_fisher(fisher_sums(scores)[1], 10), rank)
    np.testing.assert_allclose(((part.eigvecs * part.eigvals) @ part.eigvecs.T).numpy(), expected, rtol=0, atol=1e-12)


@given(number=st.floats(0, 100), scale=st.floats(1e-3, 1e3), rank=st.integers(1, 6))
def test_a_damping_number_is_relative_to_the_mean_of_all_eigenvalues_or_absolute(number, scale, rank):
    scores = scale * uneven_scores(20, 6)
    mean = np.linalg.eigvalsh(mean_fisher(fisher_sums(scores)[1], 6)).mean()

    relative = decompose(scores, rank, number).damping
    assert math.isclose(relative, number * mean, rel_tol=1e-12, abs_tol=1e-300)
    assert decompose(scores, rank, {"absolute": number}).damping == number


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("damping", [0.1, "auto"])
def test_sums_that_are_not_finite_are_refused(broken, damping):
    scores = uneven_scores(20, 4)
    scores[7, 2, 3] = broken
    with pytest.raises(DataError, match="NaN or infinity"):
        decompose(scores, 4, damping)


def test_sums_of_zero_or_of_nothing_are_refused():
    with pytest.raises(DataError, match="no direction"):
        decompose(torch.zeros(9, 2, 4), 4, 0.1)
    sums = new_sum(4)
    with pytest.raises(DataError, match="no rows"):
        sums.decompose(sums.to_arrays())


def test_an_automatic_damping_needs_rows_on_both_sides():
    scores = random_scores(1, 3, 4)
    decompose(scores, 4, 0.1)
    with pytest.raises(DataError, match="more rows or a number"):
        decompose(scores, 4, "auto")


@pytest.mark.parametrize(("rank", "damping"), [(0, 0.1), (4, -0.1), (4, math.nan), (4, math.inf), (4, "much")])
def test_a_rank_or_damping_out_of_range_is_refused(rank, damping):
    with pytest.raises(ConfigError, match=r"rank|damping"):
        decompose(uneven_scores(20, 4), rank, damping)


@given(seed=st.integers(0, 999), num_samples=st.integers(20, 60), rank=st.integers(1, 8))
def test_the_automatic_damping_minimises_the_dense_divergence(seed, num_samples, rank):
    scores = uneven_scores(num_samples, 8, seed)
    _, arrays = fisher_sums(scores)
    fitted, held = (total / count for total, count in zip(sides(arrays, 8), arrays["counts"], strict=True))
    mean = float(np.trace(mean_fisher(arrays, 8))) / 8
    damping = decompose(scores, rank, "auto").damping

    grid = mean * np.logspace(-6, 2, 241)
    losses = [reference.held_out_loss(fitted, held, rank, point) for point in grid]
    # the loss may be flat to rounding between points: compare its value, and that the value is of this grid
    assert reference.held_out_loss(fitted, held, rank, damping) <= min(losses) + 1e-12 * abs(min(losses))
    assert np.isclose(grid, damping, rtol=1e-12).any()


def test_the_damping_is_near_the_minimum_on_a_much_finer_grid():
    # few rows in many coordinates: the fitted spectrum is too wide, so the minimum lies inside the grid
    _, arrays = fisher_sums(uneven_scores(60, 30))
    fitted, held = (total / count for total, count in zip(sides(arrays, 30), arrays["counts"], strict=True))
    eigvals, eigvecs = np.linalg.eigh(fitted)
    variances = torch.tensor(np.diag(eigvecs.T @ held @ eigvecs).copy())
    mean = float(eigvals.mean())
    damping = held_out_damping(torch.tensor(eigvals), variances, mean)

    fine = mean * np.logspace(-6, 2, 4001)
    best = fine[np.argmin([reference.held_out_loss(fitted, held, 30, point) for point in fine])]
    assert 1e-5 * mean < damping < 10 * mean
    assert abs(math.log10(damping / best)) <= 1 / 30  # one step of 241 points on 8 decades


@pytest.mark.gpu
def test_scores_on_a_gpu_are_summed_there_to_the_same():
    scores = random_scores(20, 3, 300)
    _, arrays = fisher_sums(scores.cuda())
    for name, expected in fisher_sums(scores)[1].items():
        np.testing.assert_allclose(arrays[name], expected, rtol=1e-12, atol=1e-12)
