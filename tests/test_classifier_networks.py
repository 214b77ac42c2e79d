"""Metrics and features of networks of every kind and likelihood, on tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fisher_ray
from fisher_ray.errors import ModelError, RequestError
from fisher_ray.gradients import Compressor, ScoreEngine
from tests.gradients.zoo import Gpt, build

NAMES = [
    "resnet, batch norm",
    "transformer encoder, time first",
    "language model, tied",
    "weight norm",
    "frames folded into the batch",
    "layers that do not see the samples",
    "transposed linear, tied",
]


def damped_kernel(scores: Tensor, damping: float) -> Tensor:
    """``s (F + δ I)⁻¹ s'ᵀ`` of scores ``(B, S, P)``, all with all."""
    flat = scores.flatten(0, 1)
    fisher = flat.T @ flat / len(scores)
    return flat @ torch.linalg.solve(fisher + damping * torch.eye(len(fisher)), flat.T)


def assert_same_kernel(made: Tensor, expected: Tensor) -> None:
    """Bases are kept in float32, hence the tolerance."""
    flat = made.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compression", ["identity", "kronecker"])
def test_the_features_kernel_is_the_damped_fisher_kernel_of_all_parameters(name, compression):
    model, inputs = build(name, 12)
    metric = fisher_ray.fit_metric(model, inputs, compression=compression, dim=10**6, damping=0.1)

    with torch.no_grad():
        probabilities = model(inputs).softmax(1)
    gradients = fisher_ray.class_scores(model, inputs)
    scores = torch.cat([value.flatten(2) for value in gradients.values()], dim=2) * probabilities.sqrt()[..., None]
    assert_same_kernel(fisher_ray.features(model, metric, inputs), damped_kernel(scores, metric.damping))


def test_a_metric_is_used_in_the_precision_that_it_was_fitted_in(tmp_path):
    model, inputs = build("transformer encoder", 12)
    model, inputs = model.float(), inputs.float()
    plain = fisher_ray.fit_metric(model, inputs, dim=16, damping=0.1)
    metric = fisher_ray.fit_metric(model, inputs, dim=16, damping=0.1, precision="bfloat16")
    assert (plain.attributes["precision"], metric.attributes["precision"]) == ("float32", "bfloat16")
    metric.save(str(tmp_path / "metric.zarr"))
    made = fisher_ray.features(model, fisher_ray.LowRankMetric.load(str(tmp_path / "metric.zarr")), inputs)

    engine = ScoreEngine(model, precision=torch.bfloat16)
    scores, reflection = engine.spanning_classes(inputs)
    compressed = reflection.complete(Compressor(metric.bases, engine.blocks, engine.like).compress(scores))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, metric.transform(compressed), rtol=0, atol=0)
    exact = fisher_ray.features(model, replace(metric, attributes=plain.attributes), inputs)
    assert 1e-4 < float((made - exact).norm() / exact.norm()) < 3e-2


def test_a_network_in_half_precision_has_features_in_float32():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16(), torch.randn(12, 5)
    metric = fisher_ray.fit_metric(model, inputs, dim=16, damping=0.1)
    made = fisher_ray.features(model, metric, inputs)
    assert made.dtype == torch.float32
    exact = fisher_ray.features(model.float(), metric, inputs)
    assert 1e-4 < float((made - exact).norm() / exact.norm()) < 3e-2


def test_regression_has_the_gauss_newton_metric():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(9, 3).double()
    metric = fisher_ray.fit_metric(model, inputs, likelihood="gaussian", compression="identity", damping=0.1)
    made = fisher_ray.features(model, metric, inputs)

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda values: torch.func.functional_call(model, values, (inputs,)))(parameters)
    scores = torch.cat([value.flatten(2) for value in jacobian.values()], dim=2)
    assert made.shape == (9, 2, metric.rank)
    assert_same_kernel(made, damped_kernel(scores, metric.damping))


def test_a_language_models_metric_is_of_its_sequences():
    torch.manual_seed(0)
    model, tokens = Gpt(classes=False).double().eval(), torch.randint(11, (30, 7))
    metric = fisher_ray.fit_metric(model, tokens, labels="true", likelihood="next_token", dim=40, damping=0.1)

    assert metric.attributes["likelihood"] == "next_token"
    assert metric.rank > 20
    again = fisher_ray.fit_metric(
        model, [(tokens, tokens)], labels="true", likelihood="next_token", dim=40, damping=0.1
    )
    torch.testing.assert_close(again.eigvals, metric.eigvals)
    with pytest.raises(RequestError, match="next tokens have too many"):
        fisher_ray.features(model, metric, tokens)


def test_a_likelihood_of_your_own_has_the_empirical_fisher_of_given_targets():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(3, 2).double(), torch.randn(20, 3).double(), torch.randn(20, 2).double()

    def log_likelihood(output: Tensor, y: Tensor) -> Tensor:
        return -0.5 * (output - y).square().sum(1)

    own = fisher_ray.fit_metric(model, [(inputs, targets)], labels="true", likelihood=log_likelihood, dim=8)
    known = fisher_ray.fit_metric(model, [(inputs, targets)], labels="true", likelihood="gaussian", dim=8)
    torch.testing.assert_close(own.eigvals, known.eigvals)
    with pytest.raises(RequestError, match="likelihood of your own"):
        fisher_ray.features(model, own, inputs)


def test_wrong_likelihoods_are_refused():
    model, inputs = nn.Linear(3, 2), torch.randn(9, 3)
    with pytest.raises(RequestError, match="likelihood 'poisson' is not one of softmax, gaussian"):
        fisher_ray.fit_metric(model, inputs, likelihood="poisson")
    metric = fisher_ray.fit_metric(model, inputs, likelihood="gaussian", dim=4)
    weights = fisher_ray.linear.LinearWeights(torch.zeros(2, 8), torch.zeros(2), 0.1, 1.0)
    with pytest.raises(ModelError, match="of a gaussian likelihood"):
        fisher_ray.FisherClassifier(model, metric, weights)


def test_a_classifier_of_a_network_with_tied_and_frozen_parts_comes_back(tmp_path):
    model, tokens = build("language model, tied", 40)
    model.norm1.requires_grad_(False)
    metric = fisher_ray.fit_metric(model, tokens, dim=60, damping=0.1)
    store = fisher_ray.write_features(model, metric, tokens, str(tmp_path / "store"), labels=torch.arange(40) % 11)
    classifier = fisher_ray.FisherClassifier(model, metric, fisher_ray.train_linear(store, validation=0.3))
    classifier.save(str(tmp_path / "classifier.safetensors"))

    assert "norm1.weight" not in metric.attributes["parameters"]
    other = fisher_ray.FisherClassifier.load(str(tmp_path / "classifier.safetensors"), Gpt().double())
    assert torch.equal(other.predict_proba(tokens), classifier.predict_proba(tokens))


def test_a_layer_without_gradient_takes_no_coordinates_from_the_others():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(50, 5)
    nn.init.zeros_(model[3].weight)
    metric = fisher_ray.fit_metric(model, inputs, dim=8)

    assert list(metric.bases) == ["3"]
    assert metric.rank == 8
