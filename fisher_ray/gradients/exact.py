"""Exact per-sample gradients ``(B, P)``, formed into one buffer that is used again for every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fisher_ray.errors import RequestError
from fisher_ray.gradients.blocks import Block, Piece
from fisher_ray.gradients.factors import AffineFactors
from fisher_ray.gradients.forming import Scores

PATCH_BYTES = 1 << 23
"""A convolution's patches are unfolded for as many samples at a time as fit into this, or for one."""


class GradientBuffer:
    """Holds the gradients of one batch.

    Fresh memory costs as much as the arithmetic, so nothing that grows with ``P`` is allocated after the first batch.

    Args:
        blocks: of the engine that makes the scores.
        model: its network.
        max_batch: the most samples of a batch.

    Attributes:
        offsets: by parameter, in the network's order, where its entries start.
        num_parameters: ``P``.
    """

    def __init__(self, blocks: Sequence[Block], model: nn.Module, max_batch: int) -> None:
        """See the class."""
        names = {piece.parameter for block in blocks for piece in block.pieces}
        self._blocks, self.offsets, self.num_parameters = list(blocks), dict[str, int](), 0
        for name, parameter in model.named_parameters():
            if name in names:
                self.offsets[name] = self.num_parameters
                self.num_parameters += parameter.numel()
                like: Tensor = parameter
        self._buffer = torch.empty(max_batch, self.num_parameters, dtype=like.dtype, device=like.device)
        self._patches = torch.empty(0, dtype=like.dtype, device=like.device)

    def fill(self, scores: Scores) -> Tensor:
        """Return the gradients of a batch, ``(B, P)``: a view of the buffer, which the next batch overwrites.

        Args:
            scores: of one target a sample.

        Raises:
            RequestError: if the batch has more samples than the buffer, or scores of several targets.
        """
        batch = len(scores.logits)
        if batch > len(self._buffer) or scores.num_scores != 1:
            raise RequestError(
                f"{batch} samples with {scores.num_scores} scores each do not fit a buffer of {len(self._buffer)} "
                "gradients: give it a larger max_batch, and scores of one target a sample"
            )
        filled: set[tuple[str, int]] = set()
        for item in scores.factors:
            if isinstance(item, AffineFactors):
                self._affine(item, filled)
            else:
                for piece, part in item.block.split(item.gradient()[:, 0]):
                    target = self._target(piece, batch)
                    first = self._first(piece, filled)
                    target.copy_(part.reshape(target.shape)) if first else target.add_(part.reshape(target.shape))
        for block in self._blocks:
            for piece in block.pieces:
                if self._first(piece, filled):
                    self._target(piece, batch).zero_()
        return self._buffer[:batch]

    def _affine(self, item: AffineFactors, filled: set[tuple[str, int]]) -> None:
        deltas = item.deltas[0]
        pieces = list(item.block.pieces)
        if item.source.weight:
            piece = pieces.pop(0)
            self._weight(item, self._matrix(piece, item.block, len(deltas)), self._first(piece, filled))
        for piece in pieces:
            target = self._target(piece, len(deltas))
            summed = deltas.sum(dim=2).reshape(target.shape)
            target.copy_(summed) if self._first(piece, filled) else target.add_(summed)

    def _weight(self, item: AffineFactors, target: Tensor, first: bool) -> None:
        """Form ``Σ_t δ_t a_tᵀ`` in ``target`` ``(B, O, A)``."""
        deltas, (batch, _, num_inputs) = item.deltas[0], target.shape
        num_positions = deltas.shape[2]
        each = num_inputs * num_positions * deltas.element_size()
        step = batch if item.source.stored else max(1, min(batch, PATCH_BYTES // each))
        for start in range(0, batch, step):
            part = slice(start, min(batch, start + step))
            inputs = item.source.patches(part, self._scratch(item, part, num_inputs, num_positions))
            _multiply(deltas[part], inputs.transpose(1, 2), target[part], first)

    def _scratch(self, item: AffineFactors, part: slice, num_inputs: int, num_positions: int) -> Tensor | None:
        if item.source.stored:
            return None
        shape = (part.stop - part.start, num_inputs, num_positions)
        if len(self._patches) < math.prod(shape):
            self._patches = self._patches.new_empty(math.prod(shape))
        return self._patches[: math.prod(shape)].view(shape)

    @staticmethod
    def _first(piece: Piece, filled: set[tuple[str, int]]) -> bool:
        key = (piece.parameter, 0 if piece.rows is None else piece.rows.start)
        first = key not in filled
        filled.add(key)
        return first

    def _target(self, piece: Piece, batch: int) -> Tensor:
        """Return a piece's place, ``(B, *shape)``."""
        size = math.prod(piece.shape)
        start = self.offsets[piece.parameter]
        if piece.rows is not None and piece.rows.start:
            start += piece.rows.start * (size // piece.shape[0])
        return self._buffer[:batch, start : start + size].view(batch, *piece.shape)

    def _matrix(self, piece: Piece, block: Block, batch: int) -> Tensor:
        target = self._target(piece, batch)
        if piece.transposed:
            return target.transpose(1, 2)
        return target.view(batch, block.num_outputs, -1)


def _multiply(deltas: Tensor, inputs: Tensor, target: Tensor, first: bool) -> None:
    """Write or add ``deltas @ inputs``, ``(b, O, T) @ (b, T, A)``, to ``target``."""
    if deltas.shape[2] == 1:
        if first:
            torch.mul(deltas, inputs, out=target)
        else:
            target.addcmul_(deltas, inputs)
    elif first:
        torch.bmm(deltas, inputs, out=target)
    else:
        target.baddbmm_(deltas, inputs)
