"""Training of a GradNet whose weights are cut into pieces of coordinates, so that several ranks hold a part each.

With batches of a few rows nearly all of the time goes into passing over the weights, not over the rows. So the ranks
share the weights instead of the rows: every rank multiplies all rows of a batch by its pieces, the products
``(B, units)`` are exchanged, and each rank changes its own pieces. A gradient of the weights never travels.

Pieces are cut by the shape alone, and their products are added in the pieces' order: any number of ranks gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.linear.gradnet import GradNet, Shape

PIECE_WEIGHTS = 1 << 19
"""Weights of a piece at most: enough for one product of matrices, few enough to share out evenly."""


@dataclass(frozen=True)
class Piece:
    """Some coordinates of a block, and the weights that they are multiplied by.

    Attributes:
        block: position of the block.
        start: first coordinate, among all ``P``.
        stop: the one behind the last.
    """

    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class Descent:
    """Stochastic gradient descent, as ``torch.optim.SGD`` has it."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


def cut_pieces(shape: Shape) -> list[Piece]:
    """Cut every block's coordinates into pieces of equal size, but for the last of each."""
    pieces = []
    for block, ((start, stop), width) in enumerate(zip(shape.spans, shape.widths, strict=True)):
        number = -(-(stop - start) * width // PIECE_WEIGHTS)
        size = -(-(stop - start) // number)
        pieces += [Piece(block, first, min(first + size, stop)) for first in range(start, stop, size)]
    return pieces


def share_pieces(pieces: Sequence[Piece], shape: Shape, num_ranks: int) -> list[list[int]]:
    """Return the positions of each rank's pieces: the largest first, to the rank that has the fewest weights."""
    weights = [(piece.stop - piece.start) * shape.widths[piece.block] for piece in pieces]
    loads, shares = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for position in sorted(range(len(pieces)), key=lambda place: -weights[place]):
        rank = loads.index(min(loads))
        loads[rank] += weights[position]
        shares[rank].append(position)
    return [sorted(share) for share in shares]


class PieceTrainer:
    """One rank's part of a GradNet in training: its pieces, and all of what is small.

    Args:
        shape: of the network.
        mine: positions of this rank's pieces.
        descent: how weights are changed.
        device: where to compute.
    """

    def __init__(self, shape: Shape, mine: Sequence[int], descent: Descent, device: torch.device) -> None:
        """See the class."""
        self._shape, self._descent, self._device = shape, descent, device
        self._pieces = cut_pieces(shape)
        self._mine = list(mine)
        self._state: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}

    # -- what it holds

    def begin(self, network: GradNet) -> None:
        """Take this rank's part of a network's parameters."""
        self.load(cut_state(network, self._pieces), {})

    def load(self, state: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what :meth:`state` and :meth:`momentum` of all ranks gave."""
        names = [*map(piece_name, self._mine), *SMALL]
        self._state = {name: state[name].to(self._device, copy=True) for name in names}
        self._momentum = {name: momentum[name].to(self._device, copy=True) for name in names if name in momentum}

    @property
    def state(self) -> dict[str, Tensor]:
        """This rank's parameters, which the next step changes."""
        return self._state

    @property
    def momentum(self) -> dict[str, Tensor]:
        """What the next step changes besides; nothing without momentum."""
        return self._momentum

    # -- what it does

    def products(self, rows: Tensor) -> Tensor:
        """Return the products of dense rows ``(B, P)`` with this rank's pieces, ``(B, Σ units)``, piece after piece."""
        parts = [
            rows[:, self._pieces[position].start : self._pieces[position].stop] @ self._state[piece_name(position)].T
            for position in self._mine
        ]
        return torch.cat(parts, dim=1) if parts else rows.new_zeros(len(rows), 0)

    def num_units(self, mine: Sequence[int]) -> int:
        """Return the columns of :meth:`products` of a rank with these pieces."""
        return sum(self._shape.widths[self._pieces[position].block] for position in mine)

    def join(self, products: Sequence[Tensor], shares: Sequence[Sequence[int]]) -> Tensor:
        """Add all ranks' products in the order of the pieces, and the biases: ``(B, units)`` before the ReLU."""
        by_piece: dict[int, Tensor] = {}
        for product, share in zip(products, shares, strict=True):
            place = 0
            for position in share:
                width = self._shape.widths[self._pieces[position].block]
                by_piece[position], place = product[:, place : place + width], place + width
        columns, units = self._shape.columns, self._state["bias"].repeat(len(products[0]), 1)
        for position, piece in enumerate(self._pieces):
            units[:, columns[piece.block]] += by_piece[position].to(units)
        return units

    def outputs(self, units: Tensor) -> Tensor:
        """Return the outputs ``(B, C)``."""
        return torch.nn.functional.linear(units.relu(), self._state["head.weight"], self._state["head.bias"])

    def step(self, rows: Tensor, units: Tensor, labels: Tensor) -> Tensor:
        """Change this rank's part by one step on the mean cross-entropy of a batch, and return that.

        Args:
            rows: dense, ``(B, P)``.
            units: of all ranks, before the ReLU, ``(B, units)``.
            labels: int64 ``(B,)``.
        """
        outputs, active = self.outputs(units), units.relu()
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        delta = outputs.softmax(1)
        delta[torch.arange(len(labels), device=delta.device), labels] -= 1
        delta /= len(labels)
        below = (delta @ self._state["head.weight"]) * (units > 0)
        self._descend("head.weight", delta.T, active)
        self._descend("head.bias", delta.T)
        self._descend("bias", below.T)
        columns = self._shape.columns
        for position in self._mine:
            piece = self._pieces[position]
            self._descend(piece_name(position), below[:, columns[piece.block]].T, rows[:, piece.start : piece.stop])
        return loss

    def _descend(self, name: str, left: Tensor, right: Tensor | None = None) -> None:
        """Take a step against the gradient ``left @ right``; without ``right``, against the sum of ``left``'s columns.

        Without momentum the gradient is never formed: one pass over the weights.
        """
        value, how = self._state[name], self._descent
        keep = 1 - how.lr * how.weight_decay
        if not how.momentum:
            if right is None:
                value.mul_(keep).sub_(left.sum(1), alpha=how.lr)
            else:
                value.addmm_(left, right, beta=keep, alpha=-how.lr)
            return
        moving = self._momentum.setdefault(name, torch.zeros_like(value))
        moving.mul_(how.momentum)
        moving.add_(left.sum(1)) if right is None else moving.addmm_(left, right)
        moving.add_(value, alpha=how.weight_decay)
        value.sub_(moving, alpha=how.lr)


SMALL = ("bias", "head.weight", "head.bias")
"""What every rank holds whole: the biases of all blocks' units, and the last layer."""


def piece_name(position: int) -> str:
    """Return the name of a piece's weights ``(units, coordinates)``."""
    return f"piece.{position}"


def cut_state(network: GradNet, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """Return a network's parameters by the names of the pieces and of :data:`SMALL`."""
    values = {name: value.detach() for name, value in network.named_parameters()}
    cut = {}
    for position, piece in enumerate(pieces):
        start, weight = network.shape.spans[piece.block][0], values[f"blocks.{piece.block}.weight"]
        cut[piece_name(position)] = weight[:, piece.start - start : piece.stop - start].contiguous()
    bias = torch.cat([values[f"blocks.{block}.bias"] for block in range(len(network.shape.spans))])
    return {**cut, "bias": bias, "head.weight": values["head.weight"], "head.bias": values["head.bias"]}


def join_state(shape: Shape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`cut_state`: a state dict of :class:`GradNet`."""
    pieces, joined = cut_pieces(shape), dict[str, Tensor]()
    for block, columns in enumerate(shape.columns):
        of_block = [piece_name(position) for position, piece in enumerate(pieces) if piece.block == block]
        joined[f"blocks.{block}.weight"] = torch.cat([state[name] for name in of_block], dim=1)
        joined[f"blocks.{block}.bias"] = state["bias"][columns]
    return {**joined, "head.weight": state["head.weight"], "head.bias": state["head.bias"]}


def state_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what :func:`cut_state` gives, by name, in a fixed order."""
    pieces, units = cut_pieces(shape), sum(shape.widths)
    weights = {
        piece_name(position): (shape.widths[piece.block], piece.stop - piece.start)
        for position, piece in enumerate(pieces)
    }
    small = {"bias": (units,), "head.weight": (shape.num_classes, units), "head.bias": (shape.num_classes,)}
    return {**weights, **small}
