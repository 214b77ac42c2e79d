"""Exact gradients of each sample and score, formed into one buffer that is used again for every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fisher_ray.errors import RequestError
from fisher_ray.gradients.blocks import Block, Piece
from fisher_ray.gradients.factors import AffineFactors, LinearInput, TokenFactors
from fisher_ray.gradients.formation import Workspace, form_chunks, outer
from fisher_ray.gradients.forming import Scores
from fisher_ray.gradients.precision import Precision


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
        shape, dtype = (max_batch, num_scores, self.num_parameters), Precision.of(model).factors
        self._buffer = torch.empty(shape, dtype=dtype, device=like.device)
        self._workspace = Workspace(self._buffer)

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
            elif isinstance(item, TokenFactors):
                self._tokens(item, filled)
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

    def _tokens(self, item: TokenFactors, filled: set[tuple[str, int]]) -> None:
        (piece,) = item.block.pieces
        target = self._target(piece, len(item.tokens))
        if self._first(piece, filled):
            target.zero_()
        if target.is_cuda:
            every = torch.arange(len(item.tokens), device=target.device)[:, None]
            for score, deltas in enumerate(item.deltas):
                target[:, score].index_put_((every, item.tokens), deltas, accumulate=True)
            return
        for score, deltas in enumerate(item.deltas):
            for row, tokens in enumerate(item.tokens):
                target[row, score].index_add_(0, tokens, deltas[row])

    def _weight(self, item: AffineFactors, target: Tensor, first: bool) -> None:
        """Form ``Σ_t δ_t a_tᵀ`` in ``target`` ``(B, S, O, A)``.

        A product of matrices is fastest into contiguous memory, and what is in the cache is then copied at once; outer
        products are written where they belong.
        """
        if isinstance(item.source, LinearInput) and item.deltas.shape[3] == 1 and first:
            for score in range(item.num_scores):
                outer(item.deltas[score], item.source.patches().transpose(1, 2), target[:, score])
            return
        for chunk in form_chunks(item, self._workspace):
            place = target[chunk.samples, :, chunk.rows]
            place.copy_(chunk.gradient) if first else place.add_(chunk.gradient)

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
