"""How unlike all training samples something is, by two numbers of its features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fisher_ray.metric import LowRankMetric

CACHED_ROWS = 32
"""Rows squared at a time: their squares stay in the processor's cache."""


def norm_weights(metric: LowRankMetric, num_features: int) -> Tensor:
    """Return what squared features are multiplied by for :func:`square_norms`, float32 ``(F, 2)``: 1, and ``λ + δ``."""
    plain = (metric.eigvals + metric.dampings).float()
    return torch.stack([torch.ones(num_features), plain.repeat(num_features // len(plain))], dim=1)


def square_norms(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ_c p_c s_cᵀ (F + δ)⁻¹ s_c`` and ``Σ_c p_c ‖Uᵀ s_c‖²`` of features ``(B, F)``, float64 ``(B, 2)``."""
    squares = torch.empty(min(len(x), CACHED_ROWS), x.shape[1])
    parts = []
    for rows in torch.split(x, CACHED_ROWS):
        part = squares[: len(rows)]
        torch.mul(rows, rows, out=part)
        parts.append(part @ weights)
    return torch.cat(parts).double()


class NormMoments:
    """Number, sum and outer products of the logarithms of both norms of training samples; mergeable by addition."""

    def __init__(self) -> None:
        """Start with no rows."""
        self._array = np.zeros((3, 3))

    def add(self, norms: Tensor) -> None:
        """Take in norms ``(B, 2)``."""
        told = torch.cat([torch.ones(len(norms), 1, dtype=torch.float64), _logarithms(norms)], dim=1)
        self._array += (told.mT @ told).numpy()

    def to_array(self) -> np.ndarray:
        """Return ``Σ t tᵀ`` of ``t = (1, log, log)``, ``(3, 3)``."""
        return self._array


def novelty(norms: Tensor, moments: np.ndarray) -> Tensor:
    """Return how many standard deviations samples are away from the training samples, ``(B,)``.

    That is the Mahalanobis distance of the logarithms of a sample's two norms, under the mean and covariance of the
    training samples'. Uncertain samples have larger gradients, but both norms grow together; what is unlike the
    training samples has its gradients in directions in which theirs rarely are, or smaller or larger than any.

    Args:
        norms: of :func:`square_norms`, ``(B, 2)``.
        moments: of the training samples, :meth:`NormMoments.to_array`, added up.
    """
    count, mean = moments[0, 0], moments[0, 1:] / moments[0, 0]
    covariance = moments[1:, 1:] / count - np.outer(mean, mean)
    covariance += 1e-9 * max(np.trace(covariance), 1e-9) * np.eye(2)  # of samples that are all the same
    apart = _logarithms(norms) - torch.from_numpy(mean)
    solved = torch.from_numpy(np.linalg.solve(covariance, apart.numpy().T)).mT
    return (apart * solved).sum(1).clamp_min(0).sqrt()


def _logarithms(norms: Tensor) -> Tensor:
    return norms.double().clamp_min(torch.finfo(torch.float64).tiny).log()
