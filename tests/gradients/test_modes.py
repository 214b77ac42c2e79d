"""Exact, compressed and sketched gradients against the oracle's gradient, compressed by hand."""

import pytest
import torch
from torch import nn

from fisher_ray import class_scores
from fisher_ray.errors import RequestError
from fisher_ray.gradients import (
    Compressor,
    GradientBuffer,
    GradientSketch,
    LargestEntries,
    ScoreEngine,
    random_bases,
)
from fisher_ray.gradients.outputs import call, main_output, rows
from tests.gradients.test_zoo import log_softmax_of, oracle
from tests.gradients.zoo import ZOO, build

TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}
LABELS = torch.tensor([2, 0, 3])


def by_block(engine, model, inputs, row, score):
    """The oracle's gradients as each block's ``(O, A)``."""
    gradients, found = oracle(model, inputs, row, score), {}
    for block in engine.blocks:
        columns = []
        for piece in block.pieces:
            part = gradients[piece.parameter]
            part = part if piece.rows is None else part[piece.rows]
            columns.append(part.T if piece.transposed else part.reshape(block.num_outputs, -1))
        found[block.name] = torch.cat(columns, dim=1)
    return found


@pytest.mark.parametrize("name", ZOO)
def test_the_buffer_holds_the_oracles_gradients_batch_after_batch(name):
    model, inputs = build(name, 3)
    engine = ScoreEngine(model)
    buffer = GradientBuffer(engine.blocks, model, 4)
    buffer._buffer.fill_(torch.nan)  # what is not written shows
    buffer.fill(engine.of_labels(rows(inputs, torch.arange(2)), LABELS.flip(0)[:2]))
    made = buffer.fill(engine.of_labels(inputs, LABELS))

    assert made.shape == (3, 1, buffer.num_parameters)
    assert made.data_ptr() == buffer._buffer.data_ptr()
    for row, label in enumerate(LABELS.tolist()):
        expected = oracle(model, inputs, row, log_softmax_of(label))
        assert list(buffer.offsets) == list(expected)
        flat = torch.cat([value.flatten() for value in expected.values()])
        torch.testing.assert_close(made[row, 0], flat, **TOLERANCE)


@pytest.mark.parametrize("name", ["resnet, batch norm", "conv3d, grouped, dilated", "language model, tied"])
def test_the_buffer_holds_the_scores_of_all_classes(name):
    model, inputs = build(name, 2)
    engine, expected = ScoreEngine(model), class_scores(model, inputs)
    num_classes = main_output(call(model, inputs)).shape[1]
    buffer = GradientBuffer(engine.blocks, model, 2, num_classes)

    made = buffer.fill(engine.all_classes(inputs, weighted=False))
    torch.testing.assert_close(made, torch.cat([value.flatten(2) for value in expected.values()], 2), **TOLERANCE)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("targets", ["one", "all"])
def test_projections_and_sketches_are_those_of_the_oracles_gradient(name, targets):
    model, inputs = build(name, 3)
    engine = ScoreEngine(model)
    bases = random_bases(engine.blocks, 3, seed=1)
    sketch = GradientSketch(engine.blocks, 17, seed=1, like=torch.zeros((), dtype=torch.float64))
    scores = engine.of_labels(inputs, LABELS) if targets == "one" else engine.all_classes(inputs, weighted=False)
    projected, sketched = Compressor(bases, engine.blocks, scores.logits).compress(scores), sketch.compress(scores)

    num_classes = main_output(call(model, inputs)).shape[1]
    for row, label in enumerate(LABELS.tolist()):
        for place, target in enumerate([label] if targets == "one" else range(num_classes)):
            gradients = by_block(engine, model, inputs, row, log_softmax_of(target))
            parts = [bases[key].inputs.double().T @ g.T @ bases[key].outputs.double() for key, g in gradients.items()]
            torch.testing.assert_close(projected[row, place], torch.cat([p.flatten() for p in parts]), **TOLERANCE)
            parts = [gradients[block.name].flatten() @ sketch.matrix(block) for block in engine.blocks]
            torch.testing.assert_close(sketched[row, place], sum(parts), **TOLERANCE)


