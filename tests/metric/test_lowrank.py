import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisher_ray
from fisher_ray.errors import ModelError, StoreError
from fisher_ray.metric import LowRankMetric, Part
from fisher_ray.records import LayerSketch
from fisher_ray.store import ArraySpec, StoreSpec, create_store, save_arrays
from tests.gradients.networks import make
from tests.metric.fitting import compress, decompose, fit, kronecker_bases
from tests.metric.reparametrised import spread_matrix
from tests.reference import metric as reference


@pytest.fixture
def fitted():
    """A metric of 20 directions in 50 coordinates, and the compressed scores of 8 samples."""
    model, inputs = make("mlp", 30)
    bases = kronecker_bases(model, inputs, 50)
    return fit(model, inputs, bases, 20, 0.1), compress(model, inputs[:8], bases)


def metric_of(fisher, rank, damping):
    """The metric of a Fisher matrix ``(D, D)``, without a network."""
    rows = torch.linalg.cholesky(torch.as_tensor(fisher)).T[None]  # one sample whose scores' products add up to it
    part = decompose(rows, rank, damping)
    return LowRankMetric({"fc": LayerSketch("fc", (1, len(fisher)), len(fisher), None)}, (part,), (), {})


def with_damping(metric, damping):
    return replace(metric, parts=tuple(replace(part, damping=damping) for part in metric.parts))


def assert_same_bits(actual, expected):
    assert (actual.damping, actual.attributes) == (expected.damping, expected.attributes)
    assert actual.layers == expected.layers
    assert actual.fingerprint == expected.fingerprint
    assert list(actual.bases) == list(expected.bases)
    for name, basis in expected.bases.items():
        for part in ("inputs", "outputs", "pairs"):
            assert torch.equal(getattr(actual.bases[name], part), getattr(basis, part))
    for part in ("eigvals", "eigvecs"):
        assert getattr(actual, part).dtype == torch.float64
        assert torch.equal(getattr(actual, part), getattr(expected, part))


def test_a_saved_metric_comes_back_with_the_same_bits_and_gives_the_same_features(fitted, tmp_path):
    metric, scores = fitted
    for _ in range(2):  # the second time it replaces the first
        metric.save(str(tmp_path / "metric.zarr"))
    loaded = LowRankMetric.load(str(tmp_path / "metric.zarr"))

    assert_same_bits(loaded, metric)
    assert torch.equal(loaded.transform(scores), metric.transform(scores))
    loaded.save(str(tmp_path / "again.zarr"))
    assert_same_bits(LowRankMetric.load(str(tmp_path / "again.zarr")), metric)


@pytest.mark.s3
def test_a_metric_saved_in_s3_comes_back_with_the_same_bits(fitted, s3_url):
    metric, _ = fitted
    metric.save(s3_url)
    assert_same_bits(LowRankMetric.load(s3_url), metric)


def test_what_is_not_a_metric_is_refused(fitted, tmp_path):
    metric, _ = fitted
    arrays, rest = metric.to_arrays()
    kept = {"kind": "metric", "schema": 2, **rest}
    save_arrays(str(tmp_path / "metric"), arrays, kept)
    LowRankMetric.load(str(tmp_path / "metric"))

    save_arrays(str(tmp_path / "basis"), arrays, {**kept, "kind": "basis"})
    save_arrays(str(tmp_path / "later"), arrays, {**kept, "schema": 3})
    create_store(str(tmp_path / "features"), StoreSpec(4, 4, 4, "none", {"a": ArraySpec((), "int64", ("sample",))}, {}))
    (tmp_path / "metric" / "seal.json").unlink()
    for name in ("basis", "later", "features", "metric", "nothing"):
        with pytest.raises(StoreError):
            LowRankMetric.load(str(tmp_path / name))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_features_and_kernel_equal_the_dense_formula(fitted, dtype, tolerance, damping):
    metric, scores = fitted
    metric = with_damping(metric, damping * float(metric.eigvals.mean()))
    scale = np.diag(1 / np.sqrt(metric.eigvals.numpy() + metric.damping))
    expected = scores.numpy() @ metric.eigvecs.numpy() @ scale
    scores = scores.to(dtype)

    features = metric.transform(scores)

    assert features.dtype == dtype
    assert features.shape == (8, 5, 20)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(features.numpy(), expected, rtol=0, atol=tolerance * largest)
    kernel = metric.kernel(scores[:3], scores[3:6])
    assert kernel.shape == (3, 5, 5)
    dense = np.einsum("bmr,bnr->bmn", expected[:3], expected[3:6])
    np.testing.assert_allclose(kernel.numpy(), dense, rtol=0, atol=20 * tolerance * largest**2)


