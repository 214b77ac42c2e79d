"""Rows gathered until there are enough of them for a fast product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisher_ray.errors import RequestError

NUM_ROWS = 256
"""Rows passed on at a time: a product of few rows spends its time on the sum that it is added to."""
GAP = 8
"""Numbers between two rows: rows a power of two apart share places in a processor's caches, and slow products down."""


class RowBuffer:
    """Passes rows on in float64, always so many at once, so that the parts they come in make no difference.

    Args:
        dim: ``D``.
        use: called with rows ``(K, D)``, which the next ones overwrite.
    """

    def __init__(self, dim: int, use: Callable[[Tensor], None]) -> None:
        """See the class."""
        self._dim, self._use = dim, use
        self._rows: Tensor | None = None
        self._filled = 0

    def add(self, rows: Tensor) -> None:
        """Take rows ``(K, D)``, of any float dtype.

        Raises:
            RequestError: if ``D`` is not the buffer's.
        """
        if rows.shape[1] != self._dim:
            raise RequestError(f"rows of {rows.shape[1]} coordinates were given to a sum of {self._dim}")
        if self._rows is None or self._rows.device != rows.device:
            self.flush()
            wide = torch.empty(NUM_ROWS, self._dim + GAP, dtype=torch.float64, device=rows.device)
            self._rows = wide[:, : self._dim]
        while len(rows):
            part = rows[: len(self._rows) - self._filled]
            self._rows[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rows = rows[len(part) :]
            if self._filled == len(self._rows):
                self.flush()

    def flush(self) -> None:
        """Pass on what is left."""
        if self._rows is not None and self._filled:
            filled, self._filled = self._filled, 0
            self._use(self._rows[:filled])
