"""The exact Fisher sum in compressed coordinates, its damping and its eigendecomposition."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, RequestError
from fisher_ray.metric.symmetric import add_gram, eigh_descending, mirror, num_above_noise

HELD_OUT = 5
"""One sample in so many is held out to choose the damping."""
_GOLDEN, _CIRCLE = 2654435769, 2**32


class FisherSum:
    """``Σ_x Σ_c p_c s_c s_cᵀ`` in ``D`` coordinates, float64, mergeable by addition.

    One sample in :data:`HELD_OUT` is summed apart, see :func:`is_held_out`, so that the damping can be chosen on rows
    that the eigenvectors have not seen, whatever the number of units.

    Scores are multiplied in float64, whatever their dtype: float32 products would be as good for every coordinate that
    the scores reach, but would fill those that they do not reach (always, where ``N (C − 1) < D``) with rounding that
    no longer looks like zero to :func:`decompose`. One triangle alone is summed, which makes it no slower.

    Args:
        dim: ``D``.
    """

    def __init__(self, dim: int) -> None:
        """See the class."""
        self._sums = torch.zeros(2, dim, dim, dtype=torch.float64)
        self._counts = torch.zeros(2, dtype=torch.float64)

    def add(self, compressed: Tensor, index: Tensor) -> None:
        """Add weighted compressed scores ``(B, S, D)`` of the samples ``index`` ``(B,)``; sums live on their device."""
        held = is_held_out(index).to(compressed.device)
        self._sums = self._sums.to(compressed.device)
        for total, rows in zip(self._sums, (~held, held), strict=True):
            if bool(rows.any()):
                add_gram(total, compressed[rows].flatten(0, 1).to(torch.float64))
        num_held = int(held.sum())
        self._counts += torch.tensor([len(held) - num_held, num_held])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return ``fisher`` ``(2, D, D)`` and ``counts`` ``(2,)``: fitted on, held out.

        Adding the arrays of several sums element by element merges the sums.
        """
        for total in self._sums:
            mirror(total)
        return {"fisher": self._sums.cpu().numpy(), "counts": self._counts.numpy()}


def is_held_out(index: Tensor) -> Tensor:
    """Return whether each sample is held out: ``(B,)`` sample indices, non-negative, to booleans ``(B,)``.

    Steps of the golden ratio around a circle, of which an arc is held out: close to its share in every run of
    samples, and in every arithmetic progression of them, so data ordered with a period (a class after the other, a
    view after the other) is not held out by class or view.
    """
    return index.long() % 2**31 * _GOLDEN % _CIRCLE < _CIRCLE // HELD_OUT


def decompose(sums: dict[str, np.ndarray], rank: int, damping: str | float) -> tuple[Tensor, Tensor, float]:
    """Eigendecompose the merged Fisher sum.

    Args:
        sums: merged :class:`FisherSum` arrays.
        rank: ``R``; fewer eigenvectors come back when fewer eigenvalues are above float64 noise.
        damping: relative to the mean of all ``D`` eigenvalues, or ``auto`` (see :func:`held_out_damping`).

    Returns:
        Eigenvalues ``(R,)`` descending, and eigenvectors ``(D, R)``, their signs fixed as in
        :func:`fisher_ray.metric.symmetric.eigh_descending`, both float64; the damping in the eigenvalues' unit.

    Raises:
        DataError: if the sum has no rows, is not finite or is zero.
        RequestError: if the rank or the damping is out of range.
    """
    if rank < 1 or (damping != "auto" and not 0 <= _number(damping) < math.inf):
        raise RequestError(f"rank {rank} and damping {damping!r}: give a rank of at least 1, and auto or a number >= 0")
    fisher, counts = sums["fisher"], sums["counts"]
    if not counts.sum() > 0:
        raise DataError("the Fisher sum has no rows: all were skipped, or there are none")
    if damping == "auto" and not counts.all():
        raise DataError(f"metric.damping auto holds out one sample in {HELD_OUT}; give more rows or a number")
    total = torch.from_numpy(fisher.sum(0) / counts.sum())
    if not bool(torch.isfinite(total).all()):
        raise DataError("the Fisher sum holds NaN or infinity: look for extreme inputs or weights")
    eigvals, eigvecs = _leading(total, rank)
    mean = float(total.trace()) / len(total)
    if damping != "auto":
        return eigvals, eigvecs, float(damping) * mean
    held_vals, held_vecs = _leading(torch.from_numpy(fisher[0] / counts[0]), rank)
    variances = ((torch.from_numpy(fisher[1] / counts[1]) @ held_vecs) * held_vecs).sum(0)
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


def _number(damping: str | float) -> float:
    return math.nan if isinstance(damping, str) else float(damping)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    values, vectors = eigh_descending(matrix)
    keep = min(rank, num_above_noise(values))
    if keep == 0:
        raise DataError("the Fisher sum is zero: the metric has no direction. Is the network's output constant?")
    return values[:keep].clone(), vectors[:, :keep].contiguous()
