"""Multinomial logistic regression, preconditioned by the same sums as ridge."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.linear.cholesky import factorise, solve
from fisher_ray.linear.ridge import LinearWeights, check_penalties, to_raw
from fisher_ray.linear.sums import GramSum, check_rows, standardise


@dataclass(frozen=True)
class Preconditioner:
    """Coordinates ``V`` in which logistic regression is well conditioned, and its penalised loss there.

    The objective is the mean cross-entropy plus ``½ penalty / C · ‖W̃‖²``, ``W̃`` weighing the standardised columns and
    the bias being free. At ``W̃ = 0`` its Hessian is ``(S / n + penalty · I) / C`` on every class contrast, ``S`` the
    standardised Gram matrix: so a penalty means the same as in :func:`~fisher_ray.linear.ridge_path`, whose solution,
    times ``C``, is the first Newton step. With ``L Lᵀ = S / n + penalty · I``, ``W̃ = √C V L⁻¹`` makes that Hessian the
    identity. Parameters are ``(C, F + 1)``: ``V``, and in the last column the biases at the columns' mean over ``√C``.

    Attributes:
        mean: the columns' ``μ``, float64 ``(F,)``.
        inverse: the columns' ``1 / σ``, 0 where constant, float64 ``(F,)``.
        factor: ``√n L``, lower, float64 ``(F, F)``.
        penalty: relative.
        num_rows: ``n``, or the sum of the rows' weights.
        num_classes: ``C``.
    """

    mean: Tensor
    inverse: Tensor
    factor: Tensor
    penalty: float
    num_rows: float
    num_classes: int

    def start(self) -> Tensor:
        """Return the parameters of the zero model, float64 ``(C, F + 1)``."""
        return torch.zeros(self.num_classes, len(self.mean) + 1, dtype=torch.float64)

    def raw(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight ``(C, F)`` and bias ``(C,)`` in the raw columns' units, float64."""
        weight = self._standardised(params) * self.inverse
        return weight, math.sqrt(self.num_classes) * params[:, -1] - weight @ self.mean

    def objective(
        self, params: Tensor, loss: float, weight_gradient: Tensor, bias_gradient: Tensor
    ) -> tuple[float, Tensor]:
        """Turn sums over all training rows into the penalised loss and its gradient.

        Args:
            params: where the sums were taken, ``(C, F + 1)``.
            loss: sum of the rows' cross-entropies.
            weight_gradient: its gradient in the raw weight, ``(C, F)``, as :func:`loss_and_gradient` gives it.
            bias_gradient: in the raw bias, ``(C,)``.

        Returns:
            The objective, and its gradient in ``params``, float64 ``(C, F + 1)``.
        """
        weight, ridge = self._standardised(params), self.penalty / self.num_classes
        centred = weight_gradient.double() - torch.outer(bias_gradient.double(), self.mean)
        inner = centred * self.inverse / self.num_rows + ridge * weight
        moved = solve(self.factor, inner.mT).mT * math.sqrt(self.num_rows)
        gradient = torch.cat([moved, bias_gradient.double()[:, None] / self.num_rows], 1)
        return loss / self.num_rows + ridge / 2 * float((weight**2).sum()), gradient * math.sqrt(self.num_classes)

    def model(self, params: Tensor) -> LinearWeights:
        """Return the model at ``params``, in float32."""
        bias = math.sqrt(self.num_classes) * params[:, -1]
        return to_raw(self.raw(params)[0].numpy(), bias.numpy(), self.mean.numpy(), self.penalty)

    def _standardised(self, params: Tensor) -> Tensor:
        weight = solve(self.factor.mT, params[:, :-1].mT).mT
        return weight * math.sqrt(self.num_classes * self.num_rows)


def preconditioner(sums: GramSum, penalty: float) -> Preconditioner:
    """Factorise the standardised covariance; holds one ``F × F`` float64 matrix besides the sums.

    Args:
        sums: over the training rows.
        penalty: positive, relative.

    Raises:
        RequestError: if the penalty is not positive and finite.
        DataError: as :func:`~fisher_ray.linear.ridge_path`.
    """
    check_penalties([penalty])
    gram, mean, inverse = standardise(sums)
    factor = factorise(gram, penalty, sums.num_rows)
    return Preconditioner(
        torch.from_numpy(mean), torch.from_numpy(inverse), factor, penalty, sums.num_rows, sums.num_classes
    )


def loss_and_gradient(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, class_weights: Tensor | None = None
) -> tuple[float, Tensor, Tensor]:
    """Sum the cross-entropy of some rows, and its gradient in the raw weight and bias.

    Matrix products are taken in the dtype of ``x``, the softmax and the sums in float64; results of several chunks add.

    Args:
        x: raw features, ``(B, F)``.
        labels: integers in ``[0, C)``, ``(B,)``.
        weight: ``(C, F)``.
        bias: ``(C,)``.
        class_weights: as how many rows each class's rows count, ``(C,)``; 1 if left out.

    Returns:
        The loss, and the gradients ``(C, F)`` and ``(C,)``, float64, on the CPU.

    Raises:
        DataError: if the shapes do not fit or a label is out of range.
    """
    num_classes, num_columns = weight.shape
    check_rows(x, labels, num_columns, num_classes)
    logits = (x @ weight.to(x).T).double() + bias.double().to(x.device)
    logs = logits.log_softmax(1)
    onehot = torch.nn.functional.one_hot(labels.long(), num_classes).to(logits)
    residual = logs.exp() - onehot
    if class_weights is not None:
        weights = class_weights.to(logs)[labels.long().to(logs.device)][:, None]
        onehot, residual = onehot * weights, residual * weights
    gradient = residual.to(x.dtype).T @ x
    return -float((onehot * logs).sum()), gradient.double().cpu(), residual.sum(0).cpu()


def sum_gradients(
    blocks: Iterable[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor, class_weights: Tensor | None = None
) -> tuple[float, float, Tensor, Tensor]:
    """Add :func:`loss_and_gradient` over blocks of features ``(B, F)`` and labels ``(B,)``.

    Returns:
        The number of rows, or the sum of their weights; the loss; and the gradients ``(C, F)`` and ``(C,)``, float64,
        on the CPU.

    Raises:
        DataError: as :func:`loss_and_gradient`.
    """
    rows = loss = 0.0
    by_weight = torch.zeros(weight.shape, dtype=torch.float64)
    by_bias = torch.zeros(bias.shape, dtype=torch.float64)
    for x, labels in blocks:
        more, d_weight, d_bias = loss_and_gradient(x, labels, weight, bias, class_weights)
        rows += len(labels) if class_weights is None else float(class_weights[labels.to(class_weights.device)].sum())
        loss += more
        by_weight += d_weight
        by_bias += d_bias
    return rows, loss, by_weight, by_bias
