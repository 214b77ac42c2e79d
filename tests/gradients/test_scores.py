from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fisher_ray import class_scores, per_sample_gradients
from fisher_ray.errors import DataError, ModelError
from fisher_ray.gradients import ScoreEngine, form_gradients
from fisher_ray.gradients.factors import AffineFactors
from tests.gradients.networks import NETWORKS, make
from tests.reference import gradients as reference

TOLERANCE = {"rtol": 1e-10, "atol": 1e-13}
SMALL = "strided grouped dilated"


@pytest.mark.parametrize("name", NETWORKS)
def test_per_sample_gradients_equal_one_backward_per_sample(name):
    model, inputs = make(name, 4)
    targets = torch.arange(4) % 3

    actual = per_sample_gradients(model, inputs, targets)

    torch.testing.assert_close(actual, reference.loop_of_backwards(model, inputs, targets), **TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_class_scores_equal_one_backward_per_sample_and_class(name):
    model, inputs = make(name, 2)

    torch.testing.assert_close(class_scores(model, inputs), reference.loop_of_class_scores(model, inputs), **TOLERANCE)


@pytest.mark.parametrize("name", ["cnn", "mlp", SMALL])
@pytest.mark.parametrize("compute", ["gradients", "scores"])
def test_a_batch_of_1_and_a_batch_of_64_give_the_same_rows(name, compute):
    model, inputs = make(name, 64)
    if compute == "scores" and name == "cnn":
        model[-1] = nn.Linear(2304, 3).double()  # ten classes of 64 samples would take a gigabyte
    targets = torch.arange(64) % 3

    def run(rows):
        if compute == "scores":
            return class_scores(model, inputs[rows])
        return per_sample_gradients(model, inputs[rows], targets[rows])

    together = run(slice(None))
    for row in (0, 17, 63):
        alone = run(slice(row, row + 1))
        torch.testing.assert_close(
            {key: value[row] for key, value in together.items()}, {k: v[0] for k, v in alone.items()}, **TOLERANCE
        )


def test_weighted_scores_sum_to_the_samples_exact_fisher():
    # E_y~p[s sᵀ] = Jᵀ (diag p − p pᵀ) J, from the Jacobian of the logits
    model, inputs = make("mlp", 1)
    parameters = dict(model.named_parameters())

    def logits(values):
        return torch.func.functional_call(model, values, (inputs,))[0]

    jacobian = torch.func.jacrev(logits)(parameters)
    flat = torch.cat([value.flatten(1) for value in jacobian.values()], dim=1).detach()
    p = model(inputs).softmax(dim=1)[0].detach()

    engine = ScoreEngine(model)
    formed = form_gradients(engine.blocks, model, engine.all_classes(inputs))
    rows = torch.cat([value[0].flatten(1) for value in formed.values()], dim=1)  # (C, P)
    torch.testing.assert_close(rows.T @ rows, flat.T @ (torch.diag(p) - torch.outer(p, p)) @ flat)


def test_parameters_of_the_glob_alone_are_taken_and_frozen_networks_work():
    model, inputs = make("cnn", 2)
    model.requires_grad_(False)
    engine = ScoreEngine(model, "conv1.*")

    assert list(engine.block_shapes) == ["conv1"]
    assert engine.block_shapes["conv1"] == (64, 64 * 25 + 1)
    assert len(engine.all_classes(inputs).factors) == 1
    assert ScoreEngine(model, "*.weight").block_shapes["fc"] == (10, 2304)
    assert ScoreEngine(model, "*.bias").block_shapes["conv0"] == (64, 1)


@pytest.mark.parametrize("parameters", ["*.bias", "*.weight", "0.*"])
def test_some_parameters_give_the_same_gradients_as_all(parameters):
    model, inputs = make(SMALL, 3)
    labels = torch.tensor([0, 1, 2])
    everything = per_sample_gradients(model, inputs, labels)
    engine = ScoreEngine(model, parameters)
    formed = form_gradients(engine.blocks, model, engine.of_labels(inputs, labels))
    assert list(formed) == engine.parameters == [name for name in everything if fnmatchcase(name, parameters)]
    for name, value in formed.items():
        torch.testing.assert_close(-value[:, 0], everything[name], **TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_projecting_inputs_equals_projecting_the_unfolded_factor(name):
    model, inputs = make(name, 3)
    for item in ScoreEngine(model).of_labels(inputs, torch.zeros(3, dtype=torch.long)).factors:
        if isinstance(item, AffineFactors):
            basis = torch.randn(item.block.num_inputs, 4, dtype=torch.float64)
            expected = torch.einsum("ai,bat->bit", basis, item.inputs())
            torch.testing.assert_close(item.source.project(basis), expected, **TOLERANCE)
            assert item.source.num_positions == expected.shape[2]


def test_the_last_linear_layers_input_is_the_hidden_layer():
    for name, width in (("cnn", 2304), ("mlp", 8), ("in-place activation after a linear layer", 8), ("mlp", 8)):
        model, inputs = make(name, 2)
        scores = ScoreEngine(model).all_classes(inputs)
        last = list(model.children())[-1]
        assert scores.hidden is not None
        assert scores.hidden.shape == (2, width)
        torch.testing.assert_close(last(scores.hidden), scores.logits)

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    assert ScoreEngine(model).all_classes(torch.zeros(2, 4)).hidden is None


def test_the_network_is_left_as_it_was():
    model, inputs = make("cnn", 2, dtype=torch.float32)
    model.conv0.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]

    class_scores(model, inputs)

    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_scores_can_be_taken_where_gradients_are_switched_off():
    model, inputs = make("mlp", 2)
    expected = class_scores(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(class_scores(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)), ["'1'", "eval()"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), ["'1'", "Dropout", "eval()"]),
        (nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1)), ["'0'", "MultiheadAttention", "eval()"]),
        (nn.Sequential(nn.Flatten()), ["no parameter", "'*'"]),
        (
            nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, affine=False, track_running_stats=False)).eval(),
            ["'1'", "no running statistics", "track_running_stats=True"],
        ),
    ],
    ids=["batch norm", "dropout", "attention", "nothing", "batch norm without statistics"],
)
def test_a_network_that_has_no_per_sample_gradient_is_refused(model, words):
    with pytest.raises(ModelError) as caught:
        ScoreEngine(model)

    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda y: y[:, None], r"is \(2, 1, 3\), not logits of shape \(B, C\)"),
        (lambda y: {"hidden": y}, "output is dict: not a tensor"),
        (lambda y: y.argmax(1), "int64, which has no gradient"),
        (lambda y: y.sum(0), r"is \(3,\): not one row for each sample"),
        (lambda y: y.sum(), r"is \(\): not one row for each sample"),
    ],
    ids=["three axes", "no logits", "integers", "summed", "number"],
)
def test_an_output_that_is_not_logits_is_refused(output, words):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return output(self.layer(x))

    with pytest.raises(ModelError, match=words):
        class_scores(Wrong(), torch.zeros(2, 4))


