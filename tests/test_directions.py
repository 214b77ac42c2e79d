"""From parameters to features and back, against formulas on whole gradients in float64."""

import pytest
import torch

import fisher_ray
from fisher_ray.errors import ModelError, RequestError
from tests.gradients import networks, zoo
from tests.reference import metric as reference
from tests.reference.gradients import weighted_scores

WAYS = ["identity", "kronecker", "random", "sketch"]


def flat(model, vector):
    return torch.cat([vector[name].flatten() for name, _ in model.named_parameters() if name in vector])


@pytest.mark.parametrize("compression", WAYS)
@pytest.mark.parametrize("structure", ["global", "block"])
def test_a_score_as_a_vector_of_parameters_has_the_samples_features(compression, structure):
    model, inputs = networks.make("strided grouped dilated", 12)
    metric = fisher_ray.fit_metric(model, inputs, compression=compression, structure=structure, dim=40, rank=20)
    features = fisher_ray.features(model, metric, inputs)
    probabilities = model(inputs).softmax(1)

    scores = fisher_ray.class_scores(model, inputs)
    for row, label in [(0, 1), (3, 0)]:
        vector = {name: value[row, label] * probabilities[row, label].sqrt() for name, value in scores.items()}
        made = fisher_ray.project(model, metric, vector)
        torch.testing.assert_close(made, features[row, label].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compression", WAYS)
def test_the_way_back_is_the_adjoint_of_the_way_to_unwhitened_features(compression):
    """``⟨φ, (Λ + δ) project(v)⟩ = ⟨directions(φ), v⟩``: both are ``φᵀ (Λ + δ)^½ Uᵀ C v``."""
    model, inputs = networks.make("strided grouped dilated", 12)
    metric = fisher_ray.fit_metric(model, inputs, compression=compression, dim=40, rank=20)
    generator = torch.Generator().manual_seed(0)
    vector = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in model.named_parameters()
    }
    phi = torch.randn(3, metric.rank, generator=generator, dtype=torch.float64)

    back = dict(fisher_ray.parameter_directions(model, metric, phi))
    assert [(name, value.shape[1:]) for name, value in back.items()] == [
        (name, value.shape) for name, value in model.named_parameters()
    ]
    left = phi @ ((metric.eigvals + metric.dampings) * fisher_ray.project(model, metric, vector))
    right = torch.stack([sum((back[name][row] * vector[name]).sum() for name in vector) for row in range(3)])
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)  # bases are float32


def test_what_is_done_between_two_directions_may_be_differentiated():
    model, inputs = networks.make("mlp", 12)
    metric = fisher_ray.fit_metric(model, inputs, dim=40, rank=20)
    phi = torch.zeros(metric.rank).double().requires_grad_()
    for _, direction in fisher_ray.parameter_directions(model, metric, phi):
        assert torch.is_grad_enabled()
        assert not direction.requires_grad


def test_at_full_rank_a_score_comes_back_whole():
    model, inputs = networks.make("strided grouped dilated", 40)
    metric = fisher_ray.fit_metric(model, inputs, compression="identity", damping=0.1)
    features = fisher_ray.features(model, metric, inputs[:2])

    back = dict(fisher_ray.parameter_directions(model, metric, features))
    expected = weighted_scores(model, inputs[:2])
    actual = torch.cat([back[name].flatten(2) for name, _ in model.named_parameters()], 2)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["language model, tied", "resnet, group norm"])
def test_tied_and_transposed_parameters_go_both_ways(name):
    model, inputs = zoo.build(name, 4)
    labels = {"labels": "true", "likelihood": "softmax"}
    metric = fisher_ray.fit_metric(
        model, [(inputs, torch.tensor([0, 1, 2, 0]))], compression="sketch", dim=60, **labels
    )
    gradients = fisher_ray.per_sample_gradients(model, inputs, torch.tensor([0, 1, 2, 0]))
    vector = {key: value[0] for key, value in gradients.items()}
    phi = fisher_ray.project(model, metric, vector)

    back = dict(fisher_ray.parameter_directions(model, metric, phi))
    assert back.keys() == vector.keys()
    left = phi @ ((metric.eigvals + metric.dampings) * phi)
    right = sum((back[key] * vector[key]).sum() for key in vector)
    torch.testing.assert_close(left, right.detach(), rtol=1e-8, atol=1e-10)


def test_what_does_not_fit_is_refused():
    model, inputs = networks.make("mlp", 12)
    metric = fisher_ray.fit_metric(model, inputs, compression="topk", dim=40)
    vector = {name: value.detach() for name, value in model.named_parameters()}
    assert fisher_ray.project(model, metric, vector).shape == (metric.rank,)
    with pytest.raises(RequestError, match="topk"):
        list(fisher_ray.parameter_directions(model, metric, torch.zeros(metric.rank).double()))
    name = next(iter(vector))
    with pytest.raises(ModelError, match=rf"parameter '{name}': none"):
        fisher_ray.project(model, metric, {})
    with pytest.raises(ModelError, match=rf"parameter '{name}': shape \(2,\)"):
        fisher_ray.project(model, metric, {**vector, name: torch.zeros(2).double()})


def test_the_projection_of_a_step_is_what_the_damped_fisher_says():
    model, inputs = networks.make("mlp", 40)
    metric = fisher_ray.fit_metric(model, inputs, compression="identity", damping=0.1)
    rows = reference.scores(model, inputs).flatten(0, 1).numpy()
    fisher = rows.T @ rows / len(inputs)
    vector = {name: value.detach() for name, value in model.named_parameters()}
    v = flat(model, vector)[reference.rows_by_layer(model)].numpy()[None]

    made = fisher_ray.features(model, metric, inputs[:5]).flatten(0, 1) @ fisher_ray.project(model, metric, vector)
    expected = reference.damped_kernel(rows[: 5 * 5], v, fisher, metric.damping)[:, 0]
    torch.testing.assert_close(made, torch.from_numpy(expected), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("compression", WAYS)
def test_a_direction_of_another_dtype_is_taken_in_the_factors(compression):
    model, inputs = networks.make("mlp", 12)
    model, inputs = model.float(), inputs.float()
    metric = fisher_ray.fit_metric(model, inputs, compression=compression, dim=40, rank=20)
    vector = {name: value.detach() for name, value in model.named_parameters()}
    expected = fisher_ray.project(model, metric, vector)
    made = fisher_ray.project(model, metric, {name: value.double() for name, value in vector.items()})
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected)
