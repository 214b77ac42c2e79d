"""The paper's shallow network step by step, one gradient after the other, as its description has it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.normalisation import Row, normalised, ranges


def gradient(model: nn.Module, sample: Tensor, label: int) -> list[Tensor]:
    """The cross-entropy's gradient in every weight of a batch of one sample, each flattened."""
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(sample[None]), torch.tensor([label]))
    loss.backward()
    return [
        value.grad.detach().flatten().clone() for name, value in model.named_parameters() if name.endswith("weight")
    ]


def kept(layers: list[Tensor], percentile: float) -> Row:
    """The entries above each layer's percentile of absolute values, by coordinate over all layers."""
    row, start = {}, 0
    for layer in layers:
        limit = np.percentile(layer.abs().numpy(), percentile)
        row |= {start + place: float(value) for place, value in enumerate(layer) if abs(float(value)) > limit}
        start += len(layer)
    return row


def normalise(rows: list[Row], fitted: list[Row], dim: int, power: float | None) -> list[Row]:
    """Rows scaled by the ranges of the entries of ``fitted``, and their signed roots."""
    smallest, largest, _ = ranges(fitted, dim)
    return [normalised(row, smallest, largest, power, l2=False) for row in rows]


def outputs(row: Row, blocks: list[tuple[range, Tensor, Tensor]], head: tuple[Tensor, Tensor]) -> Tensor:
    """Each block's own linear layer, ReLU, all units together, and the last linear layer."""
    units = []
    for span, weight, bias in blocks:
        dense = torch.tensor([row.get(place, 0.0) for place in span], dtype=weight.dtype)
        units.append(torch.relu(weight @ dense + bias))
    return head[0] @ torch.cat(units) + head[1]


def dense(row: Row, dim: int) -> Tensor:
    """The row with zeros for what was left out."""
    return torch.tensor([row.get(place, 0.0) for place in range(dim)], dtype=torch.float64)
