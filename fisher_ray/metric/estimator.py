"""What every estimator of a Fisher matrix offers: sums that merge, and the eigenvectors that they give."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, RequestError

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


def float64_rows(rows: Tensor, dim: int) -> Tensor:
    """Return rows ``(K, D)`` in float64.

    Raises:
        RequestError: if they are not of ``dim`` coordinates.
    """
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise RequestError(f"rows of shape {tuple(rows.shape)} were given to an estimator of {dim} coordinates")
    return rows.to(torch.float64)


def added(left: Arrays, right: Arrays) -> Arrays:
    """Merge arrays that are plain sums: element by element."""
    return {name: left[name] + right[name] for name in left}


def refuse_non_finite(arrays: Arrays) -> None:
    """Let pass what can be eigendecomposed.

    Raises:
        DataError: if an entry is NaN or infinite.
    """
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise DataError("the Fisher sum holds NaN or infinity: look for extreme inputs or weights")
