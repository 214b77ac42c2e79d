"""Sums of outer products and eigendecompositions of symmetric matrices, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 256
"""Rows of the triangle multiplied at a time: enough for a fast product, few enough to skip almost half of it."""


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``Σ_k x_k x_kᵀ`` to the upper triangle of ``total``, for little more than half of a whole product's work.

    Args:
        total: float64 ``(n, n)``; what stands below its diagonal means nothing until :func:`mirror`.
        rows: ``x``, ``(K, n)``, on the same device; products and their sums over ``K`` are taken in its dtype.
    """
    for start in range(0, rows.shape[1], PANEL):
        panel = slice(start, start + PANEL)
        total[panel, start:] += rows[:, panel].T @ rows[:, start:]


def mirror(total: Tensor) -> None:
    """Copy the upper triangle of ``(n, n)`` below the diagonal, in place."""
    for start in range(0, len(total), PANEL):
        panel, rest = slice(start, start + PANEL), slice(start + PANEL, None)
        total[rest, panel] = total[panel, rest].T
        corner = total[panel, panel].triu()
        total[panel, panel] = corner + corner.triu(1).T


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecompose a symmetric float64 matrix ``(n, n)``.

    Returns:
        Eigenvalues ``(n,)``, descending, and the matching orthonormal columns ``(n, n)``, signs as :func:`fix_signs`.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), fix_signs(vectors).flip(1)


def fix_signs(vectors: Tensor) -> Tensor:
    """Return columns ``(n, m)`` with signs that make each one's largest entry (the first of equals) positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def num_above_noise(values: Tensor, dim: int | None = None) -> int:
    """Count the leading ones of descending eigenvalues that are above their own rounding, ``n ε λ₁``.

    Args:
        values: the eigenvalues, at least one.
        dim: ``n``, where these are not all of the matrix's eigenvalues.
    """
    noise = (len(values) if dim is None else dim) * torch.finfo(values.dtype).eps
    return int((values > values[0].clamp(min=0) * noise).sum())
