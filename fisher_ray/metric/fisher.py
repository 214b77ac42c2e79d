"""The exact Fisher sum in compressed coordinates, its damping and its eigendecomposition."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError

HELD_OUT = 5
"""One sample in so many is held out to choose the damping."""


class FisherSum:
    """``Σ_x Σ_c p_c s_c s_cᵀ`` in ``D`` coordinates, float64, mergeable by addition.

    Samples whose index is divisible by :data:`HELD_OUT` are summed apart, so that the damping can be chosen on rows
    that the eigenvectors have not seen, whatever the number of units.

    Args:
        dim: ``D``.
    """

    def __init__(self, dim: int) -> None:
        """See the class."""
        self._sums = torch.zeros(2, dim, dim, dtype=torch.float64)
        self._counts = torch.zeros(2, dtype=torch.float64)

    def add(self, compressed: Tensor, index: Tensor) -> None:
        """Add weighted compressed scores ``(B, S, D)`` of the samples ``index`` ``(B,)``."""
        held = index % HELD_OUT == 0
        for slot, rows in enumerate((~held, held)):
            chosen = compressed[rows].flatten(0, 1)
            self._sums[slot] += (chosen.T @ chosen).to("cpu", torch.float64)
            self._counts[slot] += float(rows.sum())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return ``fisher`` ``(2, D, D)`` and ``counts`` ``(2,)``: fitted on, held out."""
        return {"fisher": self._sums.numpy(), "counts": self._counts.numpy()}


def decompose(sums: dict[str, np.ndarray], rank: int, damping: str | float) -> tuple[Tensor, Tensor, float]:
    """Eigendecompose the merged Fisher sum.

    Args:
        sums: merged :class:`FisherSum` arrays.
        rank: ``R``; fewer eigenvectors come back when fewer eigenvalues are above float64 noise.
        damping: relative to the mean eigenvalue, or ``auto`` (see :func:`held_out_damping`).

    Returns:
        Eigenvalues ``(R,)`` descending, eigenvectors ``(D, R)``, float64, and the damping in the eigenvalues' unit.

    Raises:
        DataError: if the sum is not finite or is zero.
    """
    fisher, counts = torch.tensor(sums["fisher"]), torch.tensor(sums["counts"])
    total = fisher.sum(0) / counts.sum()
    if not bool(torch.isfinite(total).all()):
        raise DataError("the Fisher sum holds NaN or infinity: look for extreme inputs or weights")
    eigvals, eigvecs = _leading(total, rank)
    mean = float(total.trace()) / len(total)
    if damping != "auto":
        return eigvals, eigvecs, float(damping) * mean
    if not bool((counts > 0).all()):
        raise DataError(f"metric.damping auto holds out one sample in {HELD_OUT}; give more rows or a number")
    held_vals, held_vecs = _leading(fisher[0] / counts[0], rank)
    variances = ((fisher[1] / counts[1] @ held_vecs) * held_vecs).sum(0)
    return eigvals, eigvecs, held_out_damping(held_vals, variances, mean)


def held_out_damping(eigvals: Tensor, variances: Tensor, mean: float) -> float:
    """Choose the damping ``δ`` under which held-out second moments are closest to the identity.

    Minimises the log-det divergence (Stein's loss; James & Stein, 1961) of the whitened held-out Fisher ``M`` from the
    identity, ``tr M − log det M``, which in the eigenbasis is ``Σ_i v_i / (λ_i + δ) + log(λ_i + δ)`` up to a constant.

    Args:
        eigvals: ``λ``, fitted on the other rows, ``(R,)``.
        variances: ``v``, the held-out Fisher's diagonal in the same eigenvectors, ``(R,)``.
        mean: the mean eigenvalue; ``δ`` is searched on 241 points of ``[1e-6, 1e2]`` times it.
    """
    grid = mean * torch.logspace(-6, 2, 241, dtype=torch.float64)
    damped = eigvals[None] + grid[:, None]
    loss = (variances / damped + damped.log()).sum(1)
    return float(grid[int(loss.argmin())])


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = int((values > values[0].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps).sum())
    if keep == 0:
        raise DataError("the Fisher sum is zero: the metric has no direction. Is the network's output constant?")
    keep = min(rank, keep)
    return values[:keep].clone(), vectors[:, :keep].clone()
