"""The passes over samples: Kronecker sums, Fisher sum, features. All run on batches, with or without a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from fisher_ray.config import Config
from fisher_ray.gradients import KroneckerCompressor, ScoreEngine, Scores
from fisher_ray.metric import FisherSum, KroneckerSums, LowRankMetric
from fisher_ray.records import Batch
from fisher_ray.stages.facts import Facts
from fisher_ray.store import ArraySpec, StoreSpec

STORED_RMS = 16.0
"""Features are scaled to about this root mean square: far from float16's both ends."""


def batch_scores(engine: ScoreEngine, batch: Batch, labels: str, seed: int) -> Scores:
    """Scores of one batch: all classes weighted by ``√p_c``, or of one label a sample (``scores.labels``)."""
    if labels == "all":
        return engine.all_classes(batch.inputs)
    return engine.of_labels(
        batch.inputs, lambda output: engine.likelihood.draw(labels, output, batch.labels, batch.index, seed)
    )


def kronecker_pass(engine: ScoreEngine, batches: Iterable[Batch], labels: str, seed: int) -> dict[str, np.ndarray]:
    """Sum the factors' second moments over ``batches``."""
    sums = KroneckerSums()
    for batch in batches:
        for item in batch_scores(engine, batch, labels, seed).factors:
            item.add_moments(sums)
    return sums.to_arrays()


def fisher_pass(
    engine: ScoreEngine, compressor: KroneckerCompressor, batches: Iterable[Batch], labels: str, seed: int
) -> dict[str, np.ndarray]:
    """Sum the exact Fisher in compressed coordinates over ``batches``."""
    sums = FisherSum(compressor.dim)
    for batch in batches:
        sums.add(compressor.compress(batch_scores(engine, batch, labels, seed)), batch.index)
    return sums.to_arrays()


def batch_features(
    engine: ScoreEngine,
    compressor: KroneckerCompressor,
    metric: LowRankMetric,
    batch: Batch,
    *,
    labels: str,
    seed: int,
    views: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Whitened features of one batch, averaged over its views.

    Args:
        engine: of the base network.
        compressor: of the metric's bases.
        metric: what whitens.
        batch: clean samples.
        labels: ``scores.labels``.
        seed: the run's.
        views: 1, or 2 to average over each input and its mirror image (its last axis reversed).

    Returns:
        Features ``(B, C, R)``, or ``(B, R)`` for one label a sample; logits ``(B, C)``; the last hidden layer
        ``(B, H)``, or None.
    """
    parts = [batch, *([Batch(batch.inputs.flip(-1), batch.labels, batch.index)] if views == 2 else [])]
    scores = [batch_scores(engine, part, labels, seed) for part in parts]
    compressed = _mean([compressor.compress(item) for item in scores])  # whitening is linear: one for all views
    features = metric.transform(compressed)
    hidden = [item.hidden for item in scores if item.hidden is not None]
    return (
        features if labels == "all" else features[:, 0],
        _mean([item.logits for item in scores]),
        _mean(hidden) if hidden else None,
    )


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


def feature_spec(
    config: Config, facts: Facts, split: str, rank: int, feature_rms: float, attributes: dict[str, Any]
) -> StoreSpec:
    """Describe the feature store of one split.

    Args:
        config: the run's.
        facts: what the first look found.
        split: ``shallow`` or ``test``.
        rank: ``R``.
        feature_rms: the metric's, from which the scale of float16 follows.
        attributes: JSON values kept with the store.
    """
    num_classes = facts.num_classes if config.scores.labels == "all" else None
    arrays = feature_arrays(rank, num_classes, facts.num_classes, facts.hidden, config.store.dtype, feature_rms)
    rows, store = facts.num_rows[split], config.store
    return StoreSpec(rows, config.runtime.unit_rows, store.chunk_rows, store.codec, arrays, attributes)


def feature_arrays(
    rank: int, num_scores: int | None, num_classes: int, hidden: int | None, dtype: str, feature_rms: float
) -> dict[str, ArraySpec]:
    """Describe the arrays of a feature store.

    Args:
        rank: ``R``.
        num_scores: ``C`` for the features of all classes, None for those of one label a sample.
        num_classes: ``C``.
        hidden: width of the last hidden layer, or None.
        dtype: of the features as stored; float16 is scaled.
        feature_rms: the metric's.
    """
    rms = feature_rms / math.sqrt(num_scores or 1)
    scale = 2.0 ** round(math.log2(rms / STORED_RMS)) if dtype == "float16" else 1.0
    tail: tuple[int, ...] = (rank,)
    dims: tuple[str, ...] = ("sample", "rank")
    if num_scores is not None:
        tail, dims = (num_scores, rank), ("sample", "class", "rank")
    arrays = {
        "features": ArraySpec(tail, dtype, dims, scale),
        "labels": ArraySpec((), "int64", ("sample",)),
        "logits": ArraySpec((num_classes,), "float32", ("sample", "class")),
        "index": ArraySpec((), "int64", ("sample",)),
    }
    if hidden is not None:
        arrays["hidden"] = ArraySpec((hidden,), "float32", ("sample", "hidden"))
    return arrays
