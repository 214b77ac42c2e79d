"""Frequent Directions: a sketch of a Fisher matrix in ``ℓ`` rows, with an error bound that always holds."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import RequestError
from fisher_ray.metric.estimator import Arrays, float64_rows, refuse_non_finite
from fisher_ray.metric.symmetric import add_gram, eigh_descending, fix_signs, mirror, num_above_noise


class FrequentDirections:
    """At most ``ℓ`` rows ``B`` with ``M̂ = BᵀB`` close to ``M = AᵀA``, ``A`` being all rows added, in float64.

    Whatever the rows, the parts they come in and the order in which those merge, for every unit ``x`` and ``k < ℓ``
    (Liberty, 2013; Ghashami, Liberty, Phillips & Woodruff, 2016, "Frequent Directions: simple and deterministic matrix
    sketching")::

        0 ≤ xᵀ(M − M̂)x ≤ error_bound ≤ ‖A − A_k‖²_F / (ℓ − k)

    where ``A_k`` is the best approximation of ``A`` of rank ``k``: rows of rank ``ℓ`` or less are kept whole. Rounding
    comes on top, as for a matrix product of these rows.

    Rows are gathered until there are ``2ℓ`` or more; then ``δ = σ²_{ℓ+1}`` is taken from all squared singular values,
    which leaves ``ℓ`` rows. So the sum of all ``δ`` bounds what ``M̂`` lacks in any direction, while ``‖B‖²_F`` loses at
    least ``(ℓ + 1) δ`` each time, which is why the bound holds: even with ``ℓ + 1`` in place of ``ℓ``.

    Args:
        dim: ``D``.
        size: ``ℓ``; more than ``D`` rows are as good as ``D``, and those are exact.

    Raises:
        RequestError: if the size is below 1.
    """

    def __init__(self, dim: int, size: int) -> None:
        """See the class."""
        if size < 1:
            raise RequestError(f"Frequent Directions of {size} rows were asked for: give at least 1")
        self.dim, self.size = dim, min(size, dim)
        self._rows = torch.zeros(0, dim, dtype=torch.float64)
        self._trace = self._shrinkage = 0.0

    def add(self, rows: Tensor) -> None:
        """Add rows ``(K, D)``; the sketch lives on their device.

        Raises:
            RequestError: if ``D`` is not the estimator's.
        """
        rows = float64_rows(rows, self.dim)
        self._trace += float(rows.square().sum())
        self._rows = torch.cat([self._rows.to(rows.device), rows])
        if len(self._rows) >= 2 * self.size:
            self._rows, delta = shrink(self._rows, self.size)
            self._shrinkage += delta

    def to_arrays(self) -> Arrays:
        """Return ``sketch``, ``B`` ``(ℓ, D)``, ``trace`` ``(1,)``, ``M``'s own, and ``shrinkage`` ``(1,)``, ``Σ δ``."""
        kept, delta = shrink(self._rows, self.size)
        return self._arrays(kept, self._trace, self._shrinkage + delta)

    def merge(self, left: Arrays, right: Arrays) -> Arrays:
        """Return arrays of the rows of both, under the same bound."""
        rows = torch.from_numpy(np.concatenate([left["sketch"], right["sketch"]]))
        kept, delta = shrink(rows, self.size)
        trace, shrinkage = (float(left[name][0] + right[name][0]) for name in ("trace", "shrinkage"))
        return self._arrays(kept, trace, shrinkage + delta)

    def error_bound(self, arrays: Arrays) -> float:
        """Return the most that ``M̂`` can lack in any direction: ``λ_max(M − M̂)`` is not above it."""
        return float(arrays["shrinkage"][0])

    def trace(self, arrays: Arrays) -> float:
        """Return ``tr M``, not the estimate's."""
        return float(arrays["trace"][0])

    def eigendecompose(self, arrays: Arrays, rank: int) -> tuple[Tensor, Tensor]:
        """Return leading eigenvalues ``(r,)`` of ``M̂``, descending, and orthonormal columns ``(D, r)``, float64.

        There are at most ``ℓ``, and none below ``D ε`` times the first.

        Raises:
            DataError: if the sums are not finite.
        """
        refuse_non_finite(arrays)
        _, roots, transposed = torch.linalg.svd(torch.tensor(arrays["sketch"]), full_matrices=False)
        values = roots.square()
        keep = min(rank, num_above_noise(values, self.dim))
        return values[:keep].clone(), fix_signs(transposed[:keep].T.contiguous())

    def quadratic_forms(self, arrays: Arrays, vectors: Tensor) -> Tensor:
        """Return ``v_iᵀ M̂ v_i`` of columns ``(D, R)``, ``(R,)``, float64."""
        return (torch.tensor(arrays["sketch"]) @ vectors).square().sum(0)

    def _arrays(self, rows: Tensor, trace: float, shrinkage: float) -> Arrays:
        sketch = np.zeros((self.size, self.dim))
        sketch[: len(rows)] = rows.cpu().numpy()
        return {"sketch": sketch, "trace": np.array([trace]), "shrinkage": np.array([shrinkage])}


def shrink(rows: Tensor, size: int) -> tuple[Tensor, float]:
    """Return at most ``ℓ`` rows in place of ``(K, D)``, and ``δ``, by which the squared singular values are less.

    ``δ`` is the ``ℓ + 1``-th of them, or 0 where no more than ``ℓ`` are above rounding. They are taken from the smaller
    of ``BBᵀ`` and ``BᵀB``: as accurate as the products of rows that the sketch stands for, and faster than a singular
    value decomposition. Rows that are not finite, or whose products are not, give NaN.
    """
    rows = rows[rows.any(dim=1)]
    if len(rows) <= size:
        return rows, 0.0
    wide = rows.shape[1] > len(rows)
    gram = rows.new_zeros(2 * [min(rows.shape)])
    add_gram(gram, rows.T if wide else rows)
    mirror(gram)
    if not bool(torch.isfinite(gram).all()):
        return torch.full_like(rows[:size], math.nan), math.nan
    values, vectors = eigh_descending(gram)
    num_positive = num_above_noise(values)
    delta = float(values[size]) if num_positive > size else 0.0
    values, vectors = values[: min(size, num_positive)], vectors[:, : min(size, num_positive)]
    if wide:
        return (vectors * (1 - delta / values).sqrt()).T @ rows, delta
    return (vectors * (values - delta).sqrt()).T, delta
