"""Scores of all classes from one fewer, of which they are linear combinations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reflection:
    """What makes the weighted scores of all classes of the ``C − 1`` that :func:`reflect` returns.

    Attributes:
        roots: ``√p``, ``(B, C)``.
    """

    roots: Tensor

    def complete(self, values: Tensor) -> Tensor:
        """Return a linear map's values for all classes from those of the reflected, ``(B, C − 1, X)`` to ``(B, C, X)``.

        A map that is not linear in the score, such as the choice of largest entries, must not be completed so.
        """
        others, last = self.roots[:, :-1], self.roots[:, -1:]
        product = torch.einsum("bs,bsx->bx", others, values)[:, None]
        return torch.cat([values - (others / (1 + last))[..., None] * product, -product], dim=1)


def reflect(scores: Tensor, probabilities: Tensor) -> tuple[Tensor, Reflection]:
    """Reflect the weighted scores so that the last one is zero, and leave it out.

    ``Σ_c √p_c (√p_c s_c) = ∇_θ Σ_c p_c = 0``: over classes, the weighted scores are at right angles to the unit vector
    ``√p``. Householder's reflection that takes it to the last axis leaves ``√p_c s_c − √p_c / (1 + √p_C) √p_C s_C`` and
    a zero. Being orthogonal over classes, it changes no sum of outer products; it is its own inverse; and no factor in
    it is above 1, so that rounding is not enlarged.

    Args:
        scores: starting points ``√p_c (e_c − p)``, ``(C, B, C)``; at least two classes.
        probabilities: ``p``, ``(B, C)``.

    Returns:
        Starting points ``(C − 1, B, C)`` with the same sum of outer products, and what brings all classes back.
    """
    roots = probabilities.sqrt()
    factors = (roots[:, :-1] / (1 + roots[:, -1:])).T
    return scores[:-1] - factors[:, :, None] * scores[-1], Reflection(roots)
