"""What every estimator of a Fisher matrix offers: sums that merge, and the eigenvectors that they give."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

Arrays = dict[str, np.ndarray]


class Estimator(Protocol):
    """An estimate of ``M = Σ_k x_k x_kᵀ`` from rows ``x_k`` ``(D,)`` that come in any order and in any parts.

    What was summed lives in the object; :meth:`to_arrays` returns it, with the same names and shapes whatever the
    rows. The other methods read such arrays, which may be read-only, and leave the object as it is.
    """

    def add(self, rows: Tensor) -> None:
        """Add rows ``(K, D)``, of any float dtype, on any device."""

    def to_arrays(self) -> Arrays:
        """Return what was summed, float64."""

    def merge(self, left: Arrays, right: Arrays) -> Arrays:
        """Return the arrays of the rows of both."""

    def trace(self, arrays: Arrays) -> float:
        """Return ``tr M``."""

    def eigendecompose(self, arrays: Arrays, rank: int) -> tuple[Tensor, Tensor]:
        """Return leading eigenvalues ``(r,)``, descending and above rounding, and orthonormal columns ``(D, r)``.

        ``r ≤ rank``: none come back of a matrix that is zero. Both are float64, signs as
        :func:`fisher_ray.metric.symmetric.eigh_descending` fixes them.
        """

    def quadratic_forms(self, arrays: Arrays, vectors: Tensor) -> Tensor:
        """Return ``v_iᵀ M v_i`` of columns ``(D, R)``, ``(R,)``, float64."""
