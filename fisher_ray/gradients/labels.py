"""Labels drawn from a counter-based generator keyed by (seed, sample index): never by batch, shard or worker."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_uniform(seed: int, index: Tensor, num_draws: int | None = None) -> Tensor:
    """Return uniform float64 in ``[0, 1)``, a pure function of ``(seed, index)``.

    SplitMix64 (Steele, Lea & Flood, 2014) as a counter-based generator.

    Args:
        seed: the run's seed.
        index: int64 ``(B,)``.
        num_draws: how many a sample; None for one.

    Returns:
        ``(B,)`` for one, else ``(B, num_draws)``.
    """
    state = _mix(np.full(1, seed % 2**64, dtype=np.uint64))
    bits = _mix(index.cpu().numpy().astype(np.uint64) * _GOLDEN + state)
    if num_draws is not None:
        bits = _mix(bits[:, None] + np.arange(num_draws, dtype=np.uint64) * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def keyed_normal(seed: int, index: Tensor, num_draws: int) -> Tensor:
    """Return standard normal float64 ``(B, num_draws)``, a pure function of ``(seed, index)``."""
    normal: Tensor = torch.special.ndtri(keyed_uniform(seed, index, num_draws) + 2.0**-54)
    return normal


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def draw_labels(kind: str, probabilities: Tensor, labels: Tensor, index: Tensor, seed: int) -> Tensor:
    """Return the labels whose scores are taken, int64 ``(B,)``.

    Args:
        kind: ``true``, ``sampled`` (y ~ p) or ``uniform``.
        probabilities: ``p``, ``(B, C)``.
        labels: the true ones, ``(B,)``.
        index: sample indices, ``(B,)``.
        seed: the run's seed.
    """
    if kind == "true":
        return labels
    num_classes = probabilities.shape[1]
    uniform = keyed_uniform(seed, index).to(probabilities.device)
    if kind == "uniform":
        return (uniform * num_classes).long()
    if kind != "sampled":
        raise ValueError(f"labels {kind!r}; known: true, sampled, uniform")
    cumulative = probabilities.double().cumsum(dim=1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=num_classes - 1)
