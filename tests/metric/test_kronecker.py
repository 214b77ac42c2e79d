import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_ray.errors import DataError
from fisher_ray.gradients import ScoreEngine
from fisher_ray.metric import KroneckerSums, choose_bases, kronecker
from tests.gradients.networks import make
from tests.metric.fitting import compress, kronecker_bases, kronecker_sums
from tests.reference import metric as reference

NAMES = ["mlp", "oblong kernel", "dilated", "linear at every position", "layer called twice, layer not called"]
FACTORS = ("inputs", "outputs", "positions")


def network(name, num_samples):
    """One of the gradients' networks, or a strided, padded, dilated convolution before another and a linear layer."""
    if name != "dilated":
        return make(name, num_samples)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2),
            nn.Tanh(),
            nn.Conv2d(4, 3, (2, 1), padding=(1, 0), bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(60, 3),
        )
        return model.double(), torch.randn(num_samples, 2, 7, 8, dtype=torch.float64)


def matrices(model, rows):
    """The oracle's gradients ``(..., P)`` as each layer's ``(..., O, A)``."""
    shapes = ScoreEngine(model).block_shapes
    parts = rows.split([outputs * inputs for outputs, inputs in shapes.values()], dim=-1)
    return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_sums_equal_outer_products_of_factors_unfolded_by_hand(name):
    model, inputs = network(name, 4)
    sums, expected = kronecker_sums(model, inputs), reference.factor_sums(model, inputs)

    assert sums.keys() == {"num_rows", *(f"{layer}:{key}" for layer in expected for key in FACTORS)}
    assert float(sums["num_rows"]) == 4
    for layer, by_hand in expected.items():
        for key, value in zip(FACTORS, by_hand, strict=True):
            actual = sums[f"{layer}:{key}"]
            assert actual.dtype == np.float64
            np.testing.assert_allclose(actual, value, rtol=1e-10, atol=1e-12)


@given(cuts=st.sets(st.integers(1, 8), max_size=4), block=st.integers(1, 2000))
@settings(max_examples=30)
def test_any_split_of_the_rows_and_of_the_products_gives_the_same_sums(cuts, block):
    model, inputs = network("dilated", 9)
    whole, edges = kronecker_sums(model, inputs), sorted([0, *cuts, 9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kronecker, "BLOCK_POSITIONS", block)
        parts = [kronecker_sums(model, inputs[a:b]) for a, b in pairwise(edges)]

    for name, expected in whole.items():
        np.testing.assert_allclose(sum(part[name] for part in parts), expected, rtol=1e-12, atol=1e-12)


def test_sums_of_float32_factors_are_rounded_by_their_rows_own_sizes_alone():
    # 64 samples of 576 positions; columns whose sizes differ by 1e6
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 20, 576, generator=generator) * torch.logspace(0, -6, 20)[:, None]
    deltas = torch.randn(3, 64, 10, 576, generator=generator) * torch.logspace(-6, 0, 10)[:, None]
    sums = []
    for dtype in (torch.float32, torch.float64):
        total = KroneckerSums()
        total.add("layer", inputs.to(dtype), deltas.to(dtype))
        sums.append(total.to_arrays())

    for key in ("layer:inputs", "layer:outputs"):
        sizes = np.sqrt(np.diag(sums[1][key]))
        assert (np.abs(sums[0][key] - sums[1][key]) / np.outer(sizes, sizes)).max() < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_bases_are_orthonormal_and_sign_fixed(name):
    model, inputs = network(name, 8)
    bases = kronecker_bases(model, inputs, 50)

    assert sum(len(basis.pairs) for basis in bases.values()) == 50
    for basis in bases.values():
        for columns in (basis.inputs, basis.outputs):
            assert columns.dtype == torch.float32
            assert columns.is_contiguous()
            gram = columns.double().T @ columns.double()
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-6)
            assert bool((columns.max(0).values == columns.abs().max(0).values).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 7, 40, 100])
