"""Blocks: the parameters whose gradients are handled together, and how they make up one matrix."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.errors import ModelError


@dataclass(frozen=True)
class Piece:
    """Where a parameter, or some of its rows, stands in a block's matrix.

    Attributes:
        parameter: its full name.
        rows: of the parameter's first axis; None for all of a parameter without axes.
        columns: of the block's matrix.
        shape: of these rows of the parameter.
        transposed: whether the parameter is the transpose of these columns.
    """

    parameter: str
    rows: slice | None
    columns: slice
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Block:
    """A matrix ``(O, A)`` of parameters: the unit of factors, bases and structure.

    For a layer ``y = W a + b`` it is ``[W b]``, one block for each group of a convolution. For a normalisation it has
    a column for the scale and one for the shift. A parameter that several layers share, or that belongs to another
    kind of module, is a block of its own: its first axis against all others.

    Attributes:
        name: the layer's name, with ``/g`` for group ``g``; or the parameter's.
        num_outputs: ``O``.
        num_inputs: ``A``.
        pieces: what the matrix is made of.
    """

    name: str
    num_outputs: int
    num_inputs: int
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, A)``."""
        return self.num_outputs, self.num_inputs

    def split(self, gradient: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Yield each piece and its part of ``(..., O, A)``, shape ``(..., *piece.shape)``."""
        for piece in self.pieces:
            part = gradient[..., piece.columns]
            if piece.transposed:
                part = part.transpose(-1, -2)
            yield piece, part.reshape(*gradient.shape[:-2], *piece.shape)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix ``(O, A)`` of parameters, or of anything of their shapes, by name.

        Raises:
            ModelError: if one is missing or has another shape.
        """
        parts = []
        for piece in self.pieces:
            found = tensors.get(piece.parameter)
            part = found if found is None or piece.rows is None or not found.ndim else found[piece.rows]
            if part is None or tuple(part.shape) != piece.shape:
                given = "none" if found is None else f"shape {tuple(found.shape)}"
                raise ModelError(f"parameter {piece.parameter!r}: {given}, where layer {self.name!r} has {piece.shape}")
            width = piece.columns.stop - piece.columns.start
            part = part.reshape(width, -1).T if piece.transposed else part.reshape(-1, width)
            parts.append(part)
        return torch.cat(parts, dim=1)


def single(name: str, shape: tuple[int, ...]) -> Block:
    """Return the block of one parameter by itself."""
    num_outputs = shape[0] if shape else 1
    num_inputs = 1
    for size in shape[1:]:
        num_inputs *= size
    rows = slice(0, num_outputs) if shape else None
    return Block(name, num_outputs, num_inputs, (Piece(name, rows, slice(0, num_inputs), shape),))


def block_seed(seed: int, name: str) -> int:
    """Return a seed for one block: 32 bits, as the CPU's generator uses no more of it."""
    return zlib.crc32(f"{seed} {name}".encode())
