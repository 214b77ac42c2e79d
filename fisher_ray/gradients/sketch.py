"""A sparse Johnson–Lindenstrauss sketch of the whole gradient, made block by block: ``(B, P)`` is never formed.

Every coordinate of the gradient is added, with a random sign of its own, to one of ``k`` entries (count sketch:
Charikar, Chen & Farach-Colton 2002; as an embedding: Clarkson & Woodruff 2013). Which entry is drawn for runs of up to
``k`` neighbours together, as a rotation of the run: two coordinates of one run never meet, two of different runs meet
with probability ``1/k`` as if drawn by themselves, and sums run along contiguous memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fisher_ray.gradients.blocks import Block, block_seed
from fisher_ray.gradients.factors import AffineFactors, Factors
from fisher_ray.gradients.forming import Scores

CHUNK_BYTES = 1 << 22
"""As much of a batch's gradient as is formed at a time, where one row of one sample is not more."""


class GradientSketch:
    """Maps scores to ``k`` numbers each, whose dot products are unbiased estimates of the gradients' dot products.

    Args:
        blocks: of the engine that makes the scores.
        dim: ``k``.
        seed: of signs and places; with it the sketch is the same on every machine.
        like: a tensor with the dtype and device to compute in.
    """

    def __init__(self, blocks: Sequence[Block], dim: int, seed: int, like: Tensor) -> None:
        """See the class."""
        self.dim = dim
        self._signs, self._shifts = dict[str, Tensor](), dict[str, list[int]]()
        for block in blocks:
            generator = torch.Generator().manual_seed(block_seed(seed, block))
            size = block.num_outputs * block.num_inputs
            signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
            self._signs[block.name] = signs.to(like)
            num_runs = sum(1 for _ in _runs(block, dim))
            self._shifts[block.name] = torch.randint(dim, (num_runs,), generator=generator).tolist()
        self._scratch = like.new_empty(0)

    def compress(self, scores: Scores) -> Tensor:
        """Return the sketches, ``(B, S, k)``."""
        batch, num_scores = len(scores.logits), scores.num_scores
        out = scores.logits.new_zeros(batch * num_scores, self.dim)
        for item in scores.factors:
            for start, gradient in self._formed(item):
                self._add(item.block, start, gradient, out)
        return out.view(batch, num_scores, self.dim)

    def matrix(self, block: Block) -> Tensor:
        """Return the sketch of a block as a matrix ``(O · A, k)``, for gradients flattened by rows."""
        size = block.num_outputs * block.num_inputs
        out = self._signs[block.name].new_zeros(size, self.dim)
        self._add(block, 0, torch.eye(size).to(out), out)
        return out

    def _formed(self, item: Factors) -> Iterator[tuple[int, Tensor]]:
        """Yield some rows of the block's gradients at a time: the first row, and ``(B · S, rows · A)``."""
        if not isinstance(item, AffineFactors):
            yield 0, item.gradient().flatten(2).flatten(0, 1)
            return
        num_scores, batch, num_outputs, num_positions = item.deltas.shape
        inputs = item.inputs().transpose(1, 2)  # (B, T, A)
        rows = max(1, CHUNK_BYTES // (batch * num_scores * inputs.shape[2] * inputs.element_size()))
        rows = _whole_runs(rows, item.block.num_inputs, self.dim)
        for start in range(0, num_outputs, rows):
            part = item.deltas[:, :, start : start + rows]
            count = part.shape[2]
            joined = part[0] if num_scores == 1 else part.transpose(0, 1).flatten(1, 2)  # (B, S · rows, T)
            target = self._room(batch, num_scores * count, inputs.shape[2])
            if num_positions == 1:
                torch.mul(joined, inputs, out=target)
            else:
                torch.bmm(joined, inputs, out=target)
            yield start, target.view(batch * num_scores, -1)

    def _room(self, *shape: int) -> Tensor:
        size = shape[0] * shape[1] * shape[2]
        if len(self._scratch) < size:
            self._scratch = self._scratch.new_empty(size)
        return self._scratch[:size].view(shape)

    def _add(self, block: Block, start: int, gradient: Tensor, out: Tensor) -> None:
        first, last = start * block.num_inputs, start * block.num_inputs + gradient.shape[1]
        signs = self._signs[block.name]
        for (begin, end), shift in zip(_runs(block, self.dim), self._shifts[block.name], strict=True):
            if first <= begin < last:
                values, sign = gradient[:, begin - first : end - first], signs[begin:end]
                whole = min(end - begin, self.dim - shift)
                out[:, shift : shift + whole].addcmul_(values[:, :whole], sign[:whole])
                if whole < end - begin:
                    out[:, : end - begin - whole].addcmul_(values[:, whole:], sign[whole:])


def _runs(block: Block, dim: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of a block's flattened gradient: whole rows as far as ``dim`` goes, or parts of one row."""
    width = block.num_inputs
    if width <= dim:
        step = dim // width
        for row in range(0, block.num_outputs, step):
            yield row * width, min(block.num_outputs, row + step) * width
    else:
        for row in range(block.num_outputs):
            for column in range(0, width, dim):
                yield row * width + column, row * width + min(width, column + dim)


def _whole_runs(rows: int, width: int, dim: int) -> int:
    """Round a number of rows to whole runs."""
    step = max(1, dim // width)
    return max(step, rows // step * step)
