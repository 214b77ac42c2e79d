"""Which of the columns a linear model uses, and as how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fisher_ray.errors import RequestError


@dataclass(frozen=True, eq=False)
class Columns:
    """Some of ``F`` columns, and what each is multiplied by once it is standardised.

    A ridge penalty shrinks a column the less the larger its scale: columns scaled by ``s`` and penalised alike are
    standardised columns penalised by ``1 / s²``.

    Attributes:
        index: ascending, in ``[0, F)``, ``(F',)``.
        scales: positive, ``(F',)``.
        num_columns: ``F``.

    Raises:
        RequestError: if these do not fit together.
    """

    index: np.ndarray
    scales: np.ndarray
    num_columns: int

    def __post_init__(self) -> None:
        """Check the attributes once."""
        inside = len(self.index) and self.index[0] >= 0 and self.index[-1] < self.num_columns
        if not inside or not (np.diff(self.index) > 0).all():
            raise RequestError(f"the chosen columns are none, or not ascending in [0, {self.num_columns})")
        if self.scales.shape != self.index.shape or not (self.scales > 0).all():
            raise RequestError(f"{len(self.index)} columns need as many positive scales, not {self.scales.shape}")

    @classmethod
    def all(cls, num_columns: int) -> Columns:
        """Return all ``F`` columns, each counting the same."""
        return cls(np.arange(num_columns), np.ones(num_columns), num_columns)

    def spread(self, weight: np.ndarray) -> np.ndarray:
        """Return weights of the chosen columns, ``(C, F')``, as weights of all, ``(C, F)``: the others get zero."""
        out = np.zeros((len(weight), self.num_columns))
        out[:, self.index] = weight
        return out


def feature_columns(
    eigvals: Tensor, num_scores: int, num_hidden: int, rank: int | None, relative_damping: float | None, mean: Tensor
) -> Columns:
    """Return the columns of the leading directions of a metric, weighed as another damping would, and all hidden ones.

    Features are ``√p (Λ + δ)^(−½) Uᵀ s``; standardising them takes ``δ`` out again. The scale ``√(λ / (λ + δ'))`` puts
    ``δ' = relative_damping · mean`` in: directions of eigenvalues below it are penalised more.

    Args:
        eigvals: ``Λ`` of the features of one score, ``(R,)``.
        num_scores: ``C``, or 1.
        num_hidden: columns of the last hidden layer after the features'; they are standardised alone.
        rank: how many features of each score, those of the largest eigenvalues; None for all.
        relative_damping: not negative; None for standardised columns.
        mean: eigenvalue that the damping is relative to, for each feature, ``(R,)``.

    Raises:
        RequestError: if the metric has fewer features than ``rank``.
    """
    if rank is not None and rank > len(eigvals):
        raise RequestError(f"linear.ranks has {rank}, and the metric has rank {len(eigvals)}. Ask for no more.")
    chosen = eigvals.argsort(descending=True, stable=True)[:rank].sort().values
    scales = np.ones(len(chosen))
    if relative_damping is not None:
        kept = eigvals[chosen].double()
        floor = kept + (relative_damping * mean[chosen].double()).clamp(min=float(kept.max()) * 1e-12)
        scales = (kept.clamp(min=float(kept.max()) * 1e-12) / floor).sqrt().numpy()
    width, places = num_scores * len(eigvals), np.arange(num_scores)[:, None] * len(eigvals)
    index = np.concatenate([(places + chosen.numpy()).reshape(-1), width + np.arange(num_hidden)])
    return Columns(index, np.concatenate([np.tile(scales, num_scores), np.ones(num_hidden)]), width + num_hidden)


def grid(ranks: Sequence[int] | None, dampings: Sequence[float | None]) -> list[tuple[int | None, float | None]]:
    """Return every pair of a rank and a damping that is to be tried."""
    tried: list[int | None] = list(ranks) if ranks else [None]
    return [(rank, damping) for rank in tried for damping in dampings]
