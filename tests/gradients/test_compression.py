import pytest
import torch

from fisher_ray.errors import ModelError
from fisher_ray.gradients import KroneckerCompressor, ScoreEngine
from fisher_ray.metric import identity_bases
from fisher_ray.records import LayerBasis
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

    compressor = KroneckerCompressor(bases, inputs)
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


def test_the_identity_basis_keeps_every_gradient_entry():
    model, inputs = make("strided grouped dilated", 3)
    engine = ScoreEngine(model)

    compressed = KroneckerCompressor(identity_bases(engine.block_shapes), inputs).compress(engine.all_classes(inputs))

    expected = reference.weighted_scores(model, inputs)
    assert compressed.shape == expected.shape
    torch.testing.assert_close(compressed @ compressed.transpose(1, 2), expected @ expected.transpose(1, 2))


def test_a_basis_of_another_network_is_refused():
    model, inputs = make("mlp", 2)
    other, _ = make("mlp", 2)
    other[-1] = torch.nn.Linear(4, 3).double()
    bases = identity_bases(ScoreEngine(other).block_shapes)

    with pytest.raises(ModelError, match="fitted on another network"):
        KroneckerCompressor(bases, inputs).compress(ScoreEngine(model).all_classes(inputs))