@pytest.mark.parametrize("name", ["resnet, group norm", "language model, tied", "layers not reached"])
def test_the_largest_entries_are_the_oracles(name):
    model, inputs = build(name, 3)
    engine = ScoreEngine(model)
    largest = LargestEntries(engine.blocks, 0.15)
    values, coordinates = largest.compress(engine.of_labels(inputs, LABELS))

    assert values.shape == coordinates.shape == (3, 1, largest.num_kept)
    for row, label in enumerate(LABELS.tolist()):
        blocks = by_block(engine, model, inputs, row, log_softmax_of(label))
        dense = torch.zeros(largest.dim, dtype=torch.float64).scatter(0, coordinates[row, 0].long(), values[row, 0])
        start = 0
        for gradient in blocks.values():
            flat, mine = gradient.flatten(), dense[start : start + gradient.numel()]
            kept = max(1, int(0.15 * len(flat)))
            threshold = flat.abs().sort(descending=True).values[kept - 1]
            torch.testing.assert_close(mine, torch.where(flat.abs() >= threshold, flat, 0), **TOLERANCE)
            start += len(flat)


def test_dot_products_of_sketches_and_projections_are_unbiased():
    model, inputs = build("norms of vectors", 3)
    engine = ScoreEngine(model)
    scores = engine.of_labels(inputs, LABELS)
    full = GradientBuffer(engine.blocks, model, 3).fill(scores)[:, 0]
    exact = full @ full.T
    sums = {"sketch": torch.zeros(400, 3, 3), "projection": torch.zeros(400, 3, 3)}
    for seed in range(400):
        made = GradientSketch(engine.blocks, 16, seed, scores.logits).compress(scores)[:, 0]
        sums["sketch"][seed] = made @ made.T
        made = Compressor(random_bases(engine.blocks, 3, seed), engine.blocks, scores.logits).compress(scores)[:, 0]
        sums["projection"][seed] = made @ made.T
    for values in sums.values():
        error = (values.mean(0) - exact) / (values.std(0) / 20)
        assert float(error.abs().max()) < 4.5
        assert float((values.mean(0) - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_a_sketch_places_every_coordinate_once_with_a_sign():
    model, _ = build("resnet, group norm", 1)
    engine = ScoreEngine(model)
    for dim in (5, 16, 4096):
        sketch = GradientSketch(engine.blocks, dim, 0, torch.zeros((), dtype=torch.float64))
        for block in engine.blocks:
            matrix = sketch.matrix(block)
            assert torch.equal(matrix.abs().sum(1), torch.ones(len(matrix), dtype=torch.float64))
            assert set(matrix.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_a_batch_that_does_not_fit_the_buffer_is_refused():
    model, inputs = build("norms of vectors", 3)
    engine = ScoreEngine(model)
    with pytest.raises(RequestError, match="fit a buffer for 2"):
        GradientBuffer(engine.blocks, model, 2).fill(engine.of_labels(inputs, LABELS))
    with pytest.raises(RequestError, match="num_scores"):
        GradientBuffer(engine.blocks, model, 4).fill(engine.all_classes(inputs))


def test_a_wide_layers_gradient_is_never_formed_when_it_is_compressed(monkeypatch):
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 10, bias=False))
    engine, inputs = ScoreEngine(model), torch.randn(8, 4096)
    bases = random_bases(engine.blocks, 64, 0)
    compressor = Compressor(bases, engine.blocks, inputs)
    sketch = GradientSketch(engine.blocks, 4096, 0, inputs)
    labels = torch.zeros(8, dtype=torch.long)
    engine.of_labels(inputs[:2], labels[:2])  # what is done once
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with Sizes():
        scores = engine.of_labels(inputs, labels)
        compressor.compress(scores)
        sketch.compress(scores)
    assert max(sizes) <= 4096 * 4096  # the weight itself; eight gradients of it would be eight times as many
