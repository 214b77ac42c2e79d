"""Many ridge penalties from one factorisation: shifted systems share a Krylov space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_ray.linear.cholesky import solve

TOLERANCE = 1e-9
"""Residual, relative to the right-hand side, at which a shifted system counts as solved."""
MAX_BLOCKS = 64
"""Blocks of the Krylov space: more would cost what another factorisation does."""
CHECKED_BLOCKS = 4
"""Blocks between two looks at the residuals."""
NEGLIGIBLE = 1e-13
"""Directions of a block shorter than this share of the block are rounding, and left out."""


class _Space:
    """An orthonormal basis ``Q`` of the block Krylov space of ``M = L⁻¹ L⁻ᵀ`` and ``L⁻¹ B``, grown block by block.

    Args:
        factor: ``L``.
        start: ``L⁻¹ B``, ``(F, C)``.

    Attributes:
        last: columns of the last block, ``(F, k)``; none when the space is exhausted.
    """

    def __init__(self, factor: Tensor, start: Tensor) -> None:
        """See the class."""
        self._factor = factor
        self.last, self._start = _orthonormal(start, float(start.norm()))
        # Rows, for then all products with the basis are those of a wide matrix, which are the quickest.
        self._rows = start.new_empty((MAX_BLOCKS + 1) * self.last.shape[1], len(start))
        self._projected = start.new_zeros(0, 0)
        self._tail = start.new_zeros(0, 0)
        self._size = 0
        self._append()

    def _append(self) -> None:
        self._rows[self._size : self._size + self.last.shape[1]] = self.last.mT
        self._size += self.last.shape[1]

    def grow(self) -> None:
        """Add a block."""
        basis = self._rows[: self._size]
        rest = solve(self._factor, solve(self._factor.mT, self.last)).mT.contiguous()
        scale, inner = float(rest.norm()), rest.new_zeros(len(rest), self._size)
        for _ in range(2):  # one projection leaves rounding that grows with every block
            part = rest @ basis.mT
            rest -= part @ basis
            inner += part
        before = len(self._projected)
        grown = inner.new_zeros(self._size, self._size)
        grown[:before, :before] = self._projected
        grown[before:] = inner
        grown[:before, before:] = inner[:, :before].mT
        self._projected = (grown + grown.mT) / 2
        self.last, self._tail = _orthonormal(rest.mT, scale)
        self._append()

    def solve(self, shift: float) -> tuple[Tensor, float]:
        """Return the coordinates of ``(I + shift · M)⁻¹ L⁻¹ B`` in ``Q``, and the relative residual."""
        size = len(self._projected)
        right = self._start.new_zeros(size, self._start.shape[1])
        right[: len(self._start)] = self._start
        matrix = shift * self._projected
        matrix.diagonal().add_(1)
        found: Tensor = torch.linalg.solve(matrix, right)
        residual = abs(shift) * (self._tail @ found[size - self._tail.shape[1] :]).norm() / self._start.norm()
        return found, float(residual)

    def expand(self, coordinates: Tensor) -> Tensor:
        """Return ``L⁻ᵀ Q · coordinates``, ``(F, C)``."""
        return solve(self._factor.mT, (coordinates.mT @ self._rows[: len(coordinates)]).mT)


def solve_shifted(factor: Tensor, right: Tensor, shifts: Sequence[float]) -> list[Tensor | None]:
    """Solve ``(L Lᵀ + s I) X = B`` for every shift ``s``, from the one factor.

    With ``Y = Lᵀ X`` the systems are ``(I + s M) Y = L⁻¹ B``, ``M = L⁻¹ L⁻ᵀ``, whose block Krylov spaces are the same
    for all ``s`` (Frommer & Glässner, *Restarted GMRES for shifted linear systems*, 1998, for one column); each is
    solved by projection on it, as in conjugate gradients. How many blocks it takes grows with the root of the larger of
    ``(λ + s) / λ`` and its inverse, ``λ`` what is known to bound the eigenvalues of ``L Lᵀ`` from below.

    Args:
        factor: ``L``, lower, float64 ``(F, F)``.
        right: ``B``, float64 ``(F, C)``.
        shifts: the smallest has to leave ``L Lᵀ + s I`` positive definite.

    Returns:
        ``X`` ``(F, C)`` by shift, with a residual of at most :data:`TOLERANCE`; None where :data:`MAX_BLOCKS` blocks
        are not enough.
    """
    space = _Space(factor, solve(factor, right))
    if not space.last.shape[1]:  # nothing on the right: nothing to solve for
        return [torch.zeros_like(right) for _ in shifts]
    found: list[Tensor | None] = [None] * len(shifts)
    for number in range(1, MAX_BLOCKS + 1):
        space.grow()
        exhausted = not space.last.shape[1]
        if number % CHECKED_BLOCKS and not exhausted:
            continue
        for place in [place for place, item in enumerate(found) if item is None]:
            coordinates, residual = space.solve(shifts[place])
            found[place] = space.expand(coordinates) if residual <= TOLERANCE else None
        if exhausted or all(item is not None for item in found):
            break
    return found


def _orthonormal(block: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Split a block ``(F, C)`` into orthonormal columns ``(F, k)`` and their coefficients ``(k, C)``.

    Directions shorter than :data:`NEGLIGIBLE` times ``scale`` are left out.
    """
    columns, lengths, rotation = torch.linalg.svd(block, full_matrices=False)
    kept = int((lengths > NEGLIGIBLE * scale).sum())
    return columns[:, :kept], lengths[:kept, None] * rotation[:kept]
