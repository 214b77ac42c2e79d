"""At full rank and without damping, the Fisher kernel is a property of the function, not of its parameters."""

import pytest
import torch
from torch import nn

from fisher_ray import features, fit_metric
from fisher_ray.gradients import ScoreEngine
from fisher_ray.gradients.factors import FormedFactors
from tests.metric import reparametrised
from tests.reference import gradients
from tests.reference import metric as reference

DENSE_RANK = 66
"""Of 83 parameters, 11 hidden units take a factor each, and 6 inputs of the last layer move all logits alike."""
CONVOLUTIONAL_RANK = 136
"""Of 160 parameters, 7 channels and 17 inputs."""
PAIRS = {
    "rescaled layers": (reparametrised.rescaled_layers, DENSE_RANK),
    "rescaled convolutions with max-pooling": (reparametrised.rescaled_convolutions, CONVOLUTIONAL_RANK),
    "a layer between fixed linear maps": (reparametrised.between_fixed_maps, DENSE_RANK),
    "a layer of weights A V B": (reparametrised.two_sided_parameter, DENSE_RANK),
    "weight normalisation": (reparametrised.weight_normalised, DENSE_RANK),
    "weight normalisation of a convolution": (reparametrised.weight_normalised_convolution, CONVOLUTIONAL_RANK),
}
GENERAL = {"a layer of weights A V B", "weight normalisation", "weight normalisation of a convolution"}


def make_inputs(model):
    """300 samples to fit on, whose 600 independent scores are more than the parameters, and 20 fresh ones."""
    shape = (2, 8, 8) if isinstance(model[0], nn.Conv2d) else (4,)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(320, *shape, generator=generator, dtype=torch.float64).split([300, 20])


def kernel(model, inputs, fresh, damping=0.0, compression="identity"):
    metric = fit_metric(model, inputs, compression=compression, damping=damping)
    rows = features(model, metric, fresh).flatten(0, 1)
    return rows @ rows.T, metric.rank


def euclidean_kernel(model, inputs):
    scores = gradients.weighted_scores(model, inputs).flatten(0, 1)
    return scores @ scores.T


def change(before, after):
    """Relative to the kernel, in the Frobenius norm."""
    return float(torch.linalg.norm(after - before) / torch.linalg.norm(before))


@pytest.fixture(params=PAIRS)
def pair(request):
    make, rank = PAIRS[request.param]
    models = make()
    inputs, fresh = make_inputs(models[0])
    torch.testing.assert_close(models[0](inputs), models[1](inputs), rtol=1e-10, atol=1e-10)
    return request.param, models, inputs, fresh, rank


@pytest.mark.parametrize("compression", ["identity", "kronecker"])
def test_the_undamped_kernel_of_fresh_samples_does_not_change_under_a_reparametrisation(pair, compression):
    _, models, inputs, fresh, rank = pair
    (before, ranks), (after, other_rank) = (kernel(model, inputs, fresh, compression=compression) for model in models)

    assert (ranks, other_rank) == (rank, rank)
    assert change(before, after) < 1e-6


def test_damped_and_euclidean_kernels_change_under_every_one_of_them(pair):
    _, models, inputs, fresh, _ = pair
    damped = [kernel(model, inputs, fresh, damping=0.1)[0] for model in models]
    euclidean = [euclidean_kernel(model, fresh) for model in models]

    assert change(*damped) > 0.05
    assert change(*euclidean) > 0.1


def test_parametrised_weights_go_by_the_way_of_layers_without_a_formula(pair):
    name, (_, model), inputs, *_ = pair
    formed = [item for item in ScoreEngine(model).all_classes(inputs[:2]).factors if isinstance(item, FormedFactors)]
    assert bool(formed) == (name in GENERAL)


@pytest.mark.parametrize("make", [reparametrised.weight_normalised, reparametrised.weight_normalised_convolution])
def test_the_length_of_a_normalised_direction_is_a_null_direction(make):
    _, normalised = make()
    other = reparametrised.with_other_lengths(normalised)
    inputs, fresh = make_inputs(normalised)
    (before, rank), (after, other_rank) = (kernel(each, inputs, fresh) for each in (normalised, other))

    assert rank == other_rank
    assert change(before, after) < 1e-6
    assert change(euclidean_kernel(normalised, fresh), euclidean_kernel(other, fresh)) > 0.1


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("make", [reparametrised.dense_network, reparametrised.convolutional_network])
def test_the_kernel_is_that_of_the_dense_fisher_made_by_one_backward_a_sample_and_class(make, damping):
    model = make()
    inputs, fresh = make_inputs(model)
    fisher = reference.fisher(model, inputs).numpy() / len(inputs)
    scores = reference.scores(model, fresh).flatten(0, 1).numpy()
    if damping:
        expected = reference.damped_kernel(scores, scores, fisher, damping * fisher.trace() / len(fisher))
    else:
        expected = reference.undamped_kernel(scores, scores, fisher)

    actual, _ = kernel(model, inputs, fresh, damping)
    assert change(torch.from_numpy(expected), actual) < 1e-8
