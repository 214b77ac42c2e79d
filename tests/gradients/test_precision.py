"""Networks run in half precision against the same networks in float64, and networks of several dtypes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from fisher_ray.errors import ModelError, RequestError
from fisher_ray.gradients import (
    Compressor,
    Custom,
    GradientBuffer,
    GradientSketch,
    ScoreEngine,
    form_gradients,
    precision_of,
    random_bases,
)
from fisher_ray.gradients.layers import LinearLayer
from fisher_ray.gradients.outputs import call, main_output, rows
from fisher_ray.models import paper_cnn
from tests.gradients.test_zoo import log_softmax_of, oracle
from tests.gradients.zoo import Own, ResidualBlock, build

LABELS = torch.tensor([2, 0, 3, 1])
NETWORKS = [
    "resnet, batch norm",
    "resnet, batch norm, in place",
    "conv2d, grouped, dilated",
    "conv2d, depthwise",
    "transformer encoder",
    "vision transformer",
    "language model, tied",
    "language model, tied by a function",
    "checkpointing",
    "layers that do not see the samples",
    "a module of the user's own",
]
BOUND = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the whole gradient's relative error; the worst of these networks has 1.1e-2 and 2.5e-3."""
HALVES = pytest.mark.parametrize("dtype", BOUND, ids=["bfloat16", "float16"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def double(inputs):
    return tree_map(lambda value: value.double() if value.is_floating_point() else value, inputs)


def single(name):
    """A network of the zoo in float32, and its inputs."""
    model, inputs = build(name, 4)
    return model.float(), tree_map(lambda value: value.float() if value.is_floating_point() else value, inputs)


def exact(model, inputs, labels=LABELS):
    """Float64 gradients by plain backwards, ``(B, P)``."""
    model = copy.deepcopy(model).double()
    found = [oracle(model, double(inputs), row, log_softmax_of(y)) for row, y in enumerate(labels.tolist())]
    return torch.stack([torch.cat([value.flatten() for value in gradients.values()]) for gradients in found])


def flat(engine, scores):
    """``(B, S, P)``, after a look at the dtype."""
    made = form_gradients(engine.blocks, engine.model, scores)
    assert {value.dtype for value in made.values()} == {torch.float32}
    return torch.cat([value.reshape(*value.shape[:2], -1) for value in made.values()], dim=2).double()


def error(made, expected):
    return float((made - expected).norm() / expected.norm())


@HALVES
@pytest.mark.parametrize("name", [*NETWORKS, "cnn"])
def test_gradients_in_half_precision_are_close_to_the_exact_ones(name, dtype):
    torch.manual_seed(0)
    model, inputs = (paper_cnn().eval(), torch.randn(4, 3, 24, 24)) if name == "cnn" else single(name)
    engine = ScoreEngine(model, precision=dtype)
    made = flat(engine, engine.of_labels(inputs, LABELS))[:, 0]

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    bound = 5e-2 if name == "cnn" else BOUND[dtype]  # where rounding decides which entry a maximum is
    assert 1e-5 < error(made, exact(model, inputs)) < bound  # and it is not float32 either
    assert error(made, by_autocast(model, inputs, dtype)) < BOUND[dtype] / 4


def by_autocast(model, inputs, dtype):
    """Gradients by plain backwards of the network under autocast, ``(B, P)``."""
    found = []
    for row, label in enumerate(LABELS.tolist()):
        with torch.autocast("cpu", dtype, cache_enabled=False):
            output = main_output(call(model, rows(inputs, torch.tensor([row]))))[0]
        gradients = torch.autograd.grad(output.float().log_softmax(-1)[label], list(model.parameters()))
        found.append(torch.cat([value.flatten() for value in gradients]))
    return torch.stack(found).double()


@HALVES
@pytest.mark.parametrize("name", ["resnet, batch norm", "transformer encoder", "language model, tied"])
def test_everything_that_is_made_of_a_half_precision_forward_is_float32(name, dtype):
    model, inputs = single(name)
    engine, plain = ScoreEngine(model, precision=dtype), ScoreEngine(model)
    scores, expected = engine.all_classes(inputs), plain.all_classes(inputs)

    assert engine.like.dtype == scores.logits.dtype == torch.float32
    assert scores.hidden is None or scores.hidden.dtype == torch.float32
    for item in scores.factors:
        parts = [value for value in vars(item).values() if isinstance(value, torch.Tensor)]
        parts += [item.source.value] if hasattr(item, "source") else []
        assert {part.dtype for part in parts} <= {torch.float32, torch.int64}
    assert scores.num_scores == expected.num_scores > 1
    assert error(flat(engine, scores), flat(plain, expected)) < BOUND[dtype]


@pytest.mark.parametrize("name", NETWORKS)
def test_compressed_gradients_are_the_formed_ones_compressed(name):
    model, inputs = single(name)
    engine = ScoreEngine(model, precision=torch.bfloat16)
    scores = engine.of_labels(inputs, LABELS)
    bases, sketch = random_bases(engine.blocks, 3, seed=1), GradientSketch(engine.blocks, 17, 1, engine.like)
    projected, sketched = Compressor(bases, engine.blocks, engine.like).compress(scores), sketch.compress(scores)

    filled = GradientBuffer(engine.blocks, model, 4).fill(scores)
    torch.testing.assert_close(filled.double(), flat(engine, scores), **CLOSE)
    products, sketches = [], torch.zeros(4, 17, dtype=torch.float64)
    for block in engine.blocks:
        gradient = torch.zeros(4, block.num_outputs, block.num_inputs, dtype=torch.float64)
        for item in scores.factors:
            gradient += item.gradient()[:, 0] if item.block.name == block.name else 0
        basis = bases[block.name]
        product = basis.inputs.double().T @ gradient.transpose(1, 2) @ basis.outputs.double()
        products.append(product.flatten(1))
        sketches += gradient.flatten(1) @ sketch.matrix(block).double()
    torch.testing.assert_close(projected[:, 0].double(), torch.cat(products, dim=1), **CLOSE)
    torch.testing.assert_close(sketched[:, 0].double(), sketches, **CLOSE)


@HALVES
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sample_by_itself_has_the_same_gradient_up_to_rounding(name, dtype):
    model, inputs = single(name)
    engine = ScoreEngine(model, precision=dtype)
    together = flat(engine, engine.of_labels(inputs, LABELS))
    alone = [
        flat(engine, engine.of_labels(rows(inputs, torch.tensor([row])), LABELS[row : row + 1])) for row in range(4)
    ]
    for row, made in enumerate(alone):
        assert error(together[row : row + 1], made) < BOUND[dtype]


@HALVES
def test_a_use_of_a_parameter_that_is_missed_is_noticed(dtype, monkeypatch):
    factors, seen = LinearLayer.factors, []

    def wrong(self, part, value, delta):
        seen.append(self.name)
        return factors(self, part, value, 0 * delta if seen.count("layer") % 3 == 0 else delta)

    monkeypatch.setattr(LinearLayer, "factors", wrong)
    model, inputs = single("a module used three times")
    with pytest.raises(ModelError, match=r"parameter 'layer\.(weight|bias)' do not add up"):
        ScoreEngine(model, precision=dtype).of_labels(inputs, LABELS)


@pytest.mark.parametrize("name", ["conv2d, grouped, dilated", "transformer encoder", "language model, tied"])
def test_small_scores_do_not_vanish_in_float16(name):
    """Steps of float16 are 6e-8 at least, which is as much as the scores' own starting points."""

    def small(output, labels):
        return 1e-7 * output.log_softmax(1).gather(1, labels[:, None])[:, 0]

    model, inputs = single(name)
    engine = ScoreEngine(model, likelihood=Custom(small), precision=torch.float16)
    expected = 1e-7 * exact(model, inputs)
    assert error(flat(engine, engine.of_labels(inputs, LABELS))[:, 0], expected) < BOUND[torch.float16]
    engine.precision = replace(engine.precision, has_float16=False)
    assert error(flat(engine, engine.of_labels(inputs, LABELS))[:, 0], expected) > 0.1


def test_samples_of_a_batch_are_rescaled_by_themselves():
    engine = ScoreEngine(nn.Linear(3, 2), precision=torch.float16)
    given = torch.tensor([[[1e-9, 0.0], [3.0, -70.0], [0.0, 0.0], [float("nan"), 1.0]]])
    made, scales = engine.precision.rescaled(given)
    assert scales.log2().frac().count_nonzero() == 0
    assert bool(((made[:, :2].abs().amax(2) >= 8) & (made[:, :2].abs().amax(2) < 16)).all())
    torch.testing.assert_close(made * scales[..., None], given, rtol=0, atol=0, equal_nan=True)
    assert ScoreEngine(nn.Linear(3, 2), precision=torch.bfloat16).precision.rescaled(given)[1] is None


@HALVES
def test_an_autocast_from_outside_has_no_effect(dtype):
    model, inputs = single("vision transformer")
    for precision in (None, dtype):
        expected = flat(*(engine := ScoreEngine(model, precision=precision), engine.of_labels(inputs, LABELS)))
        with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float16 else torch.float16):
            scores = ScoreEngine(model, precision=precision).of_labels(inputs, LABELS)
        torch.testing.assert_close(flat(engine, scores), expected, rtol=0, atol=0)
        assert not torch.is_autocast_enabled("cpu")


class Cast(nn.Module):
    """Casts to the dtype that the layers after it have, as networks of several dtypes do."""

    def __init__(self, dtype):
        super().__init__()
        self.like = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)

    def forward(self, x):
        return x.to(self.like.dtype)


