"""Squared norms of the scores, layer by layer, without their compression."""

from __future__ import annotations

from torch import Tensor

from fisher_ray.gradients.factors import AffineFactors, Factors
from fisher_ray.gradients.formation import Workspace, form_chunks
from fisher_ray.gradients.forming import Scores


def square_norms(scores: Scores) -> dict[str, float]:
    """Return ``Σ_x Σ_c |s_c(x)|²`` by layer; of a layer that is called once, the gradients are formed in pieces."""
    calls: dict[str, list[Factors]] = {}
    for item in scores.factors:
        calls.setdefault(item.block.name, []).append(item)
    return {name: _square(items) for name, items in calls.items()}


def _square(items: list[Factors]) -> float:
    first = items[0]
    if len(items) == 1 and isinstance(first, AffineFactors):
        workspace = Workspace(first.deltas)
        weight = sum(_sum(chunk.gradient) for chunk in form_chunks(first, workspace)) if first.source.weight else 0.0
        return weight + (_sum(first.deltas.sum(dim=3)) if first.source.bias else 0.0)
    gradient = first.gradient()
    for item in items[1:]:
        gradient = gradient + item.gradient()
    return _sum(gradient)


def _sum(values: Tensor) -> float:
    return float(values.double().square().sum())
