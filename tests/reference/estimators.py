"""What estimators of ``M = Σ x xᵀ`` estimate, formed densely, and the errors that they are allowed."""

from __future__ import annotations

import numpy as np


def outer_products(rows: np.ndarray) -> np.ndarray:
    """``Σ_k x_k x_kᵀ``, ``(D, D)``, one outer product after the other."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows.astype(np.float64):
        total += np.outer(row, row)
    return total


def keep_structure(matrix: np.ndarray, reach: list[tuple[int, int, int]]) -> np.ndarray:
    """Make zero each entry whose lower coordinate's block does not reach the higher coordinate."""
    kept = np.zeros_like(matrix)
    for start, stop, end in reach:
        for low in range(start, stop):
            for high in range(low, end):
                kept[low, high] = matrix[low, high]
                kept[high, low] = matrix[high, low]
    return kept


def nystrom(matrix: np.ndarray, test: np.ndarray) -> np.ndarray:
    """``M Ω (Ωᵀ M Ω)⁺ Ωᵀ M``, for a matrix without small eigenvalues other than zero."""
    sketch = matrix @ test
    return sketch @ np.linalg.pinv(test.T @ sketch, rcond=1e-10, hermitian=True) @ sketch.T


def tails(matrix: np.ndarray) -> np.ndarray:
    """``‖A − A_k‖²_F`` of rows ``A``, ``AᵀA`` being the matrix, for ``k`` from 0 to ``D``."""
    eigvals = np.clip(np.linalg.eigvalsh(matrix), 0, None)
    return np.concatenate([np.cumsum(eigvals)[::-1], [0.0]])


def trace_norm(matrix: np.ndarray) -> float:
    """Sum the magnitudes of a symmetric matrix's eigenvalues."""
    return float(np.abs(np.linalg.eigvalsh(matrix)).sum())
