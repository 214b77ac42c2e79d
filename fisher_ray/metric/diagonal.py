"""The diagonal of a Fisher matrix: every coordinate by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_ray.metric.estimator import Arrays, added, float64_rows, refuse_non_finite


class Diagonal:
    """``diag(M)`` alone, float64, mergeable by addition; all else in ``M`` is taken to be zero.

    The coarsest of the estimates, in ``D`` numbers: the diagonal that, for example, Kirkpatrick et al. (2017,
    "Overcoming catastrophic forgetting in neural networks") weight parameters by.

    Args:
        dim: ``D``.
    """

    def __init__(self, dim: int) -> None:
        """See the class."""
        self.dim = dim
        self._sums = torch.zeros(dim, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows ``(K, D)``; the sums live on their device.

        Raises:
            RequestError: if ``D`` is not the estimator's.
        """
        rows = float64_rows(rows, self.dim)
        self._sums = self._sums.to(rows.device) + rows.square().sum(0)

    def to_arrays(self) -> Arrays:
        """Return ``diagonal``, ``(D,)``."""
        return {"diagonal": self._sums.cpu().numpy()}

    def merge(self, left: Arrays, right: Arrays) -> Arrays:
        """Return the arrays of the rows of both."""
        return added(left, right)

    def trace(self, arrays: Arrays) -> float:
        """Return ``tr M``, which is exact."""
        return float(arrays["diagonal"].sum())

    def eigendecompose(self, arrays: Arrays, rank: int) -> tuple[Tensor, Tensor]:
        """Return the largest diagonal entries ``(r,)`` and their coordinates' unit vectors ``(D, r)``, float64.

        Of equal entries the first comes first. All that are positive count: an entry's rounding is relative to itself.

        Raises:
            DataError: if the sums are not finite.
        """
        refuse_non_finite(arrays)
        values, order = torch.tensor(arrays["diagonal"]).sort(descending=True, stable=True)
        keep = min(rank, int((values > 0).sum()))
        vectors = torch.zeros(self.dim, keep, dtype=torch.float64)
        vectors[order[:keep], torch.arange(keep)] = 1
        return values[:keep].clone(), vectors

    def quadratic_forms(self, arrays: Arrays, vectors: Tensor) -> Tensor:
        """Return ``Σ_j v_ij² d_j`` of columns ``v_i``, ``(D, R)``, ``(R,)``, float64."""
        return torch.tensor(arrays["diagonal"]) @ vectors.square()
