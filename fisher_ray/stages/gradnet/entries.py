"""From samples to the normalised entries of their gradients, and to GradNet's outputs, all on batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_ray.config import Config
from fisher_ray.gradients import PercentileEntries, ScoreEngine
from fisher_ray.linear import GradNet
from fisher_ray.metric import Normalisation
from fisher_ray.records import Batch
from fisher_ray.stages.passes import batch_scores
from fisher_ray.store import ArraySpec, StoreSpec

BYTES_AN_ENTRY = 64
"""What a kept entry takes while it is normalised, about."""
CHUNK_BYTES = 8 << 20
"""Of a chunk of stored entries, at most: fewer rows are then read together, and mixed better."""
STORED_MOST = 16.0
"""The largest value is scaled to about this: far from float16's both ends, should rows leave the ranges."""


@dataclass(frozen=True)
class Outputs:
    """What GradNet and the base network make of some samples.

    Attributes:
        batch: the samples.
        scores: GradNet's outputs, added over all labels and views, ``(B, C)``.
        logits: the base network's, averaged over views, ``(B, C)``.
    """

    batch: Batch
    scores: Tensor
    logits: Tensor


def parts(batch: Batch, num_entries: int, memory_bytes: int) -> Iterator[Batch]:
    """Cut a batch into parts whose entries, so many a sample, take no more than an eighth of the memory allowed."""
    size = max(1, memory_bytes // 8 // (num_entries * BYTES_AN_ENTRY))
    for start in range(0, len(batch.inputs), size):
        rows = slice(start, start + size)
        yield Batch(batch.inputs[rows], batch.labels[rows], batch.index[rows])


def views_of(batch: Batch, views: int) -> list[Batch]:
    """Return the samples, and with two views their mirror images (the last axis reversed)."""
    return [batch] if views == 1 else [batch, Batch(batch.inputs.flip(-1), batch.labels, batch.index)]


def label_entries(
    engine: ScoreEngine, kept: PercentileEntries, batch: Batch, *, seed: int, draws: int, views: int
) -> tuple[Tensor, Tensor]:
    """Return the kept entries of cross-entropy gradients for labels drawn uniformly, keyed by seed, sample and draw.

    Args:
        engine: of the base network.
        kept: which entries.
        batch: samples; their own labels are not looked at.
        seed: the run's.
        draws: labels for each view.
        views: 1 or 2; the mirror image has labels of its own, as of further draws.

    Returns:
        Values and int32 coordinates, each ``(B, views · draws, K)``.
    """
    found = []
    for number, view in enumerate(views_of(batch, views)):
        scores = batch_scores(engine, view, "uniform", seed + (number * draws << 32), draws)
        values, coordinates = kept.compress(scores)
        found.append((values * -math.sqrt(draws), coordinates))  # scores of several draws are divided by the root
    values, coordinates = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
    return values, coordinates


def normalised(normalisation: Normalisation, values: Tensor, coordinates: Tensor) -> Tensor:
    """Normalise kept entries; places that hold none stay zero."""
    return normalisation.apply_sparse(values, coordinates).masked_fill_(values == 0, 0)


def batch_outputs(
    engine: ScoreEngine,
    kept: PercentileEntries,
    normalisation: Normalisation,
    network: GradNet,
    batch: Batch,
    *,
    views: int,
) -> Outputs:
    """Return GradNet's outputs for the gradients of all ``C`` labels, added, and the base network's logits.

    Args:
        engine: of the base network.
        kept: which entries.
        normalisation: of these entries.
        network: the GradNet.
        batch: samples; their own labels are not looked at.
        views: 1, or 2 to add the mirror image's outputs too.
    """
    outputs, logits = [], []
    for view in views_of(batch, views):
        scores = engine.all_classes(view.inputs, weighted=False)
        values, coordinates = kept.compress(scores)
        outputs.append(network.scores(normalised(normalisation, values.neg_(), coordinates), coordinates))
        logits.append(scores.logits)
    return Outputs(batch, torch.stack(outputs).sum(0), torch.stack(logits).mean(0))


def num_entries(config: Config) -> int:
    """Return how many gradients each training sample has, ``S``."""
    return config.gradnet_section.draws * config.linear.views


def entry_spec(
    config: Config, num_rows: int, num_kept: int, largest: float, attributes: Mapping[str, Any]
) -> StoreSpec:
    """Describe the store of the training samples' entries.

    Args:
        config: the run's.
        num_rows: of the shallow split.
        num_kept: ``K``.
        largest: the largest value, from which the scale of float16 follows.
        attributes: JSON values kept with the store.
    """
    store, shape, dims = config.store, (num_entries(config), num_kept), ("sample", "draw", "entry")
    scale = 2.0 ** round(math.log2(largest / STORED_MOST)) if store.dtype == "float16" else 1.0
    arrays = {
        "values": ArraySpec(shape, store.dtype, dims, scale),
        "coordinates": ArraySpec(shape, "int32", dims),
        "labels": ArraySpec((), "int64", ("sample",)),
        "index": ArraySpec((), "int64", ("sample",)),
    }
    chunk_rows = _chunk_rows(store.chunk_rows, math.prod(shape) * 4)
    how = (config.runtime.unit_rows, chunk_rows, store.codec, arrays, dict(attributes), store.shard_rows)
    return StoreSpec(num_rows, *how)


def prediction_spec(config: Config, num_rows: int, num_classes: int, attributes: Mapping[str, Any]) -> StoreSpec:
    """Describe the store of the test samples' predictions: ``scores`` of GradNet, ``base`` of the base network."""
    logits = ArraySpec((num_classes,), "float32", ("sample", "class"))
    number, store = ArraySpec((), "int64", ("sample",)), config.store
    arrays = {"scores": logits, "base": logits, "labels": number, "index": number}
    how = (config.runtime.unit_rows, store.chunk_rows, store.codec, arrays, dict(attributes), store.shard_rows)
    return StoreSpec(num_rows, *how)


def _chunk_rows(most: int, row_bytes: int) -> int:
    """Return the largest divisor of ``most`` whose rows are within :data:`CHUNK_BYTES`."""
    return next(
        rows for rows in range(most, 0, -1) if most % rows == 0 and (rows * row_bytes <= CHUNK_BYTES or rows == 1)
    )
