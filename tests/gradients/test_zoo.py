"""Every network of the zoo against one backward for each sample."""

import pytest
import torch

from fisher_ray import class_scores, per_sample_gradients
from fisher_ray.gradients import ScoreEngine
from fisher_ray.gradients.outputs import call, main_output, rows
from tests.gradients.zoo import ZOO, build

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def oracle(model, inputs, row, score):
    """Gradients of ``score`` of one sample's output, by one backward of that sample alone."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    value = score(main_output(call(model, rows(inputs, slice(row, row + 1))))[0])
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.detach()
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def log_softmax_of(label):
    return lambda output: output.log_softmax(-1)[label]


@pytest.mark.parametrize("name", ZOO)
def test_gradients_equal_one_backward_for_each_sample(name):
    model, inputs = build(name, 3)
    labels = torch.tensor([2, 0, 3])
    actual = per_sample_gradients(model, inputs, labels)

    for row, label in enumerate(labels.tolist()):
        expected = oracle(model, inputs, row, log_softmax_of(label))
        assert actual.keys() == expected.keys()
        torch.testing.assert_close({key: -value[row] for key, value in actual.items()}, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ZOO)
def test_scores_of_all_classes_equal_one_backward_for_each_class(name):
    model, inputs = build(name, 2)
    actual = class_scores(model, inputs)

    num_classes = main_output(call(model, inputs)).shape[1]
    for row in range(2):
        for label in range(num_classes):
            expected = oracle(model, inputs, row, log_softmax_of(label))
            torch.testing.assert_close({key: v[row, label] for key, v in actual.items()}, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ZOO)
def test_the_network_is_left_as_it_was(name):
    model, inputs = build(name, 2)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = main_output(call(model, inputs)).detach()
    ScoreEngine(model).all_classes(inputs)

    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(main_output(call(model, inputs)), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.gpu
@pytest.mark.parametrize("name", ZOO)
def test_on_a_gpu_the_gradients_are_the_oracles(name):
    model, inputs = build(name, 3)
    labels = torch.tensor([2, 0, 3])
    expected = per_sample_gradients(model, inputs, labels)
    moved = torch.utils._pytree.tree_map(lambda value: value.cuda(), inputs)
    torch.set_default_device("cuda")  # a network may make tensors of its own
    try:
        actual = per_sample_gradients(model.cuda(), moved, labels.cuda())
    finally:
        torch.set_default_device(None)

    torch.testing.assert_close({key: value.cpu() for key, value in actual.items()}, expected, **TOLERANCE)