def half_batch_norm():
    block = ResidualBlock(3, 3, nn.BatchNorm2d)
    nn.init.uniform_(block.norm1.running_mean, -1, 1)
    return nn.Sequential(
        nn.Conv2d(3, 3, 3), Cast(torch.bfloat16), block.bfloat16(), nn.Flatten(), nn.Linear(108, 4).bfloat16()
    )


MIXED = {
    "half layers inside": lambda: nn.Sequential(
        nn.Linear(5, 6),
        Cast(torch.bfloat16),
        nn.Linear(6, 6).bfloat16(),
        nn.LayerNorm(6).bfloat16(),
        Cast(torch.float32),
        nn.Tanh(),
        nn.Linear(6, 4),
    ),
    "half to the end": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), Cast(torch.bfloat16), nn.Linear(6, 4).bfloat16()
    ),
    "float16 inside": lambda: nn.Sequential(
        nn.Linear(5, 6), Cast(torch.float16), nn.Linear(6, 6).half(), Cast(torch.float32), nn.Tanh(), nn.Linear(6, 4)
    ),
    "half module of the user's own": lambda: nn.Sequential(
        nn.Linear(5, 5), Cast(torch.bfloat16), Own().bfloat16(), Cast(torch.float32), nn.Linear(5, 4)
    ),
    "all of it": lambda: nn.Sequential(
        Cast(torch.bfloat16), *nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).bfloat16()
    ),
    "half batch norm": half_batch_norm,
}


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MIXED)
def test_a_network_of_several_dtypes_has_float32_gradients(name, precision):
    torch.manual_seed(0)
    model = MIXED[name]().eval()
    inputs = torch.randn(4, 3, 8, 8) if name == "half batch norm" else torch.randn(4, 5)
    engine = ScoreEngine(model, precision=precision)
    scores = engine.of_labels(inputs, LABELS)

    assert scores.logits.dtype == torch.float32
    assert GradientBuffer(engine.blocks, model, 4).fill(scores).dtype == torch.float32
    assert error(flat(engine, scores)[:, 0], exact(model, inputs)) < BOUND[torch.bfloat16]
    assert engine.all_classes(inputs).num_scores == 4


