import pytest
import torch

from fisher_ray.errors import ModelError, RequestError
from fisher_ray.gradients import Compressor, GradientSketch, ScoreEngine, random_basis, square_norms
from fisher_ray.records import LayerBasis, LayerSketch
from tests.gradients.networks import NETWORKS, make
from tests.reference import gradients as reference


def random_bases(engine: ScoreEngine, num_kept: int) -> dict[str, LayerBasis]:
    generator = torch.Generator().manual_seed(1)
    bases = {}
    for name, (num_outputs, num_inputs) in engine.block_shapes.items():
        inputs = torch.randn(num_inputs, min(5, num_inputs), generator=generator, dtype=torch.float64)
        outputs = torch.randn(num_outputs, min(4, num_outputs), generator=generator, dtype=torch.float64)
        j = torch.randint(0, outputs.shape[1], (num_kept,), generator=generator)
        i = torch.randint(0, inputs.shape[1], (num_kept,), generator=generator)
        bases[name] = LayerBasis(name, inputs, outputs, torch.stack([j, i], dim=1))
    return bases


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("labels", ["all", "one"])
def test_coordinates_are_the_gradient_between_two_basis_vectors(name, labels):
    model, inputs = make(name, 3)
    engine = ScoreEngine(model)
    bases = random_bases(engine, 7)
    scores = engine.all_classes(inputs) if labels == "all" else engine.of_labels(inputs, torch.tensor([0, 1, 2]))

    compressor = Compressor(bases, engine.blocks, inputs)
    actual = compressor.compress(scores)

    parts = []
    for block, basis in bases.items():
        gradient = sum(item.gradient() for item in scores.factors if item.block.name == block)
        if isinstance(gradient, int):  # a layer that the forward does not reach
            parts.append(torch.zeros(*actual.shape[:2], 7, dtype=torch.float64))
            continue
        both = torch.einsum("bsoa,oj,ai->bsji", gradient, basis.outputs, basis.inputs)
        parts.append(both[:, :, basis.pairs[:, 0], basis.pairs[:, 1]])
    assert compressor.dim == 7 * len(bases)
    torch.testing.assert_close(actual, torch.cat(parts, dim=2), rtol=1e-10, atol=1e-12)


def sketches(engine: ScoreEngine, dim: int | None, share: float = 1.0) -> dict[str, LayerSketch]:
    """Each block in ``dim`` numbers, or as many as it has entries."""
    found = {}
    for name, (num_outputs, num_inputs) in engine.block_shapes.items():
        size = num_outputs * num_inputs
        fewer = dim is not None and dim < size
        found[name] = LayerSketch(name, (num_outputs, num_inputs), dim if fewer else size, 5 if fewer else None, share)
    return found


def blocks_of(engine: ScoreEngine, scores) -> dict[str, torch.Tensor]:
    """Each block's gradients ``(B, S, O, A)``, formed one call after the other."""
    found = {}
    for block in engine.blocks:
        calls = [item.gradient() for item in scores.factors if item.block.name == block.name]
        zero = torch.zeros(len(scores.logits), scores.num_scores, block.num_outputs, block.num_inputs).double()
        found[block.name] = sum(calls, start=zero)
    return found


def test_every_entry_in_its_place_is_the_whole_gradient():
    model, inputs = make("strided grouped dilated", 3)
    engine = ScoreEngine(model)

    compressed = Compressor(sketches(engine, None), engine.blocks, inputs).compress(engine.all_classes(inputs))

    expected = reference.weighted_scores(model, inputs)
    assert compressed.shape == expected.shape
    torch.testing.assert_close(compressed @ compressed.transpose(1, 2), expected @ expected.transpose(1, 2))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "cnn"])  # its sketch as a matrix is large
@pytest.mark.parametrize("share", [1.0, 0.15])
@pytest.mark.parametrize("dim", [None, 6])
def test_a_layers_sketch_is_that_of_its_gradient_or_of_the_largest_entries(name, share, dim):
    model, inputs = make(name, 3)
    engine = ScoreEngine(model)
    scores, bases = engine.all_classes(inputs), sketches(engine, dim, share)
    actual = Compressor(bases, engine.blocks, inputs).compress(scores)

    start = 0
    for block in engine.blocks:
        flat, basis = blocks_of(engine, scores)[block.name].flatten(2), bases[block.name]
        kept = max(1, int(share * flat.shape[2]))
        threshold = flat.abs().sort(dim=2, descending=True).values[:, :, kept - 1 : kept]
        expected = torch.where(flat.abs() >= threshold, flat, 0)
        if basis.seed is not None:
            expected = expected @ GradientSketch(engine.blocks, basis.dim, basis.seed, inputs).matrix(block)
        torch.testing.assert_close(actual[:, :, start : start + basis.dim], expected, rtol=1e-10, atol=1e-12)
        start += basis.dim
    assert start == actual.shape[2]


@pytest.mark.parametrize("kind", ["two-sided", "sketch", "whole"])
def test_the_way_back_is_the_adjoint_of_the_compression(kind):
    model, inputs = make("strided grouped dilated", 3)
    engine = ScoreEngine(model)
    bases = random_bases(engine, 7) if kind == "two-sided" else sketches(engine, 6 if kind == "sketch" else None)
    compressor, scores = Compressor(bases, engine.blocks, inputs), engine.all_classes(inputs)
    if kind == "two-sided":  # a pair that is drawn twice counts once on the way back
        bases = {name: LayerBasis(name, b.inputs, b.outputs, b.pairs.unique(dim=0)) for name, b in bases.items()}
        compressor = Compressor(bases, engine.blocks, inputs)
    compressed = compressor.compress(scores)
    others = torch.randn(compressed.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    left = (compressed * others).sum()
    right = sum((blocks_of(engine, scores)[name] * compressor.transpose(name, others)).sum() for name in bases)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    for block in engine.blocks:
        again = compressor.compress_gradient(block, blocks_of(engine, scores)[block.name])
        torch.testing.assert_close(again, compressed[:, :, compressor.places[block.name]], rtol=1e-10, atol=1e-12)


def test_the_largest_entries_have_no_way_back():
    model, inputs = make("mlp", 2)
    engine = ScoreEngine(model)
    compressor = Compressor(sketches(engine, 6, 0.15), engine.blocks, inputs)
    with pytest.raises(RequestError, match="topk"):
        compressor.transpose(engine.blocks[0].name, torch.zeros(compressor.dim).double())


@pytest.mark.parametrize("name", NETWORKS)
def test_squared_norms_by_layer_are_those_of_the_gradients(name):
    model, inputs = make(name, 3)
    engine = ScoreEngine(model)
    scores = engine.all_classes(inputs)
    found = square_norms(scores)
    for block, gradient in blocks_of(engine, scores).items():
        assert found.get(block, 0.0) == pytest.approx(float(gradient.square().sum()), rel=1e-10)


def test_a_random_basis_keeps_a_short_side_as_it_is():
    engine = ScoreEngine(make("mlp", 1)[0])
    block = engine.blocks[0]
    basis = random_basis(block, 3, 999, 0)
    assert (basis.inputs.shape[1], torch.equal(basis.outputs, torch.eye(block.num_outputs))) == (3, True)
    assert basis.dim == 3 * block.num_outputs


def test_bases_of_another_network_are_refused():
    model, inputs = make("mlp", 2)
    other, _ = make("mlp", 2)
    other[-1] = torch.nn.Linear(4, 3).double()

    with pytest.raises(ModelError, match="fitted on another network"):
        Compressor(sketches(ScoreEngine(other), None), ScoreEngine(model).blocks, inputs)
