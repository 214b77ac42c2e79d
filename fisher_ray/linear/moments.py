"""The sums that standardise columns without their Gram matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError
from fisher_ray.linear.sums import CONSTANT


class ColumnSums:
    """``Σ x`` and ``Σ x²`` of ``F`` columns over rows, and how many these are, float64, mergeable by addition.

    Attributes:
        total: ``Σ x``, ``(F,)``.
        square: ``Σ x²``, ``(F,)``.
        counts: rows, and the sum of their weights, ``(2,)``.
    """

    def __init__(self, total: np.ndarray, square: np.ndarray, counts: np.ndarray) -> None:
        """Keep the arrays themselves, without copying."""
        self.total, self.square, self.counts = total, square, counts

    @classmethod
    def zeros(cls, num_columns: int) -> ColumnSums:
        """Start with no rows."""
        return cls(np.zeros(num_columns), np.zeros(num_columns), np.zeros(2))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> ColumnSums:
        """Take back what :meth:`to_arrays` gave, without copying."""
        return cls(arrays["total"], arrays["square"], arrays["counts"])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays themselves; adding those of several sums element by element merges the sums."""
        return {"total": self.total, "square": self.square, "counts": self.counts}

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return int(self.counts[0])

    @property
    def row_weight(self) -> float:
        """Mean weight of a row."""
        return float(self.counts[1] / self.counts[0])

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: ``(B, F)``, float32 or float64, on the CPU.
            weights: as how many rows each counts, ``(B,)``; 1 if left out.

        Raises:
            DataError: if a feature is NaN or infinite.
        """
        rows = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
        values = x.double()
        self.total += (rows @ values).numpy()
        self.square += (rows @ values**2).numpy()
        self.counts += (len(x), float(rows.sum()))
        if not (np.isfinite(self.total).all() and np.isfinite(self.square).all()):
            raise DataError("a feature is NaN or infinite: verify the feature store")

    def standardise(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns' mean ``μ`` and ``1 / σ``, 0 where a column is constant, ``(F,)`` each.

        Raises:
            DataError: if there are no rows.
        """
        if not self.counts[1] > 0:
            raise DataError("a linear model was asked for on no rows: all were skipped, or the split is empty")
        mean, square = self.total / self.counts[1], self.square / self.counts[1]
        variance = square - mean**2
        varies = variance > CONSTANT * square
        return mean, np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0.0)