def test_a_network_that_is_partly_float64_has_float64_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Cast(torch.float64), nn.Linear(6, 4).double())
    engine, inputs = ScoreEngine(model), torch.randn(4, 5)
    scores = engine.of_labels(inputs, LABELS)
    made = form_gradients(engine.blocks, model, scores)

    assert engine.like.dtype == scores.logits.dtype == torch.float64
    assert {value.dtype for value in made.values()} == {torch.float64}
    joined = torch.cat([value.flatten(1) for value in made.values()], dim=1)
    assert error(joined, exact(model, inputs)) < 1e-6


def test_a_precision_that_there_is_not_is_refused():
    with pytest.raises(RequestError, match=r"precision 'half' is not one of float32, bfloat16, float16"):
        precision_of("half")
    assert [precision_of(name) for name in ("float32", "float16")] == [None, torch.float16]
    with pytest.raises(RequestError, match=r"precision torch\.int8 is not one of None, torch\.bfloat16"):
        ScoreEngine(nn.Linear(3, 2), precision=torch.int8)
    with pytest.raises(ModelError, match=r"float64 parameters.*model\.float\(\)"):
        ScoreEngine(nn.Linear(3, 2).double(), precision=torch.bfloat16)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(4, 5), inner, nn.Linear(5, 4)

    def forward(self, x):
        return self.after(self.inner(torch.tanh(self.before(x))))


