"""Obvious float64 versions of the linear models' sums and objectives, on whole data sets."""

from __future__ import annotations

import numpy as np


def standardised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns with mean 0 and variance 1 (constant ones 0), their means and scales."""
    x = x.astype(np.float64)
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-9 * np.abs(mean), scale, np.inf)
    return (x - mean) / scale, mean, scale


def logistic_objective(
    x: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, penalty: float
) -> float:
    """Mean cross-entropy plus half of penalty / C times the squared weights of the standardised columns."""
    columns, mean, scale = standardised(x)
    inner = weight * np.where(np.isfinite(scale), scale, 0)
    logits = columns @ inner.T + bias + weight @ mean
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-logs[np.arange(len(x)), labels].mean() + penalty / len(weight) / 2 * (inner**2).sum())
