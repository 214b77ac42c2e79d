"""How many samples' scores are computed together."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_ray.config import Config
from fisher_ray.errors import ConfigError
from fisher_ray.gradients import Compressor, ScoreEngine, peak_bytes
from fisher_ray.metric import KroneckerSums, plan_compression
from fisher_ray.records import Batch
from fisher_ray.stages.compression import stand_in
from fisher_ray.stages.passes import batch_scores

MOST, MOST_GPU = 64, 1024
"""Samples that are enough to keep a processor busy, or a GPU; more would only take more memory."""


def choose_micro_batch(config: Config, engine: ScoreEngine, inputs: Tensor) -> tuple[int, int]:
    """Return ``runtime.micro_batch``; for ``auto``, the largest powers of two that ``runtime.memory_bytes`` allow.

    The first is for processors, the second for GPUs. The bytes of scores, of their moments and of their compression are
    counted and not measured, so the answer is the same on every machine. Beyond what is counted for processors they are
    taken to grow as they did.

    Args:
        config: the run's.
        engine: of the run's network.
        inputs: good samples ``(n, ...)``, one at least.

    Raises:
        ConfigError: if one sample takes more.
    """
    asked = config.runtime.micro_batch
    if asked != "auto":
        return asked, asked
    limit, size = config.runtime.memory_bytes, 1
    if (needed := _count(config, engine, inputs, size)) > limit:
        raise ConfigError(
            f"the scores of one sample take {needed} bytes, runtime.memory_bytes allow {limit}. Raise them, set "
            "runtime.micro_batch: 1, or take fewer parameters (scores.parameters), one label (scores.labels) or "
            "buckets of classes (scores.class_buckets)."
        )
    each = needed  # of a sample more
    while size < MOST and (more := _count(config, engine, inputs, 2 * size)) <= limit:
        each, needed, size = (more - needed) // size, more, 2 * size
    wide = size
    while size == MOST and wide < MOST_GPU and needed + (2 * wide - size) * each <= limit:
        wide *= 2
    return size, wide


def _count(config: Config, engine: ScoreEngine, inputs: Tensor, size: int) -> int:
    zeros = torch.zeros(size, dtype=torch.int64)
    batch = Batch(inputs[zeros], zeros, torch.arange(size))
    with_moments = plan_compression(config.compression, engine.block_shapes).with_moments
    compressor = Compressor(stand_in(config.compression, engine.blocks), engine.blocks, engine.like)

    passes = [(config.scores.labels, 1), (config.metric_labels, config.metric.draws)]

    def compute() -> None:
        sums = KroneckerSums()
        for labels, draws in dict.fromkeys(passes):
            scores = batch_scores(engine, batch, labels, config.seed, draws)
            for item in scores.factors:
                if item.block.name in with_moments:
                    item.add_moments(sums)
            compressed = compressor.compress(scores)
            compressed.new_empty(compressed.shape)  # the features

    return peak_bytes(compute)
