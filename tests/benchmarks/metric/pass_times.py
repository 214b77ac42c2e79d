"""Times of the passes over a unit, and of the gradients that they are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fisher_ray.config import MetricConfig
from fisher_ray.gradients import Compressor, ScoreEngine
from fisher_ray.metric import FisherSum, choose_bases
from fisher_ray.models import paper_cnn
from fisher_ray.records import Batch
from fisher_ray.stages.passes import fisher_pass, kronecker_pass

NUM_ROWS, RANK = 256, 1024
WAYS: dict[str, dict[str, Any]] = {
    "exact global": {},
    "exact block": {"structure": "block"},
    "exact adjacent": {"structure": "adjacent"},
    "nystrom": {"estimator": "nystrom"},
    "frequent directions": {"estimator": "frequent_directions"},
    "diagonal": {"estimator": "diagonal"},
    "nystrom, rank 128": {"estimator": "nystrom", "rank": 128},
    "frequent directions, rank 64": {"estimator": "frequent_directions", "rank": 64},
}
"""Sketches of rank 1,024 are as wide as these matrices, so the last two are narrower ones."""


def measure_passes(dim: int, micro_batch: int, rounds: int) -> dict[str, Any]:
    """Return seconds of the scores alone and with their compression, and each pass's time over either, by name."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, index = torch.randn(NUM_ROWS, 3, 24, 24), torch.arange(NUM_ROWS)
    engine = ScoreEngine(paper_cnn().eval())
    batches = [Batch(inputs[rows], rows % 10, rows) for rows in index.split(micro_batch)]
    moments = kronecker_pass(engine, engine.block_shapes, batches[:1], "all", 0)
    bases = choose_bases(moments, engine.block_shapes, dim)
    compressor, dims = Compressor(bases, engine.blocks, inputs), {name: basis.dim for name, basis in bases.items()}

    def scores() -> None:
        for batch in batches:
            engine.all_classes(batch.inputs)

    def gradients() -> None:
        for batch in batches:
            compressor.compress(engine.all_classes(batch.inputs))

    def fisher(**asked: Any) -> None:
        sums = FisherSum(MetricConfig(**{"rank": RANK, **asked}), dims, 0)
        fisher_pass(engine, compressor, sums, batches, "all", 0, _ignore)

    runs: dict[str, Callable[[], object]] = {"scores": scores, "gradients": gradients}
    runs |= {name: partial(fisher, **asked) for name, asked in WAYS.items()}
    runs["kronecker pass"] = partial(kronecker_pass, engine, engine.block_shapes, batches, "all", 0, _ignore)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:  # the first round is to warm up
                seconds[name].append(time.perf_counter() - start)

    def over(name: str, unit: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[unit], strict=True))

    ratios = {name: (over(name, "gradients"), over(name, "scores")) for name in (*WAYS, "kronecker pass")}
    medians = {f"{name}_s": statistics.median(seconds[name]) for name in ("scores", "gradients")}
    return {**medians, "ratios": ratios}


def _ignore(row: int) -> None:
    """Take note of a row that cannot be used: there is none."""
