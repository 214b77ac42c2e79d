"""Scores as factors, and the gradients formed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.factors import Factors


@dataclass(frozen=True)
class Scores:
    """Scores of one batch, as factors.

    Attributes:
        logits: the network's output ``(B, ...)``, detached, in the factors' dtype.
        hidden: the last layer's input ``(B, H)``, in the same dtype, or None.
        num_scores: ``S``.
        factors: of every call of every block; a block that the batch does not reach has none.
    """

    logits: Tensor
    hidden: Tensor | None
    num_scores: int
    factors: list[Factors]

    def by_block(self) -> dict[str, list[Factors]]:
        """Return the calls' factors by block; a block that the batch does not reach is left out."""
        found: dict[str, list[Factors]] = {}
        for item in self.factors:
            found.setdefault(item.block.name, []).append(item)
        return found


def add_calls(calls: Sequence[Factors]) -> Tensor:
    """Return a block's gradients ``(B, S, O, A)``: those of its calls, one at least, added."""
    gradient = calls[0].gradient()
    for item in calls[1:]:
        gradient = gradient + item.gradient()
    return gradient


def form_gradients(blocks: Sequence[Block], model: nn.Module, scores: Scores) -> dict[str, Tensor]:
    """Form every parameter's gradients ``(B, S, *shape)``, in the network's order; calls are added.

    Args:
        blocks: of the engine that made the scores.
        model: its network.
        scores: what it made.
    """
    parameters = dict(model.named_parameters())
    leading = (len(scores.logits), scores.num_scores)
    names = dict.fromkeys(piece.parameter for block in blocks for piece in block.pieces)
    out = {name: scores.logits.new_zeros(*leading, *parameters[name].shape) for name in names}
    for item in scores.factors:
        for piece, part in item.block.split(item.gradient()):
            target = out[piece.parameter]
            (target if piece.rows is None else target[:, :, piece.rows]).add_(part)
    return {name: out[name] for name in parameters if name in out}
