"""TRAK (Park et al., 2023) as its formula says, with exact dense projections; and plain gradient products."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fisher_ray.gradients import GradientBuffer, ScoreEngine

BATCH = 64


def score_gradients(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``∇ log p_y`` ``(B, P)``, to be used before the next, and ``p_y`` ``(B,)``."""
    engine = ScoreEngine(model)
    buffer = GradientBuffer(engine.blocks, model, max_batch=BATCH)
    for inputs, labels in batches:
        for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
            scores = engine.of_labels(x, y)
            probability = scores.logits.detach().softmax(1).gather(1, y[:, None])[:, 0]
            yield buffer.fill(scores)[:, 0].detach(), probability


class Projection:
    """Dense Rademacher signs over ``√K``, seeded, ``(P, K)``."""

    def __init__(self, num_parameters: int, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (num_parameters, dim), generator=generator, dtype=torch.int8)
        self.matrix = (2.0 * signs - 1.0) / math.sqrt(dim)


def features(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], projection: Projection
) -> tuple[Tensor, Tensor]:
    """Return the projected gradients of the margin ``log p / (1 − p)``, ``(N, K)``, and ``1 − p``, ``(N,)``.

    The margin's gradient is ``∇ log p / (1 − p)``.
    """
    rows, rest = [], []
    for gradient, probability in score_gradients(model, batches):
        left = (1 - probability).clamp_min(1e-6)
        rows.append((gradient @ projection.matrix) / left[:, None])
        rest.append(left)
    return torch.cat(rows), torch.cat(rest)


def inverse_gram(train: Tensor) -> Tensor:
    """Return ``(ΦᵀΦ)⁻¹``, float64."""
    gram = train.double().T @ train.double()
    return torch.linalg.inv(gram)


def scores(train: Tensor, queries: Tensor) -> Tensor:
    """Return ``φ(q)ᵀ (ΦᵀΦ)⁻¹ φ(i)``, ``(Q, N)``, which is to be multiplied by ``1 − p_i``."""
    return (queries.double() @ inverse_gram(train) @ train.double().T).float()
