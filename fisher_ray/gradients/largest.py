"""The largest entries of each sample's gradient, layer by layer, as Daróczy et al. (2018) keep them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.factors import AffineFactors, Factors
from fisher_ray.gradients.formation import Workspace, form_chunks
from fisher_ray.gradients.forming import Scores, add_calls


class LargestEntries:
    """Keeps a fixed share of every block's entries, those with the largest absolute values.

    Args:
        blocks: of the engine that makes the scores.
        share: of a block's entries; at least one is kept.

    Attributes:
        dim: ``P``: entries of all blocks, each flattened by rows, one block after another.
        num_kept: ``K``: kept entries of one score, in the blocks' order.
    """

    def __init__(self, blocks: Sequence[Block], share: float = 0.15) -> None:
        """See the class."""
        self._blocks, self._starts, self._kept = list(blocks), dict[str, int](), dict[str, int]()
        self.dim = 0
        for block in blocks:
            size = block.num_outputs * block.num_inputs
            self._starts[block.name], self._kept[block.name] = self.dim, num_largest(size, share)
            self.dim += size
        self.num_kept = sum(self._kept.values())

    def compress(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return values and int32 coordinates, each ``(B, S, K)``; within a block the coordinates ascend."""
        shape = (len(scores.logits), scores.num_scores, self.num_kept)
        values = scores.logits.new_zeros(shape)
        coordinates = torch.zeros(shape, dtype=torch.int32, device=values.device)
        place, calls = 0, scores.by_block()
        for block in self._blocks:
            kept, start = self._kept[block.name], self._starts[block.name]
            part = slice(place, place + kept)
            place += kept
            if block.name in calls:
                chosen, values[:, :, part] = largest_entries(add_calls(calls[block.name]).flatten(2), kept)
                coordinates[:, :, part] = (chosen + start).int()
            else:
                coordinates[:, :, part] = torch.arange(start, start + kept, device=values.device)
        return values, coordinates


def largest_entries(gradient: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return where gradients ``(B, S, n)`` are largest, ascending, and these entries, each ``(B, S, K)``."""
    chosen = gradient.abs().topk(kept, dim=2, sorted=False).indices.sort(dim=2).values
    return chosen, gradient.gather(2, chosen)


def num_largest(size: int, share: float) -> int:
    """Return how many of ``size`` entries a share of them is: at least one."""
    return max(1, math.floor(share * size))


class PercentileEntries:
    """Keeps every block's entries whose absolute values are above a percentile of the block's, in rows of fixed width.

    The percentile is interpolated linearly, and an entry that equals it is not kept. Where entries of equal size lie on
    it, and where it is zero, fewer are left than a row has places: those left over have the value zero, and so no kept
    entry has. They stand at some of the equal entries' coordinates, so that a row's coordinates are all different.

    Args:
        blocks: of the engine that makes the scores.
        share: of a block's entries that are above: ``0.15`` for the 85th percentile; 1 keeps all.
        like: a tensor with the scores' dtype and device.

    Attributes:
        spans: by block, where its entries, flattened by rows, are among the ``P`` coordinates.
        dim: ``P``.
        num_kept: ``K``: places of a row, in the blocks' order; within a block the coordinates ascend.
    """

    def __init__(self, blocks: Sequence[Block], share: float, like: Tensor) -> None:
        """See the class."""
        self.spans, self.dim, self._kept = dict[str, slice](), 0, dict[str, int]()
        for block in blocks:
            size = block.num_outputs * block.num_inputs
            self.spans[block.name] = slice(self.dim, self.dim + size)
            self._kept[block.name] = num_above(size, share)
            self.dim += size
        self.num_kept = sum(self._kept.values())
        self._workspace = Workspace(like)

    def compress(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return values and int32 coordinates, each ``(B, S, K)``; NaN of a score is among its values."""
        shape = (len(scores.logits), scores.num_scores, self.num_kept)
        values = scores.logits.new_zeros(shape)
        coordinates = torch.zeros(shape, dtype=torch.int32, device=values.device)
        place, calls = 0, scores.by_block()
        for name, span in self.spans.items():
            part = slice(place, place + self._kept[name])
            place = part.stop
            coordinates[:, :, part] = torch.arange(span.start, span.start + self._kept[name], device=values.device)
            for samples, gradient in _whole_rows(calls.get(name, []), self._workspace):
                chosen, values[samples, :, part] = entries_above(gradient, self._kept[name])
                coordinates[samples, :, part] = chosen.add_(span.start).int()
        return values, coordinates


def num_above(size: int, share: float) -> int:
    """Return how many of ``size`` different numbers are above the percentile that leaves a share of them: at least one.

    The share is taken as the decimal that was written.
    """
    return size if share == 1 else max(1, math.ceil(Fraction(repr(float(share))) * (size - 1)))


def entries_above(gradient: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the ``kept`` largest entries of gradients ``(B, S, n)``, ascending, and their values.

    The values of those that are no larger than the next one are zero.

    Returns:
        int64 and the gradients' dtype, each ``(B, S, K)``.
    """
    size, flat = gradient.abs().nan_to_num_(nan=math.inf, posinf=math.inf), gradient.reshape(-1)
    limit = _next_largest(size, kept)
    above, full = size > limit, gradient.shape[:2].numel() * kept
    places = _nonzero(above)
    values = flat[places]
    if len(places) < full:
        tied = size == limit
        places = _nonzero(above | (tied & (tied.cumsum(2) <= kept - above.sum(2, keepdim=True))))
        values = flat[places].masked_fill_((tied & limit.isfinite()).reshape(-1)[places], 0)
    starts = torch.arange(0, len(flat), gradient.shape[2], device=flat.device).view(*gradient.shape[:2], 1)
    return places.view(*gradient.shape[:2], kept) - starts, values.view(*gradient.shape[:2], kept)


def _next_largest(size: Tensor, kept: int) -> Tensor:
    """Return the largest of ``size`` ``(B, S, n)`` that is not among the ``kept`` largest, ``(B, S, 1)``."""
    num_entries = size.shape[2]
    if kept == num_entries:
        return size.new_full((*size.shape[:2], 1), 0)
    if size.is_cuda:
        return size.topk(kept + 1, dim=2).values[..., -1:]
    place = num_entries - kept - 1
    return torch.from_numpy(np.partition(size.numpy(), place, axis=2)[..., place : place + 1])  # torch's is slower


def _nonzero(mask: Tensor) -> Tensor:
    """Return where a mask is true, in the order of memory, int64."""
    return mask.reshape(-1).nonzero()[:, 0] if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))


def _whole_rows(calls: Sequence[Factors], workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
    """Yield a block's gradients ``(b, S, O · A)`` for some samples at a time, overwritten by the next."""
    if not calls:
        return
    item = calls[0]
    if len(calls) > 1 or not isinstance(item, AffineFactors) or not item.source.weight or item.source.bias:
        yield slice(None), add_calls(calls).flatten(2)
        return
    parts: list[Tensor] = []
    for chunk in form_chunks(item, workspace):
        last = chunk.rows.stop == item.block.num_outputs
        if chunk.rows.start or not last:
            parts.append(chunk.gradient.clone())
        if last:
            yield chunk.samples, (torch.cat(parts, dim=2) if parts else chunk.gradient).flatten(2)
            parts = []
