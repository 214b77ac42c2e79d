"""What a ridge regression says of a row when that row was left out of its fit: exact, without another fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisher_ray.linear.cholesky import factorise, solve
from fisher_ray.linear.columns import Columns
from fisher_ray.linear.ridge import check_penalties
from fisher_ray.linear.sums import GramSum, standardise

SMALLEST = 1e-9
"""Of ``1 − w h``: a row that alone decides its own prediction is taken to leave at least so much to the others."""


@dataclass(frozen=True, eq=False)
class RidgeSystem:
    """A fitted ridge regression with the factor of its normal equations, in float64.

    With standardised columns ``z``, ``A = Σ w z zᵀ + λ I``, and ``n = Σ w`` rows, the influence of one row on the
    prediction at another is ``h(x, x') = 1/n + zᵀ A⁻¹ z'``, the first term being the free intercept's. Without row i
    the prediction at x is ``f(x) − w_i h(x, x_i) (y_i − f(x_i)) / (1 − w_i h(x_i, x_i))``, by the Sherman-Morrison
    formula: the same as fitting anew with the same standardisation and the same ``λ``.

    Attributes:
        upper: ``Lᵀ``, ``A = L Lᵀ``, ``(F', F')``.
        index: of the columns that are used, ``(F',)``.
        mean: of these, ``(F',)``.
        inverse: what they are multiplied by once centred, ``(F',)``.
        weight: in standardised columns, ``(C, F')``.
        intercept: ``(C,)``.
        num_rows: ``n``.
    """

    upper: Tensor
    index: Tensor
    mean: Tensor
    inverse: Tensor
    weight: Tensor
    intercept: Tensor
    num_rows: float

    @classmethod
    def fit(cls, sums: GramSum, penalty: float, columns: Columns | None = None) -> RidgeSystem:
        """Fit what :func:`~fisher_ray.linear.ridge_path` fits.

        Args:
            sums: over the training rows.
            penalty: positive, relative: ``λ = penalty · n``.
            columns: as of :func:`~fisher_ray.linear.ridge_path`.

        Raises:
            RequestError: if the penalty is not positive and finite.
            DataError: if the sums are empty or not finite, or the penalty is too small.
        """
        check_penalties([penalty])
        columns = columns or Columns.all(sums.num_columns)
        gram, mean, inverse = standardise(sums, columns)
        intercept = sums.counts / sums.num_rows
        cross = (sums.cross[:, columns.index] - np.outer(intercept, mean * sums.num_rows)) * inverse
        factor = factorise(gram, penalty, sums.num_rows)
        weight = solve(factor.mT, solve(factor, torch.from_numpy(cross).mT)).mT.contiguous()
        index, mean_, inverse_ = (torch.from_numpy(value) for value in (columns.index, mean, inverse))
        return cls(factor.mT, index, mean_, inverse_, weight, torch.from_numpy(intercept), float(sums.num_rows))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return it as arrays by name."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**{name: value.numpy() for name, value in tensors.items()}, "num_rows": np.array([self.num_rows])}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> RidgeSystem:
        """Take back what :meth:`to_arrays` gave, without copying."""
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items() if name != "num_rows"}
        return cls(**tensors, num_rows=float(arrays["num_rows"][0]))

    def standardised(self, x: Tensor) -> Tensor:
        """Return ``z`` ``(B, F')``, float64, of rows ``(B, F)``."""
        return (x[:, self.index].double() - self.mean) * self.inverse

    def scores(self, z: Tensor) -> Tensor:
        """Return the predictions ``(B, C)`` at standardised rows ``(B, F')``."""
        return torch.addmm(self.intercept, z, self.weight.mT)

    def solved(self, z: Tensor) -> Tensor:
        """Return ``A⁻¹ z``, ``(B, F')``, of standardised rows ``(B, F')``."""
        return solve(self.upper, solve(self.upper.mT, z.mT)).mT

    def leverages(self, z: Tensor) -> Tensor:
        """Return ``h(x, x)``, ``(B,)``, of standardised rows ``(B, F')``."""
        return solve(self.upper.mT, z.mT).square().sum(0) + 1 / self.num_rows

    def pulls(self, z: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return how far each training row pulls predictions to its label, and its leverage.

        Args:
            z: standardised training rows, ``(B, F')``.
            labels: theirs, int64 ``(B,)``.
            weights: as how many rows each counts, ``(B,)``; by default as one.

        Returns:
            ``w (y − f) / (1 − w h)``, ``(B, C)``: the prediction at x without the row is lower by ``h(x, x_i)`` times
            it; and ``w h``, ``(B,)``.
        """
        leverage = self.leverages(z)
        residual = torch.nn.functional.one_hot(labels.long(), len(self.intercept)).double() - self.scores(z)
        if weights is not None:
            leverage, residual = leverage * weights.double(), residual * weights.double()[:, None]
        return residual / (1 - leverage).clamp_min(SMALLEST)[:, None], leverage

    def leave_one_out(self, z: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the predictions ``(B, C)`` at training rows by the fit without each, and their leverages ``(B,)``.

        Arguments as of :meth:`pulls`; the leverages are ``h(x, x)``, whatever the weights.
        """
        pulls, leverage = self.pulls(z, labels, weights)
        if weights is not None:
            leverage = leverage / weights.double().clamp_min(torch.finfo(torch.float64).tiny)
        return self.scores(z) - leverage[:, None] * pulls, leverage
