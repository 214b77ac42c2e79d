"""The best so far of many scores, at both ends: found block by block, merged in any order."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]

ENDS = {"highest": -1.0, "lowest": 1.0}
"""The ends, and what values are multiplied by to be sorted, the best first; so times infinity, what loses to all."""


class Best:
    """The ``k`` highest and lowest scores of each query so far, with the rows that have them.

    Of equal scores the lower row wins. What is not there yet has the row -1.

    Args:
        num_queries: ``Q``.
        top: ``k``.
    """

    def __init__(self, num_queries: int, top: int) -> None:
        """See the class."""
        self._top = top
        self._arrays: Arrays = {}
        for end, sign in ENDS.items():
            self._arrays[f"{end}-scores"] = np.full((num_queries, top), sign * math.inf, np.float32)
            self._arrays[f"{end}-rows"] = np.full((num_queries, top), -1, np.int64)
            self._arrays[f"{end}-labels"] = np.full((num_queries, top), -1, np.int64)

    def add(self, scores: Tensor, rows: Tensor, labels: Tensor, left_out: Tensor | None = None) -> None:
        """Take in scores ``(Q, B)`` of ``rows`` ``(B,)`` with ``labels`` ``(B,)``.

        Args:
            scores: float32.
            rows: int64, ascending.
            labels: int64.
            left_out: which are not meant, bool ``(Q, B)``.
        """
        for end, sign in ENDS.items():
            value = sign * math.inf
            meant = scores if left_out is None else scores.masked_fill(left_out, value)
            values, places = _top(meant, min(self._top, len(rows)), end == "highest")
            kept = values != value
            new = {
                f"{end}-scores": values.numpy(),
                f"{end}-rows": rows[places].masked_fill(~kept, -1).numpy(),
                f"{end}-labels": labels[places].masked_fill(~kept, -1).numpy(),
            }
            self._arrays |= _merge_end(self._arrays, new, end, self._top)

    def add_found(
        self, scores: Tensor, places: Tensor, rows: Tensor, labels: Tensor, own: Tensor | None = None
    ) -> None:
        """Take in the highest scores of each query, that something else has found.

        Args:
            scores: float32 ``(Q, M)``.
            places: of what has them among ``rows``, int64 ``(Q, M)``, -1 where nothing was found.
            rows: int64 ``(B,)``.
            labels: int64 ``(B,)``.
            own: rows that are the queries themselves, and not meant, int64 ``(Q,)``.
        """
        there = places >= 0
        if not len(rows):
            return
        found = rows[places.clamp_min(0)]
        if own is not None:
            there &= found != own[:, None]
        new = {
            "highest-scores": scores.masked_fill(~there, -math.inf).numpy(),
            "highest-rows": found.masked_fill(~there, -1).numpy(),
            "highest-labels": labels[places.clamp_min(0)].masked_fill(~there, -1).numpy(),
        }
        self._arrays |= _merge_end(self._arrays, new, "highest", self._top)

    def to_arrays(self) -> Arrays:
        """Return ``highest-scores``, ``-rows``, ``-labels`` and ``lowest-…``, each ``(Q, k)``, the best first."""
        return dict(self._arrays)


def _top(scores: Tensor, top: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Return the ``top`` first of each line ``(Q, B)`` and their places; of equals, those of the lowest places."""
    values, places = scores.topk(top, dim=1, largest=largest)
    last = values[:, -1:]
    unsure = ((scores == last).sum(1) > (values == last).sum(1)).nonzero()[:, 0]  # which equals topk took is chance
    if len(unsure):
        sure, order = scores[unsure].sort(dim=1, descending=largest, stable=True)
        values[unsure], places[unsure] = sure[:, :top], order[:, :top]
    return values, places


def merge_best(left: Arrays, right: Arrays) -> Arrays:
    """Merge what two :class:`Best` of the same queries found."""
    merged: Arrays = {}
    for end in ENDS:
        merged |= _merge_end(left, right, end, left[f"{end}-rows"].shape[1])
    return merged


def _merge_end(left: Arrays, right: Arrays, end: str, top: int) -> Arrays:
    names = [f"{end}-{what}" for what in ("scores", "rows", "labels")]
    scores, rows, labels = (np.concatenate([left[name], right[name]], axis=1) for name in names)
    order = np.lexsort((np.where(rows < 0, np.iinfo(rows.dtype).max, rows), ENDS[end] * scores), axis=1)[:, :top]
    return {
        name: np.take_along_axis(value, order, axis=1)
        for name, value in zip(names, (scores, rows, labels), strict=True)
    }


NUM_BINS = 100
"""Of the cosines' histogram."""


def count_cosines(cosines: Tensor, alike: Tensor, left_out: Tensor | None = None) -> np.ndarray:
    """Count cosines ``(Q, B)`` in bins of [-1, 1]: of pairs of one class, and of two; int64 ``(2, NUM_BINS)``.

    Args:
        cosines: beyond the ends by rounding at most.
        alike: whether a pair is of one class, bool ``(Q, B)``.
        left_out: which pairs do not count, bool ``(Q, B)``.
    """
    bins = ((cosines + 1) * (NUM_BINS / 2)).long().clamp_(0, NUM_BINS - 1) + NUM_BINS * (~alike)
    counted = bins.flatten() if left_out is None else bins[~left_out]
    return torch.bincount(counted, minlength=2 * NUM_BINS).reshape(2, NUM_BINS).numpy()