def test_the_kept_coordinates_are_the_largest_eigenvalue_products_of_all_layers(name, dim):
    model, inputs = network(name, 8)
    by_hand = reference.factor_sums(model, inputs)
    products = {
        layer: np.outer(np.linalg.eigvalsh(outputs), np.linalg.eigvalsh(inputs)) / count
        for layer, (inputs, outputs, count) in by_hand.items()
    }
    expected = np.sort(np.concatenate([values.flatten() for values in products.values()]))[::-1][:dim]
    expected = expected[expected > 1e-13 * expected[0]]  # zero but for rounding: not kept

    kept = []
    for layer, basis in kronecker_bases(model, inputs, dim).items():
        sum_in, sum_out, count = by_hand[layer]
        along_in = torch.einsum("ai,ab,bi->i", basis.inputs.double(), sum_in, basis.inputs.double())
        along_out = torch.einsum("oj,op,pj->j", basis.outputs.double(), sum_out, basis.outputs.double())
        mine = (along_out[basis.pairs[:, 0]] * along_in[basis.pairs[:, 1]] / count).numpy()
        assert len(set(map(tuple, basis.pairs.tolist()))) == len(mine)
        assert (np.diff(mine) <= 1e-6 * mine[:-1]).all()
        kept.append(mine)

    # bases are rounded to float32: a quotient of the smallest kept eigenvalues sees that of the largest
    np.testing.assert_allclose(np.sort(np.concatenate(kept))[::-1], expected, rtol=1e-5, atol=1e-7 * expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_compressed_coordinates_are_the_oracles_gradient_between_two_basis_vectors(name):
    model, inputs = network(name, 8)
    bases = kronecker_bases(model, inputs, 60)

    gradients = matrices(model, reference.scores(model, inputs))
    expected = [
        basis.outputs[:, j].double() @ gradients[layer] @ basis.inputs[:, i].double()
        for layer, basis in bases.items()
        for j, i in basis.pairs.tolist()
    ]
    torch.testing.assert_close(compress(model, inputs, bases), torch.stack(expected, dim=2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_with_all_coordinates_the_compression_is_an_isometry_of_the_gradient(name):
    # Bases are orthonormal to 1e-7 (float32): norms and eigenvalues change by that factor, not by that much of the
    # largest. Coordinates without a score are dropped: logits have one such direction, few samples more.
    model, inputs = network(name, 8)
    num_parameters = sum(outputs * fan_in for outputs, fan_in in ScoreEngine(model).block_shapes.values())
    compressed = compress(model, inputs, kronecker_bases(model, inputs, num_parameters))
    expected = reference.scores(model, inputs)

    assert compressed.shape[-1] < num_parameters
    torch.testing.assert_close(compressed.norm(dim=2), expected.norm(dim=2), rtol=1e-6, atol=0)
    rank = 8 * (expected.shape[1] - 1)
    actual, by_hand = (torch.linalg.svdvals(rows.flatten(0, 1)) ** 2 for rows in (compressed, expected))
    torch.testing.assert_close(actual[:rank], by_hand[:rank], rtol=2e-6, atol=0)


def test_layers_without_a_kept_coordinate_are_left_out():
    model, inputs = network("mlp", 8)
    bases = kronecker_bases(model, inputs, 1)

    assert len(bases) == 1
    (basis,) = bases.values()
    assert (basis.inputs.shape[1], basis.outputs.shape[1], basis.pairs.tolist()) == (1, 1, [[0, 0]])


def test_coordinates_that_no_score_reaches_are_not_kept():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)).double()
        inputs = torch.randn(30, 12, dtype=torch.float64)
    inputs[:, :5] = 0

    bases = kronecker_bases(model, inputs, 10_000)

    reached = {name: (basis.inputs.shape[1], basis.outputs.shape[1]) for name, basis in bases.items()}
    assert reached == {"0": (8, 9), "2": (10, 4)}  # seven inputs and the bias; the logits' gradients sum to zero
    assert sum(len(basis.pairs) for basis in bases.values()) == 8 * 9 + 10 * 4


def test_sums_of_nothing_of_zero_and_not_finite_are_refused():
    model, inputs = network("mlp", 3)
    sums, shapes = kronecker_sums(model, inputs), ScoreEngine(model).block_shapes
    with pytest.raises(DataError, match="no rows"):
        choose_bases(KroneckerSums().to_arrays(), shapes, 5)
    assert choose_bases({key: value * ("outputs" not in key) for key, value in sums.items()}, shapes, 5) == {}
    for broken in (math.nan, math.inf):
        inputs[1, 2] = broken
        with pytest.raises(DataError, match=r"layer 'fc0' sum to NaN or infinity"):
            choose_bases(kronecker_sums(model, inputs), shapes, 5)


def test_layers_with_a_number_of_products_of_their_own_do_not_share():
    model, inputs = make("mlp", 20)
    sums, shapes = kronecker_sums(model, inputs), ScoreEngine(model).block_shapes
    first, *others = shapes
    bases = choose_bases(sums, shapes, 9, {first: 4})

    assert bases[first].dim == 4
    assert sum(bases[name].dim for name in others if name in bases) == 9
    alone = choose_bases(sums, {first: shapes[first]}, 4)[first]
    assert torch.equal(bases[first].pairs, alone.pairs)
    rest = choose_bases(sums, {name: shapes[name] for name in others}, 9)
    assert {name: basis.dim for name, basis in rest.items()} == {
        name: basis.dim for name, basis in bases.items() if name != first
    }


@pytest.mark.gpu
def test_factors_on_a_gpu_are_summed_there_to_the_same():
    model, inputs = network("dilated", 4)
    expected = kronecker_sums(model, inputs)
    for name, actual in kronecker_sums(model.cuda(), inputs.cuda()).items():
        np.testing.assert_allclose(actual, expected[name], rtol=1e-10, atol=1e-12)


def test_a_matrix_of_which_no_product_can_be_kept_is_not_decomposed(monkeypatch):
    sizes, generator = [], np.random.default_rng(0)
    monkeypatch.setattr(
        kronecker, "_leading", lambda m, count, _leading=kronecker._leading: sizes.append(len(m)) or _leading(m, count)
    )
    shapes = {"small": (4, 9), "large": (3, 8), "middle": (2, 7)}
    scales = {"small": 1e-3, "large": 1.0, "middle": 0.9}
    sums = {}
    for name, shape in shapes.items():
        for side, size in zip(("outputs", "inputs"), shape, strict=True):
            rows = generator.normal(size=(20, size))
            sums[f"{name}:{side}"] = scales[name] * rows.T @ rows
        sums[f"{name}:positions"] = np.array(20.0)

    sums["num_rows"] = np.array(20.0)
    bases = choose_bases(sums, shapes, 10)

    assert sizes == [2, 7, 3, 8]
    assert list(bases) == ["large", "middle"]
    alone = choose_bases({key: value for key, value in sums.items() if "small" not in key}, shapes, 10)
    for name, basis in alone.items():
        torch.testing.assert_close(bases[name].pairs, basis.pairs, rtol=0, atol=0)
    assert list(choose_bases(sums, shapes, 10, {"small": 2})) == ["small", "large", "middle"]
