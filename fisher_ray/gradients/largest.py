"""The largest entries of each sample's gradient, layer by layer, as Daróczy et al. (2018) keep them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_ray.gradients.blocks import Block
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
