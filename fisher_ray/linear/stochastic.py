"""Multinomial logistic regression on batches of rows: the objective's gradient on one, and Adam's step along it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.linear.moments import ColumnSums
from fisher_ray.linear.ridge import LinearWeights, check_penalties, to_raw

BETAS = (0.9, 0.999)
"""Decay of Adam's mean of gradients, and of that of their squares, a step."""
EPSILON = 1e-8
"""What Adam adds to the root of the latter."""


@dataclass(frozen=True)
class StandardColumns:
    """Logistic regression in standardised columns: the objective of :class:`~fisher_ray.linear.Preconditioner`.

    Parameters are float64 ``(C, F + 1)``: the weight ``W̃`` of the standardised columns, and in the last column the
    biases at the columns' mean. Memory is a few times that; no matrix of columns by columns is formed.

    Attributes:
        mean: the columns' ``μ``, float64 ``(F,)``.
        inverse: the columns' ``1 / σ``, 0 where constant, float64 ``(F,)``.
        row_weight: mean weight of a row.
        penalty: relative.
        num_classes: ``C``.
    """

    mean: Tensor
    inverse: Tensor
    row_weight: float
    penalty: float
    num_classes: int

    @classmethod
    def of(cls, sums: ColumnSums, penalty: float, num_classes: int) -> StandardColumns:
        """Standardise by the sums over the training rows.

        Raises:
            RequestError: if the penalty is not positive and finite.
            DataError: if there are no rows.
        """
        check_penalties([penalty])
        mean, inverse = map(torch.from_numpy, sums.standardise())
        return cls(mean, inverse, sums.row_weight, penalty, num_classes)

    def start(self) -> Tensor:
        """Return the parameters of the zero model, float64 ``(C, F + 1)``."""
        return torch.zeros(self.num_classes, len(self.mean) + 1, dtype=torch.float64)

    def raw(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight ``(C, F)`` and bias ``(C,)`` in the raw columns' units, float64."""
        weight = params[:, :-1] * self.inverse
        return weight, params[:, -1] - weight @ self.mean

    def params(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Undo :meth:`raw`; the weights of constant columns are left out."""
        varies = self.inverse > 0
        inner = torch.where(varies, weight / torch.where(varies, self.inverse, 1.0), 0.0)
        return torch.cat([inner, (bias + weight @ self.mean)[:, None]], 1)

    def loss(self, params: Tensor, loss: float, num_rows: float) -> float:
        """Return the objective, given the sum of the losses of ``num_rows`` rows, weighed by class."""
        return loss / (num_rows * self.row_weight) + self.penalty / self.num_classes / 2 * float(
            (params[:, :-1] ** 2).sum()
        )

    def gradient(self, params: Tensor, summed: Tensor, num_rows: float, batch_rows: int) -> Tensor:
        """Return a batch's part of the objective's gradient, float64 ``(C, F + 1)``.

        Divided by the rows that a batch is to have, not by those it has, every row counts the same in an epoch, those
        of a smaller last batch too, and the penalty with each.

        Args:
            params: where it is taken.
            summed: sum of the rows' gradients, raw weight and bias side by side, ``(C, F + 1)``.
            num_rows: of the batch.
            batch_rows: that it is to have.
        """
        by_bias = summed[:, -1:]
        inner = (summed[:, :-1] - by_bias * self.mean) * self.inverse / self.row_weight
        inner = inner + num_rows * self.penalty / self.num_classes * params[:, :-1]
        return torch.cat([inner, by_bias / self.row_weight], 1) / batch_rows

    def model(self, params: Tensor) -> LinearWeights:
        """Return the model at ``params``, in float32."""
        return to_raw(self.raw(params)[0].numpy(), params[:, -1].numpy(), self.mean.numpy(), self.penalty)


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, 2015) with a learning rate that falls to zero like half a cosine, so that its noise dies out.

    On correlated standardised columns it comes nearer to the optimum in as many passes than momentum does.

    Attributes:
        lr: the first step's.
    """

    lr: float

    def step(
        self, params: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, *, number: int, progress: float
    ) -> None:
        """Take a step; ``params``, ``mean`` and ``square``, of one shape, are changed in place.

        Args:
            params: to be moved.
            mean: of the gradients so far; zeros at first.
            square: of their squares; likewise.
            gradient: at ``params``.
            number: of the step, from 0.
            progress: share of the training that is done, in ``[0, 1)``.
        """
        first, second = BETAS
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        rate = self.lr * (1 + math.cos(math.pi * progress)) / 2
        scale = (square / (1 - second ** (number + 1))).sqrt_().add_(EPSILON)
        params.addcdiv_(mean / (1 - first ** (number + 1)), scale, value=-rate)