class Casting(nn.Module):
    """Casts by itself, and leaves the rest to autocast."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) / 3)

    def forward(self, x):
        return nn.functional.linear(x.bfloat16(), self.weight)


class Table(Casting):
    """Has a table of few digits."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(5, 5).bfloat16())

    def forward(self, x):
        return x @ self.table @ self.weight


class AlwaysHalf(Casting):
    """Has few digits whatever autocast says."""

    def forward(self, x):
        return torch.ops.aten.mm(x.bfloat16(), self.weight.bfloat16()).float()


@HALVES
@pytest.mark.parametrize("inner", [Casting, Table, AlwaysHalf])
def test_a_module_with_few_digits_of_its_own_works_where_the_network_has_few(inner, dtype):
    torch.manual_seed(0)
    model, inputs = Around(inner()), torch.randn(4, 4)
    made = flat(ScoreEngine(model, precision=dtype), ScoreEngine(model, precision=dtype).of_labels(inputs, LABELS))
    parameters = list(model.parameters())
    for row, found in enumerate(made[:, 0]):
        with torch.autocast("cpu", dtype):
            score = model(inputs[row : row + 1]).log_softmax(-1)[0, LABELS[row]]
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(score, parameters)])
        assert (found - gradient).norm() <= 0.05 * gradient.norm()


class NotVectorised(torch.autograd.Function):
    """The identity; its backward takes few digits only one sample at a time, as some of a GPU's kernels do."""

    @staticmethod
    def forward(value):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def vmap(info, in_dims, value):
        if value.dtype in BOUND:
            raise RuntimeError("no kernel for half precision")
        return value.clone(), in_dims[0]


class Stubborn(Casting):
    """Calls it on what autocast has made half."""

    calls = 0

    def forward(self, x):
        Stubborn.calls += 1
        return NotVectorised.apply(nn.functional.linear(x, self.weight))


@HALVES
def test_a_module_that_cannot_be_vectorised_in_few_digits_is_in_all_and_tried_but_once(dtype):
    torch.manual_seed(0)
    model, inputs = Around(Stubborn()), torch.randn(4, 4)
    engine = ScoreEngine(model, precision=dtype)
    made = flat(engine, engine.of_labels(inputs, LABELS))[:, 0]
    assert error(made, exact(model, inputs)) <= BOUND[dtype]
    before = Stubborn.calls
    engine.of_labels(inputs, LABELS)
    assert Stubborn.calls == before + 2  # the network's, and one alone


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, *BOUND], ids=["float32", "bfloat16", "float16"])
def test_on_a_gpu_a_deep_network_is_not_refused_for_its_few_digits(dtype):
    """Two sizes of a batch have two kernels there, with TF32 in them by default."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(24):
        layers += [nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
        nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).cuda()
    before = torch.backends.cudnn.conv.fp32_precision
    engine = ScoreEngine(model, precision=dtype)
    scores = engine.of_labels(torch.randn(4, 3, 32, 32).cuda(), LABELS.cuda())
    assert flat(engine, scores).isfinite().all()
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu_gradients_in_half_precision_are_close_to_the_exact_ones(name, dtype):
    model, inputs = single(name)
    expected = exact(model, inputs)
    moved = tree_map(lambda value: value.cuda(), inputs)
    torch.set_default_device("cuda")  # a network may make tensors of its own
    try:
        engine = ScoreEngine(model.cuda(), precision=dtype)
        made = flat(engine, engine.of_labels(moved, LABELS.cuda()))[:, 0].cpu()
    finally:
        torch.set_default_device(None)
    assert 1e-5 < error(made, expected) < BOUND[dtype]
