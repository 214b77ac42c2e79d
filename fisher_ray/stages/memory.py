"""How many samples' scores are computed together."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_ray.config import Config
from fisher_ray.errors import ConfigError
from fisher_ray.gradients import ScoreEngine, peak_bytes
from fisher_ray.metric import KroneckerSums
from fisher_ray.records import Batch
from fisher_ray.stages.passes import batch_scores

MOST = 64
"""Samples that are enough to keep a processor busy; more would only take more memory."""


def choose_micro_batch(config: Config, engine: ScoreEngine, inputs: Tensor) -> int:
    """Return ``runtime.micro_batch``; for ``auto``, the largest power of two that ``runtime.memory_bytes`` allow.

    The bytes of scores and of their moments are counted and not measured, so the answer is the same on every machine.

    Args:
        config: the run's.
        engine: of the run's network.
        inputs: good samples ``(n, ...)``, one at least.

    Raises:
        ConfigError: if one sample takes more.
    """
    asked = config.runtime.micro_batch
    if asked != "auto":
        return asked
    limit, size = config.runtime.memory_bytes, 1
    if (needed := _count(config, engine, inputs, size)) > limit:
        raise ConfigError(
            f"the scores of one sample take {needed} bytes, runtime.memory_bytes allow {limit}. Raise them, set "
            "runtime.micro_batch: 1, or take fewer parameters (scores.parameters) or one label (scores.labels)."
        )
    while size < MOST and _count(config, engine, inputs, 2 * size) <= limit:
        size *= 2
    return size


def _count(config: Config, engine: ScoreEngine, inputs: Tensor, size: int) -> int:
    zeros = torch.zeros(size, dtype=torch.int64)
    batch = Batch(inputs[zeros], zeros, torch.arange(size))
    dim = config.compression.dim if config.compression.kind == "kronecker" else 0

    def compute() -> None:
        sums = KroneckerSums()
        scores = batch_scores(engine, batch, config.scores.labels, config.seed)
        for item in scores.factors:
            if config.compression.kind == "kronecker":
                item.add_moments(sums)
            else:
                item.gradient()
        scores.logits.new_empty(2, size, scores.num_scores, dim)  # the compressed scores, twice

    return peak_bytes(compute)
