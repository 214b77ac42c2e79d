"""Fisher sums of every estimator and structure, against matrices formed densely."""

import itertools
import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fisher_ray.errors import DataError, ModelError, RequestError
from fisher_ray.metric import FisherSum, LowRankMetric
from fisher_ray.metric.adjacent import Adjacent, taper
from fisher_ray.metric.damping import is_held_out
from fisher_ray.records import LayerSketch
from tests.metric.fitting import settings

DIMS = {"first": 3, "second": 5, "third": 2, "fourth": 4}
DIM = sum(DIMS.values())
WAYS = [
    ("exact", "global"),
    ("exact", "block"),
    ("exact", "adjacent"),
    ("nystrom", "global"),
    ("nystrom", "block"),
    ("frequent_directions", "global"),
    ("frequent_directions", "block"),
    ("diagonal", "global"),
]


def scores(num_samples=40, num_scores=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    return torch.randn(num_samples, num_scores, DIM, generator=generator, dtype=torch.float64) @ mixed


def layer_of():
    return np.repeat(np.arange(len(DIMS)), list(DIMS.values()))


def dense(rows, structure="global", estimator="exact"):
    """``Σ_x Σ_c s sᵀ / N`` with what the structure leaves out set to zero, entry by entry."""
    fisher, layers = np.zeros((DIM, DIM)), layer_of()
    for row in rows.flatten(0, 1).numpy():
        fisher += np.outer(row, row) / len(rows)
    for i, j in itertools.product(range(DIM), range(DIM)):
        apart = abs(layers[i] - layers[j])
        if estimator == "diagonal":
            fisher[i, j] *= i == j
        elif structure == "block":
            fisher[i, j] *= apart == 0
        elif structure == "adjacent":
            fisher[i, j] *= {0: 1.0, 1: 1 / (2 * math.cos(math.pi / 5))}.get(apart, 0.0)
    return fisher


def metric_of(rows, index=None, **asked):
    sums = FisherSum(settings(**{"rank": DIM, "damping": 0.1, **asked}), DIMS, seed=7)
    sums.add(rows, torch.arange(len(rows)) if index is None else index)
    bases = {name: LayerSketch(name, (1, dim), dim, None) for name, dim in DIMS.items()}
    return LowRankMetric(bases, *sums.decompose(sums.to_arrays()), {})


@pytest.mark.parametrize(("estimator", "structure"), WAYS)
def test_at_full_rank_the_kernel_is_that_of_the_damped_dense_matrix(estimator, structure):
    rows, (a, b) = scores(), scores(2, 4, seed=1)
    metric = metric_of(rows, estimator=estimator, structure=structure)
    fisher, layers = dense(rows, structure, estimator), layer_of()

    damping = np.full(DIM, 0.1 * np.trace(fisher) / DIM)
    if structure == "block":
        for layer in range(len(DIMS)):
            mine = layers == layer
            damping[mine] = 0.1 * np.trace(fisher[np.ix_(mine, mine)]) / mine.sum()
    expected = a.numpy() @ np.linalg.inv(fisher + np.diag(damping)) @ b.numpy().T

    assert metric.rank == DIM
    np.testing.assert_allclose(metric.kernel(a, b).numpy(), expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(
        sum(metric.kernels_by_block(a, b).values()).numpy(), expected, rtol=0, atol=1e-8 * abs(expected).max()
    )
    assert list(metric.kernels_by_block(a, b)) == (list(DIMS) if structure == "block" else ["all"])


@pytest.mark.parametrize(("estimator", "structure"), WAYS)
def test_at_full_rank_and_zero_damping_the_kernel_is_that_of_the_pseudo_inverse(estimator, structure):
    rows = scores(num_samples=3, num_scores=2)  # six directions in fourteen coordinates
    metric = metric_of(rows, estimator=estimator, structure=structure, damping=0)
    fisher = dense(rows, structure, estimator)
    flat = rows.flatten(0, 1)

    expected = flat.numpy() @ np.linalg.pinv(fisher, rcond=1e-11, hermitian=True) @ flat.numpy().T
    assert metric.rank == np.linalg.matrix_rank(fisher, tol=1e-11 * np.linalg.eigvalsh(fisher)[-1], hermitian=True)
    np.testing.assert_allclose(metric.kernel(flat, flat).numpy(), expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize(("estimator", "structure"), WAYS)
@hypothesis_settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), order=st.randoms(use_true_random=False))
def test_merging_any_units_in_any_order_gives_the_metric_of_all_rows(estimator, structure, cuts, order):
    rows, edges = scores(), sorted([0, *cuts, 40])
    asked = settings(rank=DIM, damping="auto", estimator=estimator, structure=structure)
    parts = []
    for start, stop in itertools.pairwise(edges):
        sums = FisherSum(asked, DIMS, seed=7)
        sums.add(rows[start:stop], torch.arange(start, stop))
        parts.append(sums.to_arrays())
    order.shuffle(parts)
    for value in itertools.chain.from_iterable(part.values() for part in parts):
        value.flags.writeable = False  # as the object store hands them out
    merged = reduce(sums.merge, parts)
    found, _ = sums.decompose(merged)

    expected = metric_of(rows, damping="auto", estimator=estimator, structure=structure).parts
    for actual, part in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual.eigvals, part.eigvals, rtol=1e-8, atol=1e-10 * float(part.eigvals[0]))
        assert actual.damping == pytest.approx(part.damping, rel=1e-9)
    assert merged["counts"].sum() == 40


