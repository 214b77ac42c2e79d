"""How coordinates are spread over layers, and how compressions are kept."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.config import CompressionConfig
from fisher_ray.errors import ConfigError, DataError, StoreError
from fisher_ray.gradients import ScoreEngine
from fisher_ray.metric import bases_from, basis_arrays, basis_attributes, plan_compression
from fisher_ray.metric.bases import spread
from fisher_ray.models import mlp
from fisher_ray.records import LayerBasis, LayerSketch
from fisher_ray.stages.compression import choose_compression, stand_in
from tests.metric.fitting import kronecker_sums

SHAPES = {"a.weight": (4, 10), "a.bias": (1, 4), "b": (20, 30)}
KINDS = ["kronecker", "random", "sketch", "topk", "identity"]


def plan(shapes=SHAPES, **asked):
    return plan_compression(CompressionConfig.checked(asked), shapes)


@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(1, 10**7), min_size=1, max_size=30),
    share=st.fractions(0, 1),
)
def test_numbers_are_spread_in_proportion_and_none_is_lost(sizes, share):
    total = int(share * sum(sizes.values()))
    found = spread(total, sizes)

    assert list(found) == list(sizes)
    assert sum(found.values()) == total
    whole, enough = sum(sizes.values()), total >= len(sizes)
    for name, size in sizes.items():
        assert (1 if enough else 0) <= found[name] <= size
        first = 1 if enough else 0
        exact = first + (total - first * len(sizes)) * (size - first) / max(1, whole - first * len(sizes))
        assert abs(found[name] - exact) <= 1 + 1e-6 * exact


@pytest.mark.parametrize("kind", ["random", "sketch", "topk"])
def test_a_budget_is_spread_by_size_and_never_exceeds_the_entries(kind):
    plans = plan(kind=kind, dim=100)
    assert {name: entry.dim for name, entry in plans.layers.items()} == {"a.weight": 7, "a.bias": 1, "b": 92}
    assert (plans.dim, plans.with_moments) == (100, [])
    assert {name: entry.dim for name, entry in plan(kind=kind, dim=10**6).layers.items()} == {
        name: math.prod(shape) for name, shape in SHAPES.items()
    }


def test_kronecker_layers_share_and_others_take_their_part_first():
    plans = plan(dim=200, layers={"a.bias": {"kind": "identity"}, "b": {"dim": 50}})
    assert plans.layers["a.bias"].dim == 4
    assert (plans.layers["b"].kind, plans.layers["b"].dim) == ("kronecker", 50)
    assert (plans.layers["a.weight"].dim, plans.shared) == (None, 40)  # all of its entries
    assert plans.with_moments == ["a.weight", "b"]
    assert plans.dim == 94


def test_the_first_glob_that_matches_holds():
    plans = plan(kind="sketch", dim=90, layers={"a.*": {"kind": "topk", "dim": 3}, "*": {"dim": 5}})
    assert [(entry.kind, entry.dim) for entry in plans.layers.values()] == [("topk", 3), ("topk", 3), ("sketch", 5)]


def test_identity_keeps_every_entry_whatever_the_budget():
    assert plan(kind="identity", dim=7).dim == 644


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"layers": {"c*": {"dim": 3}}}, r"'c\*' matches none of the layers, which are a.weight, a.bias, b"),
        ({"dim": 30, "layers": {"b": {"dim": 30}}}, r"compression.dim 30: .* take 30, and there are 2 others"),
        ({"dim": 30, "layers": {"*": {"kind": "random", "dim": 20}}}, "take 44, and there are 0 others"),
        ({"layers": {"*": {"dim": 3}, "b": {"dim": 4}}}, "'b' matches, an earlier one has matched"),
        ({"layers": {"b": {}}}, "give a kind or a dim"),
        ({"layers": {"b": {"kind": "identity", "dim": 3}}}, "takes no dim"),
        ({"layers": {"b": {"knd": "topk"}}}, "did you mean 'kind'"),
        ({"share": 1.0}, "share"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(asked, words):
    with pytest.raises(ConfigError, match=words):
        plan(**asked)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp((6, 8, 3)).eval(), torch.randn(30, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [10, 40, 10**6])
def test_a_compression_has_no_more_coordinates_than_asked_for_and_the_same_each_time(kind, dim):
    model, inputs = network()
    engine, config = ScoreEngine(model), CompressionConfig.checked({"kind": kind, "dim": dim})
    moments = kronecker_sums(model, inputs)
    one, other = (choose_compression(config, engine.blocks, moments, seed=5) for _ in range(2))

    assert list(one) == list(engine.block_shapes)
    assert 0 < sum(basis.dim for basis in one.values()) <= (83 if kind == "identity" else min(dim, 83))
    for name, basis in one.items():
        assert basis.shape == engine.block_shapes[name]
        if isinstance(basis, LayerBasis):
            assert torch.equal(basis.inputs, other[name].inputs)
            assert torch.equal(basis.outputs, other[name].outputs)
        else:
            assert basis == other[name]
    if kind in ("random", "sketch", "topk") and dim == 10:
        moved = choose_compression(config, engine.blocks, moments, seed=6)
        assert any(
            not torch.equal(a.inputs, b.inputs) if isinstance(a, LayerBasis) else a != b
            for a, b in zip(one.values(), moved.values(), strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_compression_comes_back_from_its_arrays(kind):
    model, inputs = network()
    config = CompressionConfig.checked({"kind": kind, "dim": 20})
    bases = choose_compression(config, ScoreEngine(model).blocks, kronecker_sums(model, inputs), seed=5)
    again = bases_from(basis_arrays(bases), basis_attributes(bases))

    assert list(again) == list(bases)
    for basis, other in zip(again.values(), bases.values(), strict=True):
        if isinstance(basis, LayerSketch):
            assert basis == other
            continue
        for part in ("inputs", "outputs", "pairs"):
            assert torch.equal(getattr(basis, part), getattr(other, part))
    if any(isinstance(basis, LayerBasis) for basis in bases.values()):
        with pytest.raises(StoreError, match="lacks its array"):
            bases_from({}, basis_attributes(bases))


def test_kronecker_layers_that_no_score_reaches_are_left_out_among_others():
    model, inputs = network()
    found = kronecker_sums(model, inputs)
    moments = {name: 0 * value for name, value in found.items() if name.startswith("fc0")}
    moments["num_rows"] = found["num_rows"]
    layers = {"fc0": {"kind": "kronecker", "dim": 9}}
    config = CompressionConfig.checked({"kind": "identity", "layers": layers, "dim": 99})
    assert list(choose_compression(config, ScoreEngine(model).blocks, moments, 0)) == ["fc1"]


def test_layers_whose_scores_are_zero_are_left_out():
    model, inputs = network()
    moments = kronecker_sums(model, inputs)
    moments["fc1:outputs"] = 0 * moments["fc1:outputs"]
    config = CompressionConfig.checked({"dim": 40, "layers": {"fc1": {"dim": 5}}})
    assert list(choose_compression(config, ScoreEngine(model).blocks, moments, 0)) == ["fc0"]
    moments["fc0:inputs"] = 0 * moments["fc0:inputs"]
    with pytest.raises(DataError, match="no direction"):
        choose_compression(config, ScoreEngine(model).blocks, moments, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_for_a_compression_fits_the_network(kind):
    engine = ScoreEngine(network()[0])
    found = stand_in(CompressionConfig.checked({"kind": kind, "dim": 40}), engine.blocks)
    assert {name: basis.shape for name, basis in found.items()} == engine.block_shapes
    assert all(basis.dim > 0 for basis in found.values())
