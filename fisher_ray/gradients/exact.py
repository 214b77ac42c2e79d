"""Exact gradients of each sample and score, formed into one buffer that is used again for every batch."""

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
        num_scores: ``S``: 1 for one target a sample, ``C`` for all classes.

    Attributes:
        offsets: by parameter, in the network's order, where its entries start.
        num_parameters: ``P``.
    """

    def __init__(self, blocks: Sequence[Block], model: nn.Module, max_batch: int, num_scores: int = 1) -> None:
        """See the class."""
        names = {piece.parameter for block in blocks for piece in block.pieces}
        self._blocks, self.offsets, self.num_parameters = list(blocks), dict[str, int](), 0
        for name, parameter in model.named_parameters():
            if name in names:
                self.offsets[name] = self.num_parameters
                self.num_parameters += parameter.numel()
                like: Tensor = parameter
        self._buffer = torch.empty(max_batch, num_scores, self.num_parameters, dtype=like.dtype, device=like.device)
        self._patches = torch.empty(0, dtype=like.dtype, device=like.device)

    def fill(self, scores: Scores) -> Tensor:
        """Return the gradients of a batch, ``(B, S, P)``: a view of the buffer, which the next batch overwrites.

        Raises:
            RequestError: if the batch has more samples than the buffer, or another number of scores.
        """
        batch, (most, num_scores, _) = len(scores.logits), self._buffer.shape
        if batch > most or scores.num_scores != num_scores:
            raise RequestError(
                f"{batch} samples with scores: {scores.num_scores} do not fit a buffer for {most} with {num_scores}. "
                "Give the buffer another max_batch or num_scores."
            )
        filled: set[tuple[str, int]] = set()
        for item in scores.factors:
            if isinstance(item, AffineFactors):
                self._affine(item, filled)
            else:
                for piece, part in item.block.split(item.gradient()):
                    target = self._target(piece, batch)
                    first = self._first(piece, filled)
                    target.copy_(part.reshape(target.shape)) if first else target.add_(part.reshape(target.shape))
        for block in self._blocks:
            for piece in block.pieces:
                if self._first(piece, filled):
                    self._target(piece, batch).zero_()
        return self._buffer[:batch]

    def _affine(self, item: AffineFactors, filled: set[tuple[str, int]]) -> None:
        pieces, batch = list(item.block.pieces), item.deltas.shape[1]
        if item.source.weight:
            piece = pieces.pop(0)
            self._weight(item, self._matrix(piece, item.block, batch), self._first(piece, filled))
        for piece in pieces:
            target = self._target(piece, batch)
            summed = item.deltas.sum(dim=3).transpose(0, 1).reshape(target.shape)
            target.copy_(summed) if self._first(piece, filled) else target.add_(summed)

    def _weight(self, item: AffineFactors, target: Tensor, first: bool) -> None:
        """Form ``Σ_t δ_t a_tᵀ`` in ``target`` ``(B, S, O, A)``."""
        (num_scores, batch, _, num_positions), num_inputs = item.deltas.shape, target.shape[3]
        each = num_inputs * num_positions * target.element_size()
        step = batch if item.source.stored else max(1, min(batch, PATCH_BYTES // each))
        for start in range(0, batch, step):
            part = slice(start, min(batch, start + step))
            inputs = item.source.patches(part, self._scratch(item, part, num_inputs, num_positions))
            for score in range(num_scores):
                _multiply(item.deltas[score, part], inputs.transpose(1, 2), target[part, score], first)

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
        """Return a piece's place, ``(B, S, *shape)``."""
        size = math.prod(piece.shape)
        start = self.offsets[piece.parameter]
        if piece.rows is not None and piece.rows.start:
            start += piece.rows.start * (size // piece.shape[0])
        return self._buffer[:batch, :, start : start + size].view(batch, self._buffer.shape[1], *piece.shape)

    def _matrix(self, piece: Piece, block: Block, batch: int) -> Tensor:
        target = self._target(piece, batch)
        if piece.transposed:
            return target.transpose(2, 3)
        return target.view(*target.shape[:2], block.num_outputs, -1)


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
