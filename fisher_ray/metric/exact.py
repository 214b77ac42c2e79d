"""The exact sum of outer products, whole or in blocks along the diagonal, packed to one triangle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fisher_ray.errors import RequestError
from fisher_ray.metric.estimator import Arrays, added, float64_rows, refuse_non_finite
from fisher_ray.metric.symmetric import PANEL, eigh_descending, mirror, num_above_noise


@dataclass(frozen=True)
class _Panel:
    """Rows of the upper triangle that are stored together: ``rows × columns``, both from the same coordinate on."""

    rows: slice
    columns: slice
    packed: slice

    def of(self, packed: Tensor) -> Tensor:
        return packed[self.packed].view(self.rows.stop - self.rows.start, -1)


class Exact:
    """``M`` itself, or those of its blocks that a structure keeps, float64, mergeable by addition.

    Rows are multiplied in float64, whatever their dtype: float32 products would be as good for every coordinate that
    the rows reach, but would fill those that they do not reach (always, where there are fewer rows than ``D``) with
    rounding that no longer looks like zero. One triangle alone is summed, which makes it no slower, and stored, as
    panels of whole rows that start at the diagonal: half as many bytes to merge.

    Args:
        dim: ``D``.
        reach: the structure, blocks ``(start, stop, end)`` one after the other from 0 to ``D``: coordinates ``start``
            to ``stop`` are multiplied with those from ``start`` to ``end``, and ``M`` is taken to be zero beyond, and
            symmetric. ``end = stop`` keeps blocks on the diagonal, ``end =`` the next block's ``stop`` keeps
            neighbours as well; the default is one block. With neighbours, ``M`` may have negative eigenvalues.

    Raises:
        RequestError: if the blocks leave coordinates out, overlap, or reach beyond ``D``.
    """

    def __init__(self, dim: int, reach: Tensor | Sequence[Sequence[int]] | None = None) -> None:
        """See the class."""
        blocks = [(0, dim, dim)] if reach is None else [(int(a), int(b), int(c)) for a, b, c in reach]
        edges = [0, *(stop for _, stop, _ in blocks)]
        in_order = [start for start, _, _ in blocks] == edges[:-1] and edges == sorted(edges) and edges[-1] == dim
        if not in_order or not all(stop <= end <= dim for _, stop, end in blocks):
            raise RequestError(
                f"blocks (start, stop, end) {blocks}: they must follow each other from 0 to {dim}, stop <= end <= {dim}"
            )
        self.dim = dim
        self._panels = list(_panels(blocks))

    @cached_property
    def _packed(self) -> Tensor:
        return torch.zeros(self._panels[-1].packed.stop, dtype=torch.float64)  # none where sums are merged alone

    def add(self, rows: Tensor) -> None:
        """Add rows ``(K, D)``; the sums live on their device.

        Raises:
            RequestError: if ``D`` is not the estimator's.
        """
        rows = float64_rows(rows, self.dim)
        self._packed = self._packed.to(rows.device)
        for panel in self._panels:
            panel.of(self._packed).addmm_(rows[:, panel.rows].T, rows[:, panel.columns])

    def to_arrays(self) -> Arrays:
        """Return ``packed``: the panels, row by row, one after the other; :meth:`dense` unpacks them."""
        return {"packed": self._packed.cpu().numpy().copy()}

    def merge(self, left: Arrays, right: Arrays) -> Arrays:
        """Return the arrays of the rows of both."""
        return added(left, right)

    def dense(self, arrays: Arrays) -> Tensor:
        """Return ``M``, symmetric, ``(D, D)``, float64."""
        packed = torch.tensor(arrays["packed"])
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for panel in self._panels:
            total[panel.rows, panel.columns] = panel.of(packed)
        mirror(total)
        return total

    def trace(self, arrays: Arrays) -> float:
        """Return ``tr M``."""
        packed = torch.tensor(arrays["packed"])
        return float(sum(panel.of(packed).diagonal().sum() for panel in self._panels))

    def eigendecompose(self, arrays: Arrays, rank: int) -> tuple[Tensor, Tensor]:
        """Return leading eigenvalues ``(r,)``, descending, and orthonormal columns ``(D, r)``, float64.

        No eigenvalue is below ``D ε`` times the first.

        Raises:
            DataError: if the sums are not finite.
        """
        refuse_non_finite(arrays)
        values, vectors = eigh_descending(self.dense(arrays))
        keep = min(rank, num_above_noise(values))
        return values[:keep].clone(), vectors[:, :keep].contiguous()

    def quadratic_forms(self, arrays: Arrays, vectors: Tensor) -> Tensor:
        """Return ``v_iᵀ M v_i`` of columns ``(D, R)``, ``(R,)``, float64."""
        return (vectors * (self.dense(arrays) @ vectors)).sum(0)


def _panels(blocks: Iterable[tuple[int, int, int]]) -> Iterator[_Panel]:
    """Yield panels of up to :data:`PANEL` rows, each of one block."""
    place = 0
    for start, stop, end in blocks:
        for first in range(start, stop, PANEL):
            last = min(first + PANEL, stop)
            size = (last - first) * (end - first)
            yield _Panel(slice(first, last), slice(first, end), slice(place, place + size))
            place += size