@given(seed=st.integers(0, 999), dim=st.integers(1, 10), damping=st.floats(0, 2))
def test_at_full_rank_the_kernel_is_that_of_the_damped_inverse(seed, dim, damping):
    generator = torch.Generator().manual_seed(seed)
    root = spread_matrix(generator, dim, 2)
    metric = metric_of((root @ root.T).numpy(), dim, damping)
    a, b = torch.randn(2, 4, dim, generator=generator, dtype=torch.float64)

    expected = reference.damped_kernel(a.numpy(), b.numpy(), (root @ root.T).numpy(), metric.damping)
    np.testing.assert_allclose(metric.kernel(a, b).numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@given(seed=st.integers(0, 999), dim=st.integers(1, 10), decades=st.floats(0, 2))
def test_the_undamped_kernel_does_not_change_under_a_linear_change_of_coordinates(seed, dim, decades):
    # F and T have condition numbers up to 1e4 and 1e2, so T F Tᵀ has 1e8: eight digits are left of sixteen
    generator = torch.Generator().manual_seed(seed)
    root, change = spread_matrix(generator, dim, 2), spread_matrix(generator, dim, decades)
    a, b = torch.randn(2, 4, dim, generator=generator, dtype=torch.float64)
    before = metric_of((root @ root.T).numpy(), dim, 0.0).kernel(a, b)

    moved = change @ root
    after = metric_of((moved @ moved.T).numpy(), dim, 0.0).kernel(a @ change.T, b @ change.T)

    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize("structure", ["global", "block"])
def test_folded_weights_weigh_scores_as_the_weights_weigh_their_features(structure):
    model, inputs = make("mlp", 30)
    metric = fisher_ray.fit_metric(model, inputs, dim=50, rank=20, structure=structure)
    assert (len(metric.parts) > 1) == (structure == "block")
    scores = torch.randn(8, 10, metric.dim, dtype=torch.float64)
    weights = torch.randn(3, metric.rank, dtype=torch.float64)
    torch.testing.assert_close(
        scores @ metric.fold(weights).T, metric.transform(scores) @ weights.T, rtol=1e-10, atol=1e-10
    )
    with pytest.raises(ModelError, match=f"there are 3 features, and the metric has rank {metric.rank}"):
        metric.fold(weights[:, :3])


def test_scores_with_other_coordinates_are_refused(fitted):
    metric, scores = fitted
    for wrong in (scores[..., :-1], torch.zeros(51), torch.zeros(1)):
        with pytest.raises(ModelError, match=rf"scores have {wrong.shape[-1]} coordinates, the metric 50"):
            metric.transform(wrong)
        with pytest.raises(ModelError, match="coordinates"):
            metric.kernel(scores, wrong)


def test_features_of_the_fitting_samples_have_the_expected_root_mean_square():
    model, inputs = make("mlp", 30)
    bases = kronecker_bases(model, inputs, 50)
    for damping in (0.0, 0.3):
        metric = fit(model, inputs, bases, 20, damping)
        features = metric.transform(compress(model, inputs, bases))
        actual = float((features**2).sum(dim=1).mean().sqrt())
        assert abs(actual - metric.feature_rms) < 1e-10
        assert metric.feature_rms <= 1 if damping else abs(metric.feature_rms - 1) < 1e-12


def test_the_whitening_matrix_is_made_once_for_each_dtype(fitted, monkeypatch):
    metric, scores = fitted
    made, whitening = [], Part.whitening.fget
    monkeypatch.setattr(Part, "whitening", property(lambda self: made.append(self) or whitening(self)))
    for _ in range(3):
        metric.transform(scores)
        metric.transform(scores.float())
    assert len(made) == 2
    with_damping(metric, 1.0).transform(scores)
    assert len(made) == 3


def test_a_used_metric_pickles_to_no_more_than_a_new_one(fitted):
    metric, scores = fitted
    before = pickle.dumps(metric)
    features = metric.transform(scores)
    after = pickle.dumps(metric)

    assert len(after) == len(before)
    again = pickle.loads(after)
    assert_same_bits(again, metric)
    assert torch.equal(again.transform(scores), features)


def test_a_metric_first_used_without_gradients_can_be_differentiated_through_later(fitted):
    metric, scores = fitted
    with torch.inference_mode():
        metric.transform(scores)
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(metric.transform(scores).sum(), scores)
    torch.testing.assert_close(gradient, metric.whitening.sum(dim=1).expand(8, 5, 50), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.2, "auto"])
def test_metric_and_features_do_not_depend_on_the_order_of_the_samples(damping):
    model, inputs = make("mlp", 30)
    bases = kronecker_bases(model, inputs, 50)
    scores, order = compress(model, inputs, bases), torch.randperm(30, generator=torch.Generator().manual_seed(0))
    results = []
    for rows in (torch.arange(30), order):
        part = decompose(scores[rows], 20, damping, rows)
        results.append(LowRankMetric(bases, (part,), (), {}).transform(scores))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


@pytest.mark.gpu
def test_features_on_a_gpu_equal_those_on_the_processor(fitted):
    metric, scores = fitted
    torch.testing.assert_close(metric.transform(scores.cuda()).cpu(), metric.transform(scores), rtol=1e-12, atol=1e-12)
