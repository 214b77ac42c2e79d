"""A layer's gradients formed piece by piece in memory that is used again: what a cache holds is cheap to pass on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.gradients.factors import AffineFactors, ConvolutionInput, LinearInput

CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 256 << 20}
"""As much of a batch's gradients as is formed at a time, where one row of one sample is not more.

What a processor's cache holds; on a GPU, enough to keep it busy with few kernels.
"""


class Workspace:
    """Memory for gradients, allocated when first needed and kept; on a GPU torch's allocator keeps it, for all layers.

    Args:
        like: a tensor with the dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        """See the class."""
        self._kept = like.new_empty(0)

    def take(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor, which the next one overwrites."""
        size = math.prod(shape)
        if self._kept.is_cuda:  # what is recorded there has to have its memory to itself
            return self._kept.new_empty(shape)
        if len(self._kept) < size:
            self._kept = self._kept.new_empty(size)
        return self._kept[:size].view(shape)


@dataclass(frozen=True)
class Chunk:
    """Some rows of some samples' gradients.

    Attributes:
        samples: which samples.
        rows: which rows of the block.
        gradient: ``(b, S, rows, A)``, overwritten by the next chunk.
    """

    samples: slice
    rows: slice
    gradient: Tensor


def form_chunks(item: AffineFactors, workspace: Workspace, *, row_step: int = 1) -> Iterator[Chunk]:
    """Form the weight's gradients of an affine layer's call, chunk by chunk.

    Args:
        item: the call's factors; the weight takes part.
        workspace: for chunks.
        row_step: a chunk has a multiple of so many rows, unless it has the last ones.
    """
    num_scores, batch, num_outputs, num_positions = item.deltas.shape
    chunk_bytes = CHUNK_BYTES.get(item.deltas.device.type, CHUNK_BYTES["cpu"])
    width = item.block.num_inputs - int(item.source.bias)
    row_bytes = num_scores * width * item.deltas.element_size()
    tall = isinstance(item.source, LinearInput) and (num_positions == 1 or row_step > 1)  # all samples, few rows
    samples = batch if tall else max(1, min(batch, chunk_bytes // (row_bytes * num_outputs)))
    if item.deltas.is_cuda and not isinstance(item.source, LinearInput):  # whose patches are formed, too
        samples = max(1, min(samples, chunk_bytes // (width * num_positions * item.deltas.element_size())))
    count = max(row_step, chunk_bytes // (row_bytes * samples) // row_step * row_step)
    samples = max(1, min(samples, chunk_bytes // (row_bytes * min(count, num_outputs))))
    for start in range(0, batch, samples):
        part = slice(start, min(batch, start + samples))
        for first in range(0, num_outputs, count):
            rows = slice(first, min(num_outputs, first + count))
            deltas = item.deltas[:, part, rows].transpose(0, 1)  # (b, S, rows, T): all scores in one product
            joined = deltas[:, 0] if num_scores == 1 else deltas.flatten(1, 2)
            if isinstance(item.source, ConvolutionInput) and not joined.is_cuda:
                gradient = item.source.gradients(joined, part)
            else:
                gradient = workspace.take(*joined.shape[:2], width)
                outer(joined, item.source.patches(part).transpose(1, 2), gradient)
            yield Chunk(part, rows, gradient.view(*deltas.shape[:3], width))


def outer(deltas: Tensor, inputs: Tensor, out: Tensor) -> None:
    """Write ``(b, O, T) @ (b, T, A)``."""
    if deltas.shape[2] == 1:
        torch.mul(deltas, inputs, out=out)
    else:
        torch.bmm(deltas, inputs, out=out)
