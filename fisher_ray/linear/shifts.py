"""Many ridge penalties from one factorisation: shifted systems share a Krylov space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.linear.cholesky import solve

TOLERANCE = 1e-10
"""Residual, relative to the right-hand side, at which a shifted system counts as solved."""
MAX_BLOCKS = 64
"""Blocks of the Krylov space: more would cost what another factorisation does."""
CHECKED_BLOCKS = 4
"""Blocks between two looks at the residuals."""
NEGLIGIBLE = 1e-13
"""Directions of a block shorter than this share of the block are rounding, and left out."""


@dataclass
class _Space:
    """An orthonormal basis ``Q`` of the block Krylov space of ``M = L⁻¹ L⁻ᵀ`` and ``L⁻¹ B``, grown block by block.

    Attributes:
        factor: ``L``.
        blocks: of ``Q``.
        projected: ``Qᵀ M Q`` over all blocks but the last.
        start: ``L⁻¹ B`` in the first block, ``(k, C)``.
        tail: what ``M`` times the last block but one has in the last, or none.
    """

    factor: Tensor
    blocks: list[Tensor]
    projected: Tensor
    start: Tensor
    tail: Tensor

    def grow(self) -> None:
        """Add a block; it is empty when the space is exhausted."""
        last, basis = self.blocks[-1], torch.cat(self.blocks, 1)
        image = solve(self.factor, solve(self.factor.mT, last))
        inner = basis.mT @ image
        rest = image - basis @ inner
        again = basis.mT @ rest  # once more: one projection leaves rounding that grows with every block
        rest -= basis @ again
        inner += again
        before = len(self.projected)
        grown = inner.new_zeros(basis.shape[1], basis.shape[1])
        grown[:before, :before] = self.projected
        grown[:, before:] = inner
        grown[before:, :before] = inner[:before].mT
        self.projected = (grown + grown.mT) / 2
        block, self.tail = _orthonormal(rest, float(image.norm()))
        self.blocks.append(block)

    def solve(self, shift: float) -> tuple[Tensor, float]:
        """Return the coordinates of ``(I + shift · M)⁻¹ L⁻¹ B`` in ``Q``, and the relative residual."""
        size = len(self.projected)
        right = self.start.new_zeros(size, self.start.shape[1])
        right[: len(self.start)] = self.start
        matrix = shift * self.projected
        matrix.diagonal().add_(1)
        found: Tensor = torch.linalg.solve(matrix, right)
        width = self.tail.shape[1]
        residual = abs(shift) * (self.tail @ found[size - width :]).norm() / self.start.norm()
        return found, float(residual)

    def expand(self, coordinates: Tensor) -> Tensor:
        """Return ``L⁻ᵀ Q · coordinates``, ``(F, C)``."""
        basis = torch.cat(self.blocks, 1)[:, : len(coordinates)]
        return solve(self.factor.mT, basis @ coordinates)


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
    moved = solve(factor, right)
    block, start = _orthonormal(moved, float(moved.norm()))
    if not block.shape[1]:  # nothing on the right: nothing to solve for
        return [torch.zeros_like(right) for _ in shifts]
    space = _Space(factor, [block], block.new_zeros(0, 0), start, block.new_zeros(0, 0))
    found: list[Tensor | None] = [None] * len(shifts)
    for number in range(1, MAX_BLOCKS + 1):
        space.grow()
        exhausted = not space.blocks[-1].shape[1]
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
