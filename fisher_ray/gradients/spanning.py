"""Scores of all classes from those of all but one, of which they are linear combinations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeftOut:
    """The class of each sample whose score was left out, and how it follows from the others.

    ``Σ_c p_c s_c = ∇_θ Σ_c p_c = 0``, so of ``C`` scores ``C − 1`` span all, and no backward pass is needed for the
    last. Left out is the likeliest class, for which the others' factors are at most 1: no rounding is enlarged.

    Attributes:
        classes: int64 ``(B,)``.
        factors: of the others' scores in ascending order of classes, ``(B, C − 1)``.
    """

    classes: Tensor
    factors: Tensor

    def complete(self, values: Tensor) -> Tensor:
        """Return a linear map's values for all classes, from those for the others: ``(B, C − 1, X)`` to ``(B, C, X)``.

        A map that is not linear in the score, such as the choice of largest entries, must not be completed so.
        """
        batch, num_others, width = values.shape
        classes = torch.arange(num_others + 1, device=values.device)
        places = (classes - (classes > self.classes[:, None]).long()).clamp(max=num_others - 1)  # (B, C)
        out = values.gather(1, places[..., None].expand(-1, -1, width))
        out[torch.arange(batch, device=values.device), self.classes] = torch.einsum("bs,bsx->bx", self.factors, values)
        return out


def leave_out(scores: Tensor, probabilities: Tensor) -> tuple[Tensor, LeftOut]:
    """Leave out each sample's likeliest class.

    Args:
        scores: starting points ``√p_c (e_c − p)``, ``(C, B, C)``; at least two classes.
        probabilities: ``p``, ``(B, C)``.

    Returns:
        The others' starting points, ``(C − 1, B, C)``, and what brings the class back.
    """
    num_classes = probabilities.shape[1]
    left = probabilities.argmax(dim=1)
    others = torch.arange(num_classes - 1, device=left.device)
    others = others + (others >= left[:, None]).long()  # (B, C − 1)
    roots = probabilities.sqrt()
    factors = -roots.gather(1, others) / roots.gather(1, left[:, None])
    kept = scores.transpose(0, 1).gather(1, others[..., None].expand(-1, -1, num_classes))
    return kept.transpose(0, 1).contiguous(), LeftOut(left, factors)
