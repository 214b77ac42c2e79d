"""From a network and inputs to sums, bases and a metric, by the package's own parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fisher_ray.gradients import KroneckerCompressor, ScoreEngine
from fisher_ray.metric import FisherSum, KroneckerSums, LowRankMetric, choose_bases, decompose, identity_bases
from fisher_ray.records import LayerBasis


def kronecker_sums(model: nn.Module, inputs: Tensor) -> dict[str, np.ndarray]:
    sums = KroneckerSums()
    for item in ScoreEngine(model).all_classes(inputs).factors:
        sums.add(item.block.name, item.inputs(), item.deltas)
    return sums.to_arrays()


def kronecker_bases(model: nn.Module, inputs: Tensor, dim: int) -> dict[str, LayerBasis]:
    return choose_bases(kronecker_sums(model, inputs), ScoreEngine(model).block_shapes, dim)


def whole_bases(model: nn.Module) -> dict[str, LayerBasis]:
    return identity_bases(ScoreEngine(model).block_shapes)


def compress(model: nn.Module, inputs: Tensor, bases: dict[str, LayerBasis]) -> Tensor:
    return KroneckerCompressor(bases, inputs).compress(ScoreEngine(model).all_classes(inputs))


def fisher_sums(compressed: Tensor, index: Tensor | None = None) -> dict[str, np.ndarray]:
    sums = FisherSum(compressed.shape[-1])
    sums.add(compressed, torch.arange(len(compressed)) if index is None else index)
    return sums.to_arrays()


def fit(
    model: nn.Module, inputs: Tensor, bases: dict[str, LayerBasis], rank: int, damping: str | float
) -> LowRankMetric:
    eigvals, eigvecs, chosen = decompose(fisher_sums(compress(model, inputs, bases)), rank, damping)
    return LowRankMetric(bases, eigvals, eigvecs, chosen, {"labels": "all", "fingerprints": {"model": "é"}})
