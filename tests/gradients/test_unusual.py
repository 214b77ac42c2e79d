"""Networks and inputs that are easily mistaken for usual ones: right, or refused by name."""

import pytest
import torch
from torch import nn

from fisher_ray import class_scores, per_sample_gradients
from fisher_ray.errors import DataError, ModelError
from fisher_ray.gradients import Bernoulli, ScoreEngine
from fisher_ray.gradients.forming import form_gradients


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def one_by_one(model, inputs, targets, call=None):
    """Each sample's gradient of its log-likelihood by a backward of its own."""
    found = []
    for row, target in enumerate(targets):
        output = model(inputs[row : row + 1]) if call is None else call(row)
        loss = -nn.functional.cross_entropy(output, target[None])
        names, values = zip(*model.named_parameters(), strict=True)
        pulled = torch.autograd.grad(loss, values, allow_unused=True)
        zeros = (torch.zeros_like(v) if p is None else p for v, p in zip(values, pulled, strict=True))
        found.append(dict(zip(names, zeros, strict=True)))
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}


def assert_equal(made, wanted):
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, rtol=1e-10, atol=1e-12, msg=name)


class Prototypes(nn.Module):
    """Classes by distances to learned centres; torch vectorises the distances' backward over cotangents wrongly."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(5, 3)
        self.centres = nn.Parameter(torch.randn(5, 4))

    def forward(self, inputs):
        return self.last(torch.exp(-torch.cdist(self.first(inputs), self.centres)))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_all_classes_of_learned_prototypes(batch):
    model, inputs = Prototypes(), torch.randn(batch, 6)
    made = class_scores(model, inputs)
    for label in range(3):
        targets = torch.full((batch,), label)
        assert_equal({name: value[:, label] for name, value in made.items()}, one_by_one(model, inputs, targets))


class Exits(nn.Module):
    """Easy samples leave early; the others go through one more layer, which a batch without them does not call."""

    def __init__(self):
        super().__init__()
        self.first, self.more, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs):
        hidden, hard = torch.tanh(self.first(inputs)), inputs[:, 0] > 0
        if hard.any():
            hidden = torch.where(hard[:, None], torch.tanh(self.more(hidden)), hidden)
        return self.last(hidden)


def test_a_layer_that_only_later_rows_reach_is_refused():
    model, inputs = Exits(), torch.randn(16, 6)
    inputs[:, 0] = torch.linspace(-2, 1, 16)
    with pytest.raises(ModelError, match=r"'more'.*depends on its data"):
        per_sample_gradients(model, inputs, torch.zeros(16, dtype=torch.int64))
    engine = ScoreEngine(model)
    engine.all_classes(inputs[:4])
    with pytest.raises(ModelError, match="'more'"):
        engine.all_classes(inputs)
    targets, rest = torch.arange(16) % 3, ScoreEngine(model, "last*")
    rest = form_gradients(rest.blocks, model, rest.of_labels(inputs, targets))
    rest, wanted = {name: value[:, 0] for name, value in rest.items()}, one_by_one(model, inputs, targets)
    assert_equal(rest, {name: value for name, value in wanted.items() if name.startswith("last")})


class Capacity(nn.Module):
    """Each expert takes a share of the batch, and two at least; what is above is dropped."""

    def __init__(self):
        super().__init__()
        self.route, self.experts, self.last = nn.Linear(6, 2), nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, inputs):
        weights = self.route(inputs).softmax(1)
        chosen = nn.functional.one_hot(weights.argmax(1), 2)
        kept = chosen * (chosen.cumsum(0) <= max(2, len(inputs) // 8))
        hidden = self.experts(inputs).reshape(-1, 2, 4)
        return self.last((hidden * (kept * weights)[:, :, None]).sum(1))


def test_rows_that_depend_on_each_other_only_in_larger_batches_are_refused():
    model, inputs = Capacity(), torch.randn(16, 6)
    engine = ScoreEngine(model)
    engine.all_classes(inputs[:2])  # of two, none is dropped
    with pytest.raises(ModelError, match="a batch and its halves differ"):
        engine.all_classes(inputs)


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})

    def forward(self, x, task, extra):
        return self.heads[task](x + extra[0])


def test_inputs_that_choose_the_way_and_nested_ones():
    model, inputs, more = Tasks(), torch.randn(4, 6), torch.randn(4, 6)
    engine, targets = ScoreEngine(model), torch.tensor([0, 1, 2, 1])
    for task in "aaaaaab":
        given = {"x": inputs, "task": task, "extra": [more]}

        def call(row, task=task):
            return model(inputs[row : row + 1], task, [more[row : row + 1]])

        scores = engine.of_labels(given, targets)
        made = {name: value[:, 0] for name, value in form_gradients(engine.blocks, model, scores).items()}
        assert_equal(made, one_by_one(model, inputs, targets, call))


class Turned(nn.Module):
    """Layers whose samples are not on the first axis."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(6, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.flat = nn.Conv2d(6, 4, 1)

    def forward(self, inputs):
        hidden = self.conv(inputs.T) + self.flat(inputs.T[None, :, :, None])[0, :, :, 0]  # samples as positions
        return self.last(torch.tanh(self.norm(hidden[None])[0]).T)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_samples_on_another_axis_than_the_first(batch):
    model, inputs = Turned().eval(), torch.randn(batch, 6)
    targets = torch.arange(batch) % 3
    made = per_sample_gradients(model, inputs, targets)
    assert_equal({name: -value for name, value in made.items()}, one_by_one(model, inputs, targets))


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.fixed, self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, inputs):
        with torch.inference_mode():
            offset = self.fixed(inputs)
        return self.last(torch.tanh(self.first(inputs + offset.clone())))


def test_a_layer_in_inference_mode_gives_zeros():
    model, inputs, targets = Apart(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    made = per_sample_gradients(model, inputs, targets)
    assert not made["fixed.weight"].any()
    assert_equal({name: -value for name, value in made.items()}, one_by_one(model, inputs, targets))


def test_a_network_that_went_back_to_train_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
    engine = ScoreEngine(model)
    engine.all_classes(torch.randn(4, 6))
    model.train()
    with pytest.raises(ModelError, match="train mode"):
        engine.all_classes(torch.randn(4, 6))


@pytest.mark.parametrize("targets", [torch.tensor([0.5, 1.0]), torch.tensor([True, False])])
def test_labels_that_are_no_integers_are_refused(targets):
    with pytest.raises(DataError, match="dtype"):
        per_sample_gradients(nn.Linear(6, 3), torch.randn(2, 6), targets)


@pytest.mark.parametrize("wrong", [-1.0, 7.0, float("nan")])
def test_numbers_that_are_neither_no_nor_yes_are_refused(wrong):
    engine, targets = ScoreEngine(nn.Linear(6, 3), likelihood=Bernoulli()), torch.tensor([[0.0, 1, 0.2], [1, 0, wrong]])
    with pytest.raises(DataError, match="from 0, no, to 1, yes"):
        engine.of_labels(torch.randn(2, 6), targets)
