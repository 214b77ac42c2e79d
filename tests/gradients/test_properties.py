"""Laws: a row is a function of its sample alone, and any layer's geometry gives the oracle's gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_ray import per_sample_gradients
from fisher_ray.gradients import Compressor, GradientSketch, ScoreEngine, random_bases
from fisher_ray.gradients.outputs import rows
from tests.gradients.test_zoo import log_softmax_of, oracle
from tests.gradients.zoo import ZOO, build

SAMPLES = 6


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(ZOO)), order=st.permutations(range(SAMPLES)), cut=st.integers(1, SAMPLES - 1))
def test_neither_a_batchs_split_nor_its_order_changes_a_row(name, order, cut):
    model, inputs = build(name, SAMPLES)
    engine, labels, index = ScoreEngine(model), torch.arange(SAMPLES) % 3, torch.tensor(order)
    compressor = Compressor(random_bases(engine.blocks, 4, 0), engine.blocks, torch.zeros((), dtype=torch.float64))
    sketch = GradientSketch(engine.blocks, 19, 0, torch.zeros((), dtype=torch.float64))

    def compressed(part):
        scores = engine.of_labels(rows(inputs, part), labels[part])
        every = engine.all_classes(rows(inputs, part))
        return [compressor.compress(scores), sketch.compress(scores), compressor.compress(every)]

    together = compressed(torch.arange(SAMPLES))
    first, second = compressed(index[:cut]), compressed(index[cut:])
    for whole, one, two in zip(together, first, second, strict=True):
        torch.testing.assert_close(torch.cat([one, two]), whole[index], rtol=1e-12, atol=1e-12)


@st.composite
def convolutions(draw):
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 2)) for _ in range(axes)]
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    stride = [1 if same else draw(st.integers(1, 3)) for _ in range(axes)]
    padding = "same" if same else [draw(st.integers(0, 2)) for _ in range(axes)]
    size = [(k - 1) * d + draw(st.integers(1, 4)) + 2 for k, d in zip(kernel, dilation, strict=True)]
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1]
    width_in, width_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    return kind(width_in, width_out, kernel, bias=draw(st.booleans()), **options), (width_in, *size)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=80)
@given(drawn=convolutions())
def test_a_convolution_of_any_geometry_has_the_oracles_gradients(drawn):
    conv, shape = drawn
    torch.manual_seed(0)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double().eval()
    inputs = torch.randn(2, *shape, dtype=torch.float64)
    model(inputs)
    check(model, inputs)


@settings(max_examples=40)
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    bias=st.booleans(),
    norm=st.sampled_from([None, nn.LayerNorm, nn.RMSNorm]),
)
def test_a_linear_layer_over_any_leading_axes_has_the_oracles_gradients(leading, sizes, bias, norm):
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes, bias=bias), *([norm(sizes[1])] if norm else []), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.LazyLinear(3)).double().eval()
    inputs = torch.randn(2, *leading, sizes[0], dtype=torch.float64)
    model(inputs)
    check(model, inputs)


def check(model, inputs):
    actual = per_sample_gradients(model, inputs, torch.tensor([0, 2]))
    for row, label in enumerate((0, 2)):
        expected = oracle(model, inputs, row, log_softmax_of(label))
        found = {key: -value[row] for key, value in actual.items()}
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
