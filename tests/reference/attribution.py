"""Obvious float64 versions of scores between samples, of whole data sets at once, and of fits without a row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def unit_length(x: np.ndarray) -> np.ndarray:
    """Rows ``(N, F)`` over their Euclidean lengths."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities ``(N, C)``."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def class_scores(phi: np.ndarray, logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Scores ``(N, R)`` of one class of each sample, of features ``(N, C, R)`` that are ``√p_c s_c``."""
    rows = np.arange(len(phi))
    return phi[rows, classes] / np.sqrt(softmax(logits)[rows, classes])[:, None]


def gaps(n: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By how much products of two rows of one class exceed those of two classes, ``(F,)``, over all pairs."""
    alike, apart = labels[:, None] == labels, labels[:, None] != labels
    np.fill_diagonal(alike, False)
    within = np.einsum("aj,bj,ab->j", n, n, alike.astype(float)) / alike.sum()
    return within - np.einsum("aj,bj,ab->j", n, n, apart.astype(float)) / apart.sum()


def best(scores: np.ndarray, rows: np.ndarray, labels: np.ndarray, top: int, sign: int) -> dict[str, np.ndarray]:
    """Scores ``(Q, top)`` and whose they are, sorted whole: the largest first for ``sign`` -1, the smallest for 1.

    NaN stands for a pair that is not meant. Of equals the lower row comes first.
    """
    shape = (len(scores), top)
    found = {"scores": np.full(shape, sign * np.inf), "rows": np.full(shape, -1), "labels": np.full(shape, -1)}
    for query, line in enumerate(scores):
        meant = np.flatnonzero(~np.isnan(line))
        order = meant[np.lexsort((rows[meant], sign * line[meant]))][:top]
        for name, values in (("scores", line), ("rows", rows), ("labels", labels)):
            found[name][query, : len(order)] = values[order]
    return found


def standardised(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1, constant ones 0, each row counting as ``counts`` rows."""
    mean = np.average(x, axis=0, weights=counts)
    scale = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=counts))
    return (x - mean) / np.where(scale > 1e-5 * np.abs(mean), scale, np.inf)


def fit(
    z: np.ndarray, targets: np.ndarray, counts: np.ndarray, ridge: float, without: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares with a free intercept and ``ridge ‖W‖²``, fitted anew without one of the rows; its predictions."""
    kept = np.arange(len(z)) != without
    design = np.sqrt(counts[kept])[:, None] * np.column_stack([np.ones(kept.sum()), z[kept]])
    penalised = np.column_stack([np.zeros(z.shape[1]), np.sqrt(ridge) * np.eye(z.shape[1])])
    wanted = np.concatenate([np.sqrt(counts[kept])[:, None] * targets[kept], np.zeros((z.shape[1], targets.shape[1]))])
    solution = np.linalg.lstsq(np.concatenate([design, penalised]), wanted, rcond=None)[0]
    return lambda at: solution[0] + at @ solution[1:]


def leverages(z: np.ndarray, counts: np.ndarray, ridge: float) -> np.ndarray:
    """The diagonal of ``D (Σ w d dᵀ + ridge I₋)⁻¹ Dᵀ``, ``d`` with a one in front, whose weight is not penalised."""
    design = np.column_stack([np.ones(len(z)), z])
    normal = design.T @ (counts[:, None] * design) + np.diag([0.0, *np.full(z.shape[1], ridge)])
    return np.diag(design @ np.linalg.solve(normal, design.T))