class Rows(nn.Module):
    """Layers between whose calls a function is applied."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x - x.mean(0), "'first.weight' for a sample depends on the other samples"),
        (lambda x: nn.functional.dropout(x, 0.5, training=True), "do not add up to those of a plain backward.*chance"),
        (lambda x: torch.cat([x, x]) if len(x) > 2 else x, r"is \(6, 3\): not one row for each sample"),
    ],
    ids=["batch mean", "dropout", "more rows"],
)
def test_a_network_whose_rows_depend_on_each_other_or_on_chance_is_refused(function, words):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=words):
        class_scores(Rows(function), torch.randn(4, 4))


def test_a_module_that_cannot_be_vectorised_is_refused_by_its_name():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight if float(x.detach().sum()) > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), Branching(), nn.Linear(4, 3))
    with pytest.raises(ModelError, match=r"layer '1' \(Branching\) .*cannot be vectorised.*\(1\.weight\) out with"):
        class_scores(model, torch.randn(2, 4))
    assert ScoreEngine(model, ["0.weight", "2.bias"]).all_classes(torch.randn(2, 4)).num_scores == 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(checkpoint(self.second, self.first(x), use_reentrant=True))

    with pytest.raises(ModelError, match="use_reentrant=False"):
        class_scores(Checkpointed(), torch.randn(2, 4))


def test_the_way_through_the_layers_may_not_depend_on_the_data():
    class Repeating(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            x = self.layer(x)
            return self.layer(x) if float(x.detach()[0].sum()) > 100 else x

    engine = ScoreEngine(Repeating())
    engine.all_classes(torch.zeros(2, 3))
    with pytest.raises(ModelError, match="'layer' is called more often"):
        engine.all_classes(torch.full((2, 3), 1e4) * engine.model.layer.weight.sum(0).sign())


@pytest.mark.parametrize("targets", [torch.tensor([0, 5]), torch.tensor([0, -1]), torch.tensor([0])])
def test_a_target_out_of_range_is_refused(targets):
    model, inputs = make("mlp", 2)

    with pytest.raises(DataError, match=r"one integer in \[0, 5\)"):
        per_sample_gradients(model, inputs, targets)
