"""Ridge regression on one-hot labels, in closed form from the sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import RequestError
from fisher_ray.linear.cholesky import factorise, solve
from fisher_ray.linear.columns import Columns
from fisher_ray.linear.shifts import solve_shifted
from fisher_ray.linear.sums import GramSum, standardise

FAR = 1e3
"""Penalties so many times apart do not share a factor: the Krylov space would grow too large."""


@dataclass(frozen=True)
class LinearWeights:
    """A linear model in the raw columns' units.

    Attributes:
        weight: float32 ``(C, F)``.
        bias: float32 ``(C,)``.
        penalty: relative, as it was asked for.
        temperature: what scores are divided by before the softmax that makes probabilities of them.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    temperature: float = 1.0

    def scores(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + b`` ``(B, C)`` of features ``(B, F)``, in the features' dtype and on their device."""
        return torch.nn.functional.linear(x, self.weight.to(x), self.bias.to(x))

    def to_probabilities(self, scores: Tensor) -> Tensor:
        """Return the softmax of ``scores / temperature``, ``(B, C)``."""
        return (scores / self.temperature).softmax(dim=-1)


def ridge_path(sums: GramSum, penalties: Sequence[float], columns: Columns | None = None) -> list[LinearWeights]:
    """Fit one ridge regression for each penalty.

    Minimises ``‖Ỹ − X̃ W̃ᵀ‖² + λ ‖W̃‖²`` over the standardised columns ``X̃`` and the centred one-hot labels ``Ỹ``, the
    intercept being free, with ``λ = penalty · n``: ``n``, the number of rows, is the mean diagonal of ``X̃ᵀ X̃`` over the
    columns that vary. Constant columns get the weight 0, as do classes without rows.

    A penalty in the middle is factorised (``F³ / 3`` operations), and the others are solved in the Krylov space of that
    factor (:func:`~fisher_ray.linear.shifts.solve_shifted`), which they share; those too far off for it, about three
    orders of magnitude, have another factor. Holds one ``F × F`` float64 matrix besides the sums.

    Args:
        sums: over the training rows.
        penalties: positive, relative.
        columns: which of the columns, and what each is multiplied by once standardised; by default all, as they are.

    Returns:
        The models, of all ``F`` columns, in the penalties' order.

    Raises:
        RequestError: if a penalty is not positive and finite.
        DataError: if the sums are empty or not finite, or if a penalty is so small that the matrix is not positive
            definite in float64 (with collinear columns, below about 1e-6, where float32 products end).
    """
    check_penalties(penalties)
    columns = columns or Columns.all(sums.num_columns)
    found: dict[float, LinearWeights] = {}
    while left := sorted(set(penalties) - set(found)):
        gram, mean, inverse = standardise(sums, columns)
        target_mean = sums.counts / sums.num_rows
        cross = (sums.cross[:, columns.index] - np.outer(target_mean, mean * sums.num_rows)) * inverse
        for penalty, solved in _solve_some(gram, torch.from_numpy(cross).mT, left, sums.num_rows).items():
            weight = solved.mT.numpy() * inverse
            bias = torch.from_numpy(target_mean - weight @ mean).float()
            found[penalty] = LinearWeights(torch.from_numpy(columns.spread(weight)).float(), bias, penalty)
    return [found[penalty] for penalty in penalties]


def _solve_some(gram: np.ndarray, right: Tensor, penalties: Sequence[float], num_rows: float) -> dict[float, Tensor]:
    """Solve the systems ``(F, C)`` of the middle penalty and of those near enough to it; ``gram`` is overwritten."""
    middle = math.sqrt(penalties[0]) * math.sqrt(penalties[-1])
    pivot = min(penalties, key=lambda penalty: abs(math.log(penalty / middle)))
    factor = factorise(gram, pivot, num_rows)
    near = [penalty for penalty in penalties if penalty != pivot and abs(math.log(penalty / pivot)) < math.log(FAR)]
    shifted = solve_shifted(factor, right, [(penalty - pivot) * num_rows for penalty in near]) if near else []
    solved = {penalty: found for penalty, found in zip(near, shifted, strict=True) if found is not None}
    return {pivot: solve(factor.mT, solve(factor, right)), **solved}


def check_penalties(penalties: Sequence[float]) -> None:
    """Refuse penalties that are not positive and finite.

    Raises:
        RequestError: naming the first.
    """
    for penalty in penalties:
        if not (math.isfinite(penalty) and penalty > 0):
            raise RequestError(f"penalty {penalty} is not a positive number")


def to_raw(weight: np.ndarray, intercept: np.ndarray, mean: np.ndarray, penalty: float) -> LinearWeights:
    """Turn ``intercept`` ``(C,)``, the scores at the columns' ``mean``, into a bias; ``weight`` ``(C, F)`` is raw."""
    bias = intercept - weight @ mean
    return LinearWeights(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), penalty)
