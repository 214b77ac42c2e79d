from __future__ import annotations

import pytest
import torch
from torch import nn

from fisher_ray.errors import RequestError
from fisher_ray.linear import (
    Descent,
    GradNet,
    PieceTrainer,
    Shape,
    cut_pieces,
    densify,
    join_state,
    pieces,
    plan_shape,
    share_pieces,
    state_shapes,
)
from fisher_ray.linear.pieces import cut_state
from tests.reference import gradnet as reference

PAPER = (4800, 102400, 23040)
SIZES = (7, 30, 12)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_WEIGHTS", 40)


def made(structure="block", widths=(3, 4, 2), seed=0):
    return GradNet(plan_shape(SIZES, structure, widths, 5), 0.3, seed, torch.float64)


def sparse_rows(number, seed=0, num_kept=9):
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack(
        [torch.randperm(sum(SIZES), generator=generator)[:num_kept].sort().values for _ in range(number)]
    )
    return torch.rand(number, num_kept, generator=generator, dtype=torch.float64), places.int()


def test_the_papers_network_has_its_widths_and_number_of_parameters():
    shape = plan_shape(PAPER, "block", None, 10)
    assert shape.widths == (5, 100, 25)
    assert shape.num_parameters == 10_841_440
    network = GradNet(Shape(12, ((0, 8), (8, 12)), (3, 2), 4), 0.02, 0)
    assert network.shape.num_parameters == sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize(("size", "width"), [(1, 5), (2048, 5), (8000, 10), (60_000, 60), (10**8, 100)])
def test_widths_grow_with_the_blocks_within_bounds(size, width):
    assert plan_shape([size], "block", None, 10).widths == (width,)


def test_adjacent_blocks_are_two_neighbouring_layers_each():
    assert plan_shape(SIZES, "adjacent", None, 5).spans == ((0, 37), (7, 49))
    assert plan_shape(SIZES[:1], "adjacent", None, 5).spans == ((0, 7),)
    with pytest.raises(RequestError, match=r"3 widths for 2 blocks of \[37, 42\]"):
        plan_shape(SIZES, "adjacent", (1, 2, 3), 5)


def test_initial_weights_are_normal_of_the_seed_alone_and_biases_zero():
    network = GradNet(plan_shape((4000, 9000), "block", (20, 30), 10), 0.02, 7)
    for name, value in network.state_dict().items():
        if name.endswith("bias"):
            assert not value.any()
        elif value.numel() > 10_000:
            assert abs(float(value.std()) - 0.02) < 2e-4  # of 80,000 draws: 4 standard errors
            assert abs(float(value.mean())) < 3e-4
    torch.manual_seed(1)
    again = GradNet(network.shape, 0.02, 7)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    other = GradNet(network.shape, 0.02, 8)
    assert not torch.equal(network.head.weight, other.head.weight)


@pytest.mark.parametrize(("structure", "widths"), [("block", (3, 4, 2)), ("adjacent", (3, 4))])
def test_outputs_are_the_papers(structure, widths):
    network = made(structure, widths)
    values, places = sparse_rows(6)
    blocks = [
        (range(*span), block.weight.detach(), block.bias.detach())
        for span, block in zip(network.shape.spans, network.blocks, strict=True)
    ]
    head = (network.head.weight.detach(), network.head.bias.detach())
    rows = [dict(zip(map(int, p), map(float, v), strict=True)) for v, p in zip(values, places, strict=True)]
    expected = torch.stack([reference.outputs(row, blocks, head) for row in rows])
    torch.testing.assert_close(network(densify(values, places, network.shape.dim)), expected, rtol=1e-12, atol=1e-14)
    summed = network.scores(values.view(2, 3, -1), places.view(2, 3, -1))
    torch.testing.assert_close(summed, expected.view(2, 3, -1).sum(1), rtol=1e-12, atol=1e-14)


def train(network, descent, num_ranks, steps=6):
    """Train on ranks that are objects of this process; return the network's state and the losses."""
    shape = network.shape
    shares = share_pieces(cut_pieces(shape), shape, num_ranks)
    ranks = [PieceTrainer(shape, share, descent, torch.device("cpu")) for share in shares]
    for rank in ranks:
        rank.begin(network)
    losses = []
    for step in range(steps):
        values, places = sparse_rows(4, seed=step)
        rows, labels = densify(values, places, shape.dim), torch.arange(4) % shape.num_classes
        products = [rank.products(rows) for rank in ranks]
        losses.append([float(rank.step(rows, rank.join(products, shares), labels)) for rank in ranks])
    state = {name: value for rank in reversed(ranks) for name, value in rank.state.items()}
    return join_state(shape, state), losses


@pytest.mark.parametrize("structure", ["block", "adjacent"])
@pytest.mark.parametrize(
    "descent", [Descent(0.1), Descent(0.1, weight_decay=0.05), Descent(0.1, momentum=0.8, weight_decay=0.05)]
)
def test_steps_are_those_of_torchs_descent_on_the_same_batches(structure, descent):
    network = made(structure, None)
    found, losses = train(network, descent, 1)
    optimiser = torch.optim.SGD(
        network.parameters(), lr=descent.lr, momentum=descent.momentum, weight_decay=descent.weight_decay
    )
    for step, (loss,) in enumerate(losses):
        values, places = sparse_rows(4, seed=step)
        optimiser.zero_grad()
        expected = nn.functional.cross_entropy(network(densify(values, places, network.shape.dim)), torch.arange(4) % 5)
        expected.backward()
        optimiser.step()
        assert loss == pytest.approx(expected.item(), rel=1e-12)
    for name, value in network.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num_ranks", [2, 3, 40])
def test_any_number_of_ranks_gives_the_same_bits(num_ranks):
    descent = Descent(0.1, momentum=0.8, weight_decay=0.05)
    alone, losses = train(made(), descent, 1)
    together, theirs = train(made(), descent, num_ranks)
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert all(each == own for (own,), shared in zip(losses, theirs, strict=True) for each in shared)
    assert len(theirs[0]) == num_ranks


def test_pieces_cover_every_block_once_and_are_shared_out_evenly(monkeypatch):
    shape = plan_shape(PAPER, "block", None, 10)
    monkeypatch.setattr(pieces, "PIECE_WEIGHTS", 1 << 19)
    cut = cut_pieces(shape)
    for block, span in enumerate(shape.spans):
        of_block = [piece for piece in cut if piece.block == block]
        assert [of_block[0].start, *(piece.stop for piece in of_block)] == [
            *(piece.start for piece in of_block),
            span[1],
        ]
    for num_ranks in (1, 2, 4, 8):
        shares = share_pieces(cut, shape, num_ranks)
        assert sorted(position for share in shares for position in share) == list(range(len(cut)))
        loads = [sum((cut[p].stop - cut[p].start) * shape.widths[cut[p].block] for p in share) for share in shares]
        assert max(loads) <= sum(loads) / num_ranks + pieces.PIECE_WEIGHTS


def test_a_state_cut_into_pieces_and_joined_is_the_network():
    network = made("adjacent", (3, 4))
    state = cut_state(network, cut_pieces(network.shape))
    assert {name: tuple(value.shape) for name, value in state.items()} == state_shapes(network.shape)
    joined = join_state(network.shape, state)
    assert list(joined) == [name for name, _ in network.named_parameters()]
    assert all(torch.equal(joined[name], value) for name, value in network.named_parameters())
