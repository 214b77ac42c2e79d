"""Squared norms of the scores, layer by layer, without their compression."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_ray.gradients.factors import AffineFactors, Factors
from fisher_ray.gradients.formation import Workspace, form_chunks
from fisher_ray.gradients.forming import Scores, add_calls


def square_norms(scores: Scores) -> dict[str, float]:
    """Return ``Σ_x Σ_c |s_c(x)|²`` by layer; of a layer that is called once, the gradients are formed in pieces."""
    return {name: _square(items) for name, items in scores.by_block().items()}


def _square(items: list[Factors]) -> float:
    first = items[0]
    if len(items) == 1 and isinstance(first, AffineFactors):
        if _pays(first):
            return _square_of_products(first)
        workspace = Workspace(first.deltas)
        weight = sum(_sum(chunk.gradient) for chunk in form_chunks(first, workspace)) if first.source.weight else 0.0
        return weight + (_sum(first.deltas.sum(dim=3)) if first.source.bias else 0.0)
    scores = (slice(score, score + 1) for score in range(first.num_scores))  # a whole gradient may be large
    return sum(_sum(add_calls([item.of_scores(part) for item in items])) for part in scores)


def _pays(item: AffineFactors) -> bool:
    """Whether the products of positions are fewer than the gradients' entries, and take less work."""
    num_scores, _, num_outputs, num_positions = item.deltas.shape
    size = item.block.num_inputs
    fewer = num_positions**2 <= num_outputs * size
    height = num_scores * num_outputs
    return fewer and num_positions > 1 and num_positions * (size + height) < height * size


def _square_of_products(item: AffineFactors) -> float:
    """Return ``Σ_t Σ_u (a_tᵀ a_u)(δ_tᵀ δ_u)``, which is ``|Σ_t δ_t a_tᵀ|²``, without forming it."""
    inputs = item.inputs()
    products = torch.bmm(inputs.transpose(1, 2), inputs)
    total = 0.0
    for deltas in item.deltas:
        total += float((products * torch.bmm(deltas.transpose(1, 2), deltas)).sum(dtype=torch.float64))
    return total


def _sum(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())
