"""GradNet: a layer of units over each block of a gradient's coordinates, and a linear layer over all units."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fisher_ray.errors import RequestError

FIVES, FEWEST, MOST = 5, 5, 100
"""Units of a block, where no widths are given: in fives, at least and at most so many."""
COORDINATES_A_UNIT = 1000
"""Coordinates of a block for each of its units, where no widths are given."""
FORWARD_BYTES = 64 << 20
"""Of rows that are made dense at a time in :meth:`GradNet.scores`."""


@dataclass(frozen=True)
class Shape:
    """The blocks of a GradNet, and how many classes it tells apart.

    Attributes:
        dim: ``P``: coordinates of a gradient.
        spans: of each block, its first coordinate and the one behind its last; blocks may overlap.
        widths: units of each block.
        num_classes: ``C``.
    """

    dim: int
    spans: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    num_classes: int

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        units = sum(self.widths)
        blocks = sum((stop - start) * width for (start, stop), width in zip(self.spans, self.widths, strict=True))
        return blocks + units + (units + 1) * self.num_classes

    @property
    def columns(self) -> list[slice]:
        """Each block's units among all."""
        edges = [sum(self.widths[:number]) for number in range(len(self.widths) + 1)]
        return [slice(*pair) for pair in pairwise(edges)]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        spans, widths = [list(span) for span in self.spans], list(self.widths)
        return {"dim": self.dim, "spans": spans, "widths": widths, "num_classes": self.num_classes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Shape:
        """Undo :meth:`to_json`."""
        spans = tuple((int(start), int(stop)) for start, stop in values["spans"])
        return cls(int(values["dim"]), spans, tuple(map(int, values["widths"])), int(values["num_classes"]))


def plan_shape(sizes: Sequence[int], structure: str, widths: Sequence[int] | None, num_classes: int) -> Shape:
    """Return a GradNet's shape for layers of these sizes.

    Args:
        sizes: coordinates of each layer, in the network's order.
        structure: ``block``: each layer is a block; ``adjacent``: each two neighbours are, so that blocks overlap.
        widths: units of each block; None for :func:`default_width`.
        num_classes: ``C``.

    Raises:
        RequestError: if there is not one width for each block.
    """
    edges = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    reach = 2 if structure == "adjacent" and len(sizes) > 1 else 1
    spans = tuple(zip(edges[:-reach], edges[reach:], strict=True))
    if widths is not None and len(widths) != len(spans):
        raise RequestError(
            f"gradnet.widths gives {len(widths)} widths for {len(spans)} blocks of {[b - a for a, b in spans]} "
            "coordinates: give one for each, or leave them out"
        )
    chosen = tuple(default_width(stop - start) for start, stop in spans) if widths is None else tuple(widths)
    return Shape(edges[-1], spans, chosen, num_classes)


def default_width(size: int) -> int:
    """Return the units of a block of so many coordinates, see :data:`COORDINATES_A_UNIT`."""
    return min(MOST, max(FEWEST, FIVES * round(size / COORDINATES_A_UNIT / FIVES)))


class GradNet(nn.Module):
    """``z = V relu(concat_j(W_j g_j + b_j)) + c`` of a gradient ``g`` with blocks ``g_j`` (Daróczy et al., 2018).

    Args:
        shape: of the blocks.
        init_std: standard deviation of the initial weights; biases begin at zero.
        seed: of the initial weights.
        dtype: of all parameters.
    """

    def __init__(self, shape: Shape, init_std: float, seed: int, dtype: torch.dtype = torch.float32) -> None:
        """See the class."""
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(
            _linear(stop - start, width, dtype) for (start, stop), width in zip(shape.spans, shape.widths, strict=True)
        )
        self.head = _linear(sum(shape.widths), shape.num_classes, dtype)
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} gradnet {name}".encode()))
            with torch.no_grad():
                parameter.zero_() if parameter.ndim == 1 else parameter.normal_(0, init_std, generator=generator)

    def forward(self, rows: Tensor) -> Tensor:
        """Return outputs ``(B, C)`` of dense rows ``(B, P)``."""
        spans = zip(self.blocks, self.shape.spans, strict=True)
        units: Tensor = torch.cat([block(rows[:, start:stop]) for block, (start, stop) in spans], dim=1).relu()
        outputs: Tensor = self.head(units)
        return outputs

    def scores(self, values: Tensor, coordinates: Tensor) -> Tensor:
        """Return the sum of the outputs of each sample's gradients, ``(B, C)``, a few rows being dense at a time.

        Args:
            values: ``(B, S, K)``.
            coordinates: integers ``(B, S, K)``, different in a row.
        """
        flat, places = values.flatten(0, 1), coordinates.flatten(0, 1)
        size = max(1, FORWARD_BYTES // (self.shape.dim * values.element_size()))
        chunks = [slice(start, start + size) for start in range(0, len(flat), size)]
        with torch.no_grad():
            outputs = torch.cat([self(densify(flat[part], places[part], self.shape.dim)) for part in chunks])
        return outputs.view(*values.shape[:2], -1).sum(1)


def densify(values: Tensor, coordinates: Tensor, dim: int) -> Tensor:
    """Return rows ``(B, P)``: ``values`` ``(B, K)`` at ``coordinates`` ``(B, K)``, different in a row, else zero."""
    return values.new_zeros(len(values), dim).scatter_(1, coordinates.long(), values)


def _linear(num_inputs: int, num_outputs: int, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):  # its weights are drawn by the caller
        made = nn.Linear(num_inputs, num_outputs, dtype=dtype)
    return made.to_empty(device="cpu")