@pytest.mark.parametrize(("estimator", "structure"), WAYS)
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_of_all_parts_eigenvalues_the_largest_are_kept(estimator, structure, rank):
    rows = scores()
    metric = metric_of(rows, estimator=estimator, structure=structure, rank=rank, damping=0)
    expected = np.sort(np.linalg.eigvalsh(dense(rows, structure, estimator)))[::-1][:rank]
    actual = np.sort(metric.eigvals.numpy())[::-1]
    if estimator in ("exact", "diagonal") or (estimator == "nystrom" and rank == 9):  # a sketch that holds all
        np.testing.assert_allclose(actual, expected, rtol=1e-8)
    else:
        assert len(actual) == rank
        assert (actual <= expected * (1 + 1e-9)).all()  # never above, within bounds that have their own tests
        assert actual[0] > 0
    assert all(bool((part.eigvals.diff() <= 0).all()) for part in metric.parts)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(metric.eigvecs.T @ metric.eigvecs, identity, rtol=0, atol=1e-10)


@given(dims=st.lists(st.integers(1, 4), min_size=1, max_size=7), seed=st.integers(0, 999), rows=st.integers(1, 6))
def test_the_neighbours_matrix_has_no_negative_eigenvalue(dims, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    adjacent = Adjacent(dims)
    adjacent.add(torch.randn(rows, sum(dims), generator=generator, dtype=torch.float64))
    matrix = adjacent.dense(adjacent.to_arrays())

    lowest, highest = torch.linalg.eigvalsh(matrix)[[0, -1]].tolist()
    assert lowest >= -1e-12 * highest
    values, _ = adjacent.eigendecompose(adjacent.to_arrays(), sum(dims))
    assert bool((values > 0).all())


def test_no_larger_taper_would_do():
    """Equal rows make the matrix of layers the taper itself, whose smallest eigenvalue is then zero."""
    assert taper(1) == pytest.approx(taper(2)) == 1.0
    for num_layers in range(2, 12):
        adjacent = Adjacent([1] * num_layers)
        adjacent.add(torch.ones(1, num_layers, dtype=torch.float64))
        values = torch.linalg.eigvalsh(adjacent.dense(adjacent.to_arrays()))
        assert float(values[0].abs()) < 1e-12
        assert 0.5 < taper(num_layers) <= 1 + 1e-12


@pytest.mark.parametrize(("estimator", "structure"), [way for way in WAYS if way[0] != "frequent_directions"])
def test_centring_subtracts_the_mean_scores_outer_product(estimator, structure):
    rows = scores(num_scores=2) + 3  # two draws a sample, each divided by √2
    metric = metric_of(
        rows, estimator=estimator, structure=structure, centered=True, labels="sampled", draws=2, damping=0
    )

    drawn = (rows * math.sqrt(2)).flatten(0, 1)  # the scores themselves, equally likely
    centred = (drawn - drawn.mean(0)).reshape(rows.shape) / math.sqrt(2)
    expected = dense(centred, structure, estimator)
    actual = (metric.eigvecs * metric.eigvals) @ metric.eigvecs.T
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_the_automatic_damping_of_blocks_is_each_blocks_own():
    rows = scores(60)
    rows[:, :, :3] *= 100
    index = torch.arange(60)
    metric = metric_of(rows, structure="block", damping="auto")

    start = 0
    for part, (name, dim) in zip(metric.parts, DIMS.items(), strict=True):
        sums = FisherSum(settings(rank=dim, damping="auto"), {name: dim}, seed=7)
        sums.add(rows[:, :, start : start + dim], index)
        ((alone,), _) = sums.decompose(sums.to_arrays())
        assert part.damping == pytest.approx(alone.damping, rel=1e-12)
        start += dim
    with pytest.raises(RequestError, match="4 parts with a damping each"):
        _ = metric.damping


@pytest.mark.parametrize(("estimator", "structure"), WAYS)
def test_a_layer_that_is_zero_gets_no_direction(estimator, structure):
    rows = scores()
    rows[:, :, 3:8] = 0
    metric = metric_of(rows, estimator=estimator, structure=structure, damping="auto")

    assert metric.rank == DIM - 5
    assert float(metric.whitening[3:8].abs().max()) < 1e-6 * float(metric.whitening.abs().max())
    assert bool(metric.transform(rows).isfinite().all())
    assert len(metric.layer_eigvals("second")) == 0 < len(metric.layer_eigvals("first"))
    with pytest.raises(RequestError, match="no layer 'fifth'; it has first, second"):
        metric.layer_eigvals("fifth")
    with pytest.raises(DataError, match="no direction"):
        metric_of(0 * rows, estimator=estimator, structure=structure)


@pytest.mark.parametrize(("estimator", "structure"), WAYS)
@pytest.mark.parametrize("what", ["one row", "the same row", "NaN"])
def test_few_equal_and_broken_rows_have_defined_behaviour(estimator, structure, what):
    rows = scores(1, 1) if what == "one row" else scores(1, 1).repeat(30, 1, 1)
    if what == "NaN":
        rows[3, 0, 5] = math.nan
        with pytest.raises(DataError, match="NaN or infinity"):
            metric_of(rows, estimator=estimator, structure=structure)
        return
    metric = metric_of(rows, estimator=estimator, structure=structure, damping=0)
    whitened = metric.transform(rows).square().sum(-1)
    if structure == "adjacent":  # the taper adds directions of its own, up to one for each layer
        assert 1 <= metric.rank <= len(DIMS)
        return
    most = DIM if estimator == "diagonal" else len(DIMS) if structure == "block" else 1
    assert metric.rank == most
    torch.testing.assert_close(whitened, torch.full_like(whitened, float(most)), rtol=1e-6, atol=0)


def test_the_summary_is_what_the_dense_matrix_says():
    rows = scores()
    metric = metric_of(rows, rank=6, damping={"absolute": 0.5})
    found, fisher = metric.summary(), dense(rows)
    eigvals = np.linalg.eigvalsh(fisher)[::-1][:6]

    assert found["dim"] == DIM
    assert found["trace"] == pytest.approx(np.trace(fisher), rel=1e-10)
    assert found["captured"] == pytest.approx(eigvals.sum() / np.trace(fisher), rel=1e-10)
    assert found["effective_dim"] == pytest.approx((eigvals / (eigvals + 0.5)).sum(), rel=1e-10)
    assert found["condition"] == pytest.approx((eigvals[0] + 0.5) / (eigvals[-1] + 0.5), rel=1e-10)
    low_rank = (metric.eigvecs * metric.eigvals) @ metric.eigvecs.T
    start = 0
    for layer, (name, dim) in zip(found["layers"], DIMS.items(), strict=True):
        mine = slice(start, start + dim)
        assert (layer["name"], layer["num_coordinates"]) == (name, dim)
        assert layer["trace"] == pytest.approx(np.trace(fisher[mine, mine]), rel=1e-10)
        block = torch.linalg.eigvalsh(low_rank[mine, mine]).flip(0).numpy()
        count = min(dim, 6)  # more directions than the metric has there are none
        np.testing.assert_allclose(layer["eigvals"], block[:count], rtol=1e-8, atol=1e-10)
        start += dim


def test_features_taken_back_are_the_scores_in_the_span_of_the_eigenvectors():
    rows = scores()
    for structure in ("global", "block"):
        metric = metric_of(rows, structure=structure, rank=6, damping="auto")
        again = metric.inverse_transform(metric.transform(rows))
        torch.testing.assert_close(again, rows @ metric.eigvecs @ metric.eigvecs.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(metric.transform(again), metric.transform(rows), rtol=1e-9, atol=1e-9)
    with pytest.raises(ModelError, match="5 features, and the metric has rank 6"):
        metric.inverse_transform(torch.zeros(5))


def test_held_out_rows_are_summed_apart_only_for_an_automatic_damping():
    rows, index = scores(), torch.arange(40)
    for damping, names in [("auto", {"fit", "held"}), (0.1, {"fit"})]:
        sums = FisherSum(settings(rank=3, damping=damping), DIMS, seed=7)
        sums.add(rows, index)
        arrays = sums.to_arrays()
        assert {key.split(":")[1] for key in arrays if ":" in key} == names
        held = int(is_held_out(index).sum()) if damping == "auto" else 0
        assert arrays["counts"].tolist() == [40 - held, held][: len(names)]


@pytest.mark.parametrize(("estimator", "structure"), [way for way in WAYS if way[0] != "frequent_directions"])
def test_equal_rows_have_no_centred_direction(estimator, structure):
    rows = scores(1, 1).repeat(50, 1, 1)
    asked = {"centered": True, "labels": "true", "damping": 0.1}
    with pytest.raises(DataError, match="no direction"):
        metric_of(rows, estimator=estimator, structure=structure, **asked)


def test_a_centred_summary_is_of_the_centred_matrix():
    rows = scores(num_scores=1) + 3
    metric = metric_of(rows, centered=True, labels="true", damping=0)
    found, fisher = metric.summary(), dense(rows - rows.mean(0))
    assert found["trace"] == pytest.approx(np.trace(fisher), rel=1e-9)
    assert found["captured"] == pytest.approx(1.0, rel=1e-9)


def test_rounding_of_single_precision_is_no_direction():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 1, 3, generator=generator) @ torch.randn(3, DIM, generator=generator)
    assert metric_of(rows.float(), damping=0).rank == 3
    assert metric_of(rows.float(), damping=0, structure="block").rank <= 3 * len(DIMS)


def test_arrays_do_not_change_when_more_is_added():
    rows, sums = scores(), FisherSum(settings(rank=3), DIMS, seed=7)
    sums.add(rows[:20], torch.arange(20))
    arrays = sums.to_arrays()
    before = {name: value.copy() for name, value in arrays.items()}
    sums.add(rows[20:], torch.arange(20, 40))
    sums.to_arrays()
    assert all(np.array_equal(arrays[name], value) for name, value in before.items())


def test_a_layer_that_only_held_out_rows_reach_is_damped_by_its_mean():
    rows, index = scores(), torch.arange(40)
    rows[~is_held_out(index), :, :3] = 0
    metric = metric_of(rows, structure="block", damping="auto")
    part = metric.parts[0]
    assert part.damping == pytest.approx(float(part.eigvals.sum()) / 3, rel=1e-10)
