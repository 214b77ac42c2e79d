"""Accuracy, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_ray.errors import DataError


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest score ``(B, C)`` is their label's ``(B,)``; the first wins a tie.

    Raises:
        DataError: if there are no rows, their numbers differ, or a score is NaN.
    """
    if scores.ndim != 2 or not len(scores) or labels.shape != scores.shape[:1]:
        raise DataError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} are not (B, C) and (B,), B > 0")
    if bool(scores.isnan().any()):
        raise DataError("a score is NaN: look at the features and the model's weights")
    return int((scores.argmax(1) == labels.to(scores.device)).sum()) / len(labels)


def best_penalty(penalties: Sequence[float], scores: Sequence[Tensor], labels: Tensor) -> tuple[int, list[float]]:
    """Return the position of the penalty whose model is the most accurate, of equals the largest, and all accuracies.

    Args:
        penalties: of the models.
        scores: of each model, ``(N, C)``, on rows that it was not fitted on.
        labels: int64 ``(N,)``.

    Raises:
        DataError: as :func:`accuracy`.
    """
    accuracies = [accuracy(values, labels) for values in scores]
    return max(range(len(penalties)), key=lambda place: (accuracies[place], penalties[place])), accuracies


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """Return the temperature under which the softmax of ``scores / T`` predicts held-out labels best.

    Minimises their mean cross-entropy (temperature scaling; Guo et al., 2017), which is convex in ``1 / T``, by
    golden-section search for ``log T`` in [log 1e-3, log 1e3] to 1e-4.

    Args:
        scores: ``(N, C)``, of rows that the model was not fitted on.
        labels: int64 ``(N,)``.

    Raises:
        DataError: as :func:`accuracy`.
    """
    accuracy(scores, labels)  # for its checks
    scores, golden = scores.double(), (math.sqrt(5) - 1) / 2

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores * math.exp(-log_temperature), labels.long()))

    low, high = math.log(1e-3), math.log(1e3)
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def wilson_interval(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval (1927) for ``correct`` of ``n``; ``z = 1.96`` covers 95 %.

    Raises:
        DataError: unless ``0 ≤ correct ≤ n`` and ``n > 0``.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise DataError(f"{correct} correct of {n} is not a share")
    share, weight = correct / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)
