"""Every network of the zoo against one backward for each sample."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fisher_ray import class_scores, per_sample_gradients
from fisher_ray.errors import ModelError, RequestError
from fisher_ray.gradients import ScoreEngine, form_gradients
from fisher_ray.gradients.layers import LinearLayer
from fisher_ray.gradients.outputs import call, main_output, pull_back, rows
from tests.gradients.zoo import ZOO, Composed, build, positions

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def oracle(model, inputs, row, score):
    """Gradients of ``score`` of one sample's output, by one backward of that sample alone."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    value = score(main_output(call(model, rows(inputs, torch.tensor([row]))))[0])
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
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    before = main_output(call(model, inputs)).detach()
    ScoreEngine(model).all_classes(inputs)

    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(main_output(call(model, inputs)), before)
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_a_network_that_overwrites_its_inputs_is_looked_at_on_copies_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(5, 4)).double()
    inputs, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([2, 0, 3])
    actual = per_sample_gradients(model, inputs.clone(), labels)
    for row, label in enumerate(labels.tolist()):
        expected = oracle(model, inputs, row, log_softmax_of(label))
        torch.testing.assert_close({key: -value[row] for key, value in actual.items()}, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["weight norm by hooks", "a module that keeps what it computed"])
def test_nothing_of_a_vectorised_call_is_left_in_the_network(name):
    model, inputs = build(name, 2)
    per_sample_gradients(model, inputs, torch.tensor([0, 1]))
    for module in model.modules():
        for value in [*vars(module).values(), *module._parameters.values()]:
            assert not isinstance(value, torch.Tensor) or not torch._C._functorch.is_functorch_wrapped_tensor(value)
    assert not any(torch._C._functorch.is_gradtrackingtensor(value) for value in model.state_dict().values())


@pytest.mark.parametrize("lengths", [(5, 1), (1, 5), (4, 2, 6)])
@pytest.mark.parametrize("layout", ["positions", "folded"])
def test_sequences_of_other_lengths_have_the_oracles_gradients(layout, lengths):
    def folded(self, t):
        made = torch.tanh(self.layer(torch.tanh(self.tokens(t)).flatten(0, 1)))
        return self.head(made.reshape(*t.shape, 6).mean(1))

    torch.manual_seed(0)
    parts = {"tokens": nn.Embedding(11, 6), "layer": nn.Linear(6, 6), "head": nn.Linear(6, 4)}
    model = Composed(folded, **parts) if layout == "folded" else positions(lambda x, p: x + p)()
    model, labels = model.double(), torch.tensor([2, 0])
    engine = ScoreEngine(model)
    for length in lengths:
        inputs = torch.randint(11, (2, length))
        made = form_gradients(engine.blocks, model, engine.of_labels(inputs, labels))
        for row, label in enumerate(labels.tolist()):
            expected = oracle(model, inputs, row, log_softmax_of(label))
            torch.testing.assert_close({key: value[row, 0] for key, value in made.items()}, expected, **TOLERANCE)


def test_gradients_that_were_zero_are_compared_on_later_batches(monkeypatch):
    factors = LinearLayer.factors

    def wrong(self, part, value, delta):
        return factors(self, part, 2 * value if self.name == "0" else value, delta)

    monkeypatch.setattr(LinearLayer, "factors", wrong)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    for first in (torch.zeros(2, 5), torch.full((2, 5), torch.nan)):
        engine = ScoreEngine(model, "*.weight")
        engine.of_labels(first.double(), torch.tensor([0, 1]))  # says nothing of the first layer's weight
        with pytest.raises(ModelError, match=r"parameter '0\.weight' do not add up"):
            engine.of_labels(torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3]))


def test_gradients_are_the_same_in_inference_mode_and_of_its_tensors():
    model, inputs = build("norms of vectors", 3)
    labels = torch.tensor([2, 0, 3])
    expected = per_sample_gradients(model, inputs, labels)
    with torch.inference_mode():
        torch.testing.assert_close(per_sample_gradients(model, inputs.clone(), labels), expected, rtol=0, atol=0)
        made = inputs.clone()
    torch.testing.assert_close(per_sample_gradients(model, made, labels), expected, rtol=0, atol=0)


class Doubling(torch.autograd.Function):
    """Has a backward that cannot be vectorised."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(2 * gradient.numpy())


def test_a_function_whose_backward_cannot_be_vectorised_is_taken_class_by_class():
    torch.manual_seed(0)
    model = Composed(
        lambda self, x: self.head(Doubling.apply(self.first(x))), first=nn.Linear(3, 5), head=nn.Linear(5, 4)
    )
    model, inputs = model.double(), torch.randn(2, 3, dtype=torch.float64)
    actual = class_scores(model, inputs)
    for label in range(4):
        expected = oracle(model, inputs, 1, log_softmax_of(label))
        torch.testing.assert_close({key: value[1, label] for key, value in actual.items()}, expected, **TOLERANCE)


class Failing(torch.autograd.Function):
    """Has a backward that fails for another reason than that it cannot be vectorised."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Failing.calls += 1
        raise RuntimeError("the disk is full")


def test_a_backward_that_fails_is_not_tried_class_by_class(monkeypatch):
    monkeypatch.setattr(Failing, "calls", 0)
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="the disk is full"):
        pull_back(Failing.apply(leaf), [leaf], torch.ones(4, 3), batched=True)
    assert Failing.calls == 1


@pytest.mark.parametrize(
    ("model", "inputs", "error", "words"),
    [
        (lambda: torch.jit.script(nn.Linear(3, 4)), torch.zeros(2, 3), ModelError, "compiled by torch.jit"),
        (lambda: nn.LazyLinear(4), torch.zeros(2, 3), ModelError, "weight has no shape yet"),
        (lambda: nn.Linear(3, 4, dtype=torch.complex64), torch.zeros(2, 3), ModelError, "weight is complex"),
        (lambda: nn.Linear(3, 4), torch.zeros(0, 3), RequestError, "one sample or more"),
        (lambda: nn.Linear(3, 4), {}, RequestError, "no tensor"),
        (
            lambda: nn.Sequential(nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten()).train(),
            torch.zeros(2, 2, 3),
            ModelError,
            r"'0' \(InstanceNorm1d\) is in train mode",
        ),
        (
            lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
            torch.zeros(2, 3),
            ModelError,
            "SpectralNorm.*train mode",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Complex modules", "ignore:Lazy modules")
def test_what_cannot_be_used_is_refused(model, inputs, error, words):
    with pytest.raises(error, match=words):
        class_scores(model(), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ZOO)
def test_on_a_gpu_the_gradients_are_the_oracles(name):
    model, inputs = build(name, 3)
    labels = [2, 0, 3]
    moved = torch.utils._pytree.tree_map(lambda value: value.cuda(), inputs)
    torch.set_default_device("cuda")  # a network may make tensors of its own
    try:
        actual = per_sample_gradients(model.cuda(), moved, torch.tensor(labels))
        expected = [oracle(model, moved, row, log_softmax_of(label)) for row, label in enumerate(labels)]
    finally:
        torch.set_default_device(None)

    for row, found in enumerate(expected):
        torch.testing.assert_close({key: -value[row] for key, value in actual.items()}, found, **TOLERANCE)
