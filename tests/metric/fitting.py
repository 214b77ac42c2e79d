"""From a network and inputs to sums, bases and a metric, by the package's own parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fisher_ray.config import MetricConfig
from fisher_ray.gradients import Compressor, ScoreEngine
from fisher_ray.metric import FisherSum, KroneckerSums, LowRankMetric, Part, choose_bases
from fisher_ray.metric.exact import Exact
from fisher_ray.records import Compression, LayerSketch


def kronecker_sums(model: nn.Module, inputs: Tensor) -> dict[str, np.ndarray]:
    sums = KroneckerSums()
    sums.count(len(inputs))
    for item in ScoreEngine(model).all_classes(inputs).factors:
        sums.add(item.block.name, item.inputs(), item.deltas)
    return sums.to_arrays()


def kronecker_bases(model: nn.Module, inputs: Tensor, dim: int) -> dict[str, Compression]:
    return choose_bases(kronecker_sums(model, inputs), ScoreEngine(model).block_shapes, dim)


def whole_bases(model: nn.Module) -> dict[str, Compression]:
    shapes = ScoreEngine(model).block_shapes
    return {name: LayerSketch(name, shape, shape[0] * shape[1], None) for name, shape in shapes.items()}


def compress(model: nn.Module, inputs: Tensor, bases: dict[str, Compression]) -> Tensor:
    engine = ScoreEngine(model)
    return Compressor(bases, engine.blocks, inputs).compress(engine.all_classes(inputs))


def settings(rank: int, damping: object = "auto", **others: object) -> MetricConfig:
    return MetricConfig.checked({"rank": rank, "damping": damping, **others})


def fisher_sums(
    compressed: Tensor, index: Tensor | None = None, *, asked: MetricConfig | None = None, dims: dict | None = None
) -> tuple[FisherSum, dict[str, np.ndarray]]:
    """A sum, and the arrays of ``compressed`` ``(B, S, D)`` in it."""
    asked = asked or settings(compressed.shape[-1])
    sums = FisherSum(asked, dims or {"fc": compressed.shape[-1]}, seed=0)
    sums.add(compressed, torch.arange(len(compressed)) if index is None else index)
    return sums, sums.to_arrays()


def sides(arrays: dict[str, np.ndarray], dim: int) -> list[np.ndarray]:
    """The matrices ``(D, D)`` of the samples fitted on and, where there are any, of those held out."""
    packed = [arrays[f"0:{side}:packed"] for side in ("fit", "held") if f"0:{side}:packed" in arrays]
    return [Exact(dim).dense({"packed": values}).numpy() for values in packed]


def mean_fisher(arrays: dict[str, np.ndarray], dim: int) -> np.ndarray:
    return sum(sides(arrays, dim)) / arrays["counts"].sum()


def decompose(scores: Tensor, rank: int, damping: object, index: Tensor | None = None, **others: object) -> Part:
    """The one part of a metric of compressed scores ``(B, S, D)``."""
    sums, arrays = fisher_sums(scores, index, asked=settings(rank, damping, **others))
    ((part,), _) = sums.decompose(arrays)
    return part


def fit(model: nn.Module, inputs: Tensor, bases: dict[str, Compression], rank: int, damping: object) -> LowRankMetric:
    dims = {name: basis.dim for name, basis in bases.items()}
    compressed = compress(model, inputs, bases)
    sums, arrays = fisher_sums(compressed, asked=settings(rank, damping), dims=dims)
    return LowRankMetric(bases, *sums.decompose(arrays), {"labels": "all", "fingerprints": {"model": "é"}})
