"""A layer's gradients formed piece by piece in memory that is used again: what a cache holds is cheap to pass on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.gradients.factors import AffineFactors

CHUNK_BYTES = 1 << 22
"""As much of a batch's gradients as is formed at a time, where one row of one sample is not more."""


class Workspace:
    """Memory for patches and for gradients, allocated when first needed and kept.

    Args:
        like: a tensor with the dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        """See the class."""
        self._like = like.detach()
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor, which the next one of the same name overwrites."""
        size = math.prod(shape)
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = self._like.new_empty(size)
        return self._kept[name][:size].view(shape)


@dataclass(frozen=True)
class Chunk:
    """Some rows of some samples' gradients for one score.

    Attributes:
        samples: which samples.
        score: which score.
        rows: which rows of the block.
        gradient: ``(b, rows, A)``, overwritten by the next chunk.
    """

    samples: slice
    score: int
    rows: slice
    gradient: Tensor


def form_chunks(item: AffineFactors, workspace: Workspace, *, row_step: int = 1) -> Iterator[Chunk]:
    """Form the weight's gradients of an affine layer's call, chunk by chunk.

    Args:
        item: the call's factors; the weight takes part.
        workspace: for patches and chunks.
        row_step: a chunk has a multiple of so many rows, unless it has the last ones.
    """
    num_scores, batch, num_outputs, num_positions = item.deltas.shape
    width = item.block.num_inputs - int(item.source.bias)
    row_bytes = width * item.deltas.element_size()
    if item.source.stored and (num_positions == 1 or row_step > 1):  # all samples, few rows
        count = max(row_step, CHUNK_BYTES // (row_bytes * batch) // row_step * row_step)
        samples = max(1, min(batch, CHUNK_BYTES // (row_bytes * min(count, num_outputs))))
    else:
        samples = max(1, min(batch, CHUNK_BYTES // (row_bytes * num_outputs)))
        count = max(row_step, CHUNK_BYTES // (row_bytes * samples) // row_step * row_step)
    for start in range(0, batch, samples):
        part = slice(start, min(batch, start + samples))
        shape = (part.stop - part.start, width, num_positions)
        out = None if item.source.stored else workspace.take("patches", *shape)
        inputs = item.source.patches(part, out).transpose(1, 2)  # (b, T, A)
        for first in range(0, num_outputs, count):
            rows = slice(first, min(num_outputs, first + count))
            out = workspace.take("gradient", part.stop - part.start, rows.stop - rows.start, width)
            for score in range(num_scores):
                outer(item.deltas[score, part, rows], inputs, out)
                yield Chunk(part, score, rows, out)


def outer(deltas: Tensor, inputs: Tensor, out: Tensor) -> None:
    """Write ``(b, O, T) @ (b, T, A)``."""
    if deltas.shape[2] == 1:
        torch.mul(deltas, inputs, out=out)
    else:
        torch.bmm(deltas, inputs, out=out)
