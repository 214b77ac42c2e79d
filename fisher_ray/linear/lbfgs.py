"""Deterministic L-BFGS for functions whose evaluation is a pass over the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.errors import DataError

MEMORY = 10
"""Pairs of steps and gradient differences that are remembered."""
DECREASE = 1e-4
"""Armijo's constant: the share of the linear prediction that a step has to gain."""
MAX_TRIALS = 20
"""Evaluations along one direction, before it counts as exhausted."""

Evaluate = Callable[[Tensor], tuple[float, Tensor]]
"""``params`` (float64, any shape) to the loss and its gradient, of the same shape."""


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        params: float64, shaped as the start.
        loss: there.
        num_steps: accepted steps.
        converged: whether the gradient's norm fell to the tolerance.
    """

    params: Tensor
    loss: float
    num_steps: int
    converged: bool


@dataclass(frozen=True)
class _Point:
    params: Tensor
    loss: float
    gradient: Tensor


class _Curvature:
    """The inverse Hessian's two-loop recursion (Nocedal, 1980)."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)

    def learn(self, old: _Point, new: _Point) -> None:
        step, change = new.params - old.params, new.gradient - old.gradient
        if _dot(step, change) > 1e-12 * _dot(change, change):  # else rounding has eaten the curvature
            self._pairs.append((step, change))

    def forget(self) -> bool:
        known = bool(self._pairs)
        self._pairs.clear()
        return known

    def direction(self, gradient: Tensor) -> Tensor:
        result, shares = -gradient, []
        for step, change in reversed(self._pairs):
            shares.append(_dot(step, result) / _dot(step, change))
            result = result - shares[-1] * change
        if self._pairs:
            step, change = self._pairs[-1]
            result = result * (_dot(step, change) / _dot(change, change))
        for (step, change), share in zip(self._pairs, reversed(shares), strict=True):
            result = result + (share - _dot(change, result) / _dot(step, change)) * step
        return result


def minimise(evaluate: Evaluate, start: Tensor, max_steps: int = 40, tolerance: float = 1e-5) -> Minimum:
    """Minimise a smooth function by L-BFGS with a backtracking line search.

    The first step tried along a direction is 1, which suits preconditioned coordinates: most steps then cost one
    evaluation. The loss never rises. When neither the quasi-Newton direction nor the gradient lowers the loss any
    more, as at the rounding of float32 data, the search ends without ``converged``.

    Args:
        evaluate: the function; called with float64 tensors shaped as ``start``, and never changed in between.
        start: where to begin.
        max_steps: accepted steps at most.
        tolerance: ends when the gradient's Euclidean norm is not above it.

    Returns:
        The last point accepted.

    Raises:
        DataError: if the loss or its gradient is not finite at the start.
    """
    point = _visit(evaluate, start.double())
    if not _finite(point):
        raise DataError(f"the loss is {point.loss} at the start, or its gradient is not finite: look at the features")
    curvature = _Curvature()
    for num_steps in range(max_steps):
        if float(point.gradient.norm()) <= tolerance:
            return Minimum(point.params, point.loss, num_steps, True)
        found = _search(evaluate, point, curvature.direction(point.gradient))
        if found is None and curvature.forget():
            found = _search(evaluate, point, -point.gradient)
        if found is None:
            return Minimum(point.params, point.loss, num_steps, False)
        curvature.learn(point, found)
        point = found
    return Minimum(point.params, point.loss, max_steps, float(point.gradient.norm()) <= tolerance)


def _search(evaluate: Evaluate, point: _Point, direction: Tensor) -> _Point | None:
    slope, length = _dot(point.gradient, direction), 1.0
    for _ in range(MAX_TRIALS if slope < 0 else 0):
        trial = _visit(evaluate, point.params + length * direction)
        if _finite(trial) and trial.loss <= point.loss + DECREASE * length * slope:
            return trial
        excess = trial.loss - point.loss - length * slope
        best = -slope * length / (2 * excess) if _finite(trial) and excess > 0 else 0.0  # of the parabola through both
        length *= min(max(best, 0.1), 0.5)
    return None


def _visit(evaluate: Evaluate, params: Tensor) -> _Point:
    loss, gradient = evaluate(params)
    return _Point(params, float(loss), gradient.double())


def _finite(point: _Point) -> bool:
    return bool(torch.isfinite(torch.tensor(point.loss))) and bool(torch.isfinite(point.gradient).all())


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum())
