"""Ridge regression on one-hot labels, in closed form from the sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, RequestError
from fisher_ray.linear.sums import GramSum, standardise


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


def ridge_path(sums: GramSum, penalties: Sequence[float]) -> list[LinearWeights]:
    """Fit one ridge regression for each penalty.

    Minimises ``‖Ỹ − X̃ W̃ᵀ‖² + λ ‖W̃‖²`` over the standardised columns ``X̃`` and the centred one-hot labels ``Ỹ``, the
    intercept being free, with ``λ = penalty · n``: ``n``, the number of rows, is the mean diagonal of ``X̃ᵀ X̃`` over the
    columns that vary. Constant columns get the weight 0, as do classes without rows.

    Holds one or, for several penalties, two ``F × F`` float64 matrices besides the sums, and takes one Cholesky
    factorisation (``F³ / 3`` operations) a penalty.

    Args:
        sums: over the training rows.
        penalties: positive, relative.

    Returns:
        The models in the penalties' order.

    Raises:
        RequestError: if a penalty is not positive and finite.
        DataError: if the sums are empty or not finite, or if a penalty is so small that the matrix is not positive
            definite in float64 (with collinear columns, below about 1e-6, where float32 products end).
    """
    check_penalties(penalties)
    gram, mean, inverse = standardise(sums)
    target_mean = sums.counts / sums.num_rows
    cross = (sums.cross - np.outer(target_mean, sums.cross.sum(0))) * inverse
    spare = np.zeros_like(gram) if len(penalties) > 1 else gram
    models = []
    for position, penalty in enumerate(penalties):
        last = position == len(penalties) - 1
        if not last:
            np.copyto(spare, gram)
        factor = factorise(gram if last else spare, penalty, sums.num_rows)
        solved = solve(factor.mT, solve(factor, torch.from_numpy(cross).mT)).mT
        models.append(to_raw(solved.numpy() * inverse, target_mean, mean, penalty))
    return models


def check_penalties(penalties: Sequence[float]) -> None:
    """Refuse penalties that are not positive and finite.

    Raises:
        RequestError: naming the first.
    """
    for penalty in penalties:
        if not (math.isfinite(penalty) and penalty > 0):
            raise RequestError(f"penalty {penalty} is not a positive number")


def factorise(gram: np.ndarray, penalty: float, num_rows: int) -> Tensor:
    """Replace ``gram`` (upper triangle) by the Cholesky factor of ``gram + penalty · n · I``.

    Returns:
        The lower factor ``L``, float64 ``(F, F)``, in the memory of ``gram``.

    Raises:
        DataError: if the matrix is not positive definite.
    """
    matrix = torch.from_numpy(gram).mT  # column-major, as LAPACK has it: so nothing is copied
    matrix.diagonal().add_(penalty * num_rows)
    info = torch.zeros((), dtype=torch.int32)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if int(info):
        raise DataError(
            f"with penalty {penalty} the standardised Gram matrix of {len(gram)} columns and {num_rows} rows is not "
            "positive definite: columns are collinear. Raise linear.penalties."
        )
    return matrix


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solve ``factor · X = right`` for a triangular factor ``(F, F)``, column-major if lower, row-major if upper."""
    solved: Tensor = torch.linalg.solve_triangular(factor, right, upper=factor.stride(0) != 1)
    return solved


def to_raw(weight: np.ndarray, intercept: np.ndarray, mean: np.ndarray, penalty: float) -> LinearWeights:
    """Turn ``intercept`` ``(C,)``, the scores at the columns' ``mean``, into a bias; ``weight`` ``(C, F)`` is raw."""
    bias = intercept - weight @ mean
    return LinearWeights(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), penalty)
