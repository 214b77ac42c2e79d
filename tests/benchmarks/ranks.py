"""Rank correlation."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each pair of rows, ``(Q, N)`` and ``(Q, N)`` to ``(Q,)``; 0 of constant ones."""
    ranks = [rankdata(values, axis=1) for values in (left, right)]
    one, other = (values - values.mean(axis=1, keepdims=True) for values in ranks)
    norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return (one * other).sum(axis=1) / np.maximum(norms, 1e-12)
