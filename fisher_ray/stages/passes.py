"""The passes over samples: Kronecker sums, Fisher sum, features. All run on batches, with or without a cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisher_ray.config import Config
from fisher_ray.gradients import Compressor, ScoreEngine, Scores, square_norms
from fisher_ray.metric import FisherSum, KroneckerSums, zero_sums
from fisher_ray.records import Batch
from fisher_ray.stages.facts import Facts
from fisher_ray.stages.halving import Halvings
from fisher_ray.store import ArraySpec, StoreSpec

STORED_RMS = 16.0
"""Features are scaled to about this root mean square: far from float16's both ends."""


NUM_WHOLE = 8
"""Samples of a unit whose gradients are also formed whole."""

Made = TypeVar("Made")
Drop = Callable[[int], None]
"""Told, once or more, of a row whose sample cannot be used; may raise."""


@dataclass(frozen=True)
class Features:
    """Features of one batch.

    Attributes:
        batch: its samples, without those left out.
        values: ``(B, C, R)``, or ``(B, R)`` for one label a sample; of stacked views ``(B, V, C, R)`` or ``(B, V, R)``.
        logits: ``(B, C)``, averaged over the views.
        hidden: the last hidden layer ``(B, H)``, or None; of stacked views ``(B, V, H)``.
    """

    batch: Batch
    values: Tensor
    logits: Tensor
    hidden: Tensor | None


def batch_scores(engine: ScoreEngine, batch: Batch, labels: str, seed: int, draws: int = 1) -> Scores:
    """Scores of one batch: all classes weighted by ``√p_c``, or of ``draws`` labels a sample.

    Args:
        engine: of the network.
        batch: samples.
        labels: ``all``, ``true``, ``sampled`` or ``uniform``.
        seed: the run's; a label is drawn from it, the sample's row and the draw's number.
        draws: labels a sample; their scores are divided by ``√draws``.
    """
    if labels == "all":
        return engine.all_classes(batch.inputs)

    def draw(output: Tensor, number: int) -> Tensor:
        return engine.likelihood.draw(labels, output, batch.labels, batch.index, seed + (number << 32))

    scores = engine.of_draws(batch.inputs, draw, draws)
    if labels == "true":
        engine.likelihood.check_targets(scores.logits, batch.labels)
    return scores


def root_scores(engine: ScoreEngine, batch: Batch, labels: str, seed: int, draws: int = 1) -> Scores:
    """Scores as :func:`batch_scores`, or of all classes fewer combinations with the same sum of outer products."""
    if labels == "all":
        return engine.spanning_classes(batch.inputs)[0]
    return batch_scores(engine, batch, labels, seed, draws)


def compressed_scores(
    engine: ScoreEngine, compressor: Compressor, batch: Batch, labels: str, seed: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the logits, the last hidden layer, and scores as :func:`batch_scores`, compressed, ``(B, S, D)``.

    Of all classes one fewer is backpropagated where the compression is linear.
    """
    if labels != "all":
        scores = batch_scores(engine, batch, labels, seed)
        return scores.logits, scores.hidden, compressor.compress(scores)

    def compute(inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if not compressor.linear:
            scores = engine.all_classes(inputs)
            return scores.logits, scores.hidden, compressor.compress(scores)
        scores, reflection = engine.spanning_classes(inputs)
        compressed = compressor.compress(scores)
        return scores.logits, scores.hidden, compressed if reflection is None else reflection.complete(compressed)

    logits, hidden, compressed = engine.graphs.run(("features", compressor), compute, batch.inputs)
    assert logits is not None
    assert compressed is not None
    return logits, hidden, compressed


def kronecker_pass(
    engine: ScoreEngine,
    layers: Collection[str],
    batches: Iterable[Batch],
    labels: str,
    seed: int,
    drop: Drop | None = None,
    halvings: Halvings | None = None,
    draws: int = 1,
) -> dict[str, np.ndarray]:
    """Sum the second moments of the factors of ``layers`` over ``batches``.

    ``halvings`` counts the micro-batches that are cut for want of memory.
    """
    sums, halvings = KroneckerSums(), halvings or Halvings()

    def scores_of(part: Batch) -> tuple[Batch, Scores] | None:
        return usable_samples(part, lambda some: root_scores(engine, some, labels, seed, draws), _finite_factors, drop)

    def add(found: tuple[Batch, Scores] | None) -> None:
        if found is None:
            return
        kept, scores = found
        sums.count(len(kept.inputs))
        for item in scores.factors:
            if item.block.name in layers:
                item.add_moments(sums)

    for batch in batches:
        halvings.each(batch, scores_of, add)
    unreached = zero_sums({name: engine.block_shapes[name] for name in layers})
    return {**unreached, **sums.to_arrays()}  # the same names, whatever the batches reach


def fisher_pass(
    engine: ScoreEngine,
    compressor: Compressor,
    sums: FisherSum,
    batches: Iterable[Batch],
    labels: str,
    seed: int,
    drop: Drop | None = None,
    halvings: Halvings | None = None,
    draws: int = 1,
) -> dict[str, np.ndarray]:
    """Add ``batches`` to the sum of the Fisher in compressed coordinates, and return its arrays.

    The whole gradients of the first few samples are formed too, layer by layer, to see what the compression leaves out.
    ``halvings`` as in :func:`kronecker_pass`.
    """
    halvings, seen = halvings or Halvings(), False
    scores_of = root_scores if compressor.linear else batch_scores

    def made(part: Batch) -> tuple[Tensor, dict[str, float]]:
        def compute(inputs: Tensor) -> tuple[Tensor]:
            batch = Batch(inputs, part.labels, part.index)  # of which all classes take the inputs alone
            return (compressor.compress(scores_of(engine, batch, labels, seed, draws)),)

        all_classes = labels == "all"
        found = engine.graphs.run(("metric", compressor), compute, part.inputs) if all_classes else compute(part.inputs)
        assert found[0] is not None
        return found[0], {} if seen else whole(part)

    def whole(part: Batch) -> dict[str, float]:
        total = dict.fromkeys(engine.block_shapes, 0.0)
        for row in range(min(NUM_WHOLE, len(part.inputs))):  # one at a time: their gradients are formed
            one = Batch(part.inputs[row : row + 1], part.labels[row : row + 1], part.index[row : row + 1])
            for name, square in square_norms(scores_of(engine, one, labels, seed, draws)).items():
                total[name] += square
        return total

    def add(found: tuple[Batch, tuple[Tensor, dict[str, float]]] | None) -> None:
        nonlocal seen
        if found is None:
            return
        kept, (values, norms) = found
        sums.add(values, kept.index)
        if norms:
            sums.add_norms(values[:NUM_WHOLE], norms)
            seen = True

    for batch in batches:
        halvings.each(batch, lambda part: usable_samples(part, made, lambda found: finite_rows(found[0]), drop), add)
    return sums.to_arrays()


def usable_samples(
    batch: Batch, make: Callable[[Batch], Made], finite: Callable[[Made], Tensor], drop: Drop | None
) -> tuple[Batch, Made] | None:
    """Return the samples that the network makes finite numbers of, and what is made of them; None if there are none.

    Args:
        batch: samples.
        make: makes something of them.
        finite: tells of what is made which samples' numbers are finite, ``(B,)``.
        drop: told of each other sample's row; None keeps them.
    """
    made = make(batch)
    if drop is None:
        return batch, made
    good = finite(made).to(batch.index.device)
    if bool(good.all()):
        return batch, made
    for row in batch.index[~good].tolist():
        drop(row)
    here = good.to(batch.inputs.device)
    kept = Batch(batch.inputs[here], batch.labels[here], batch.index[good])
    return (kept, make(kept)) if len(kept.inputs) else None


def finite_rows(values: Tensor) -> Tensor:
    """Return which rows ``(B, ...)`` are finite, ``(B,)``."""
    return values.flatten(1).isfinite().all(dim=1)


def _finite_factors(scores: Scores) -> Tensor:
    return torch.stack([finite_rows(scores.logits), *(item.norms().isfinite() for item in scores.factors)]).all(dim=0)


def batch_features(
    engine: ScoreEngine,
    compressor: Compressor,
    transform: Callable[[Tensor], Tensor],
    batch: Batch,
    *,
    labels: str,
    seed: int,
    views: int,
    stacked: bool = False,
    drop: Drop | None = None,
    halvings: Halvings | None = None,
) -> Features | None:
    """Features of one batch, averaged over its views or stacked.

    Args:
        engine: of the base network.
        compressor: of the metric's bases.
        transform: a linear map of the compressed scores ``(B, S, D)``, such as the metric's.
        batch: clean samples.
        labels: ``scores.labels``.
        seed: the run's.
        views: 1, or 2 for each input and its mirror image (its last axis reversed).
        stacked: whether the views' features and hidden layers are kept side by side, not averaged.
        drop: told of the row of each sample that the network makes NaN or infinity of, which is left out; None keeps
            them.
        halvings: counts how often the batch is cut for want of memory.

    Returns:
        None if no sample is left.

    Raises:
        MemoryExhaustedError: if there is not enough memory for one sample.
    """
    join = stack_views if stacked else mean_views

    def compressed_of(part: Batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
        logits, hidden, compressed = [], [], []
        mirrored = [Batch(part.inputs.flip(-1), part.labels, part.index)] if views == 2 else []
        for view in [part, *mirrored]:
            view_logits, view_hidden, values = compressed_scores(engine, compressor, view, labels, seed)
            logits.append(view_logits)
            hidden += [] if view_hidden is None else [view_hidden]
            compressed.append(values)
        return logits, hidden, join(compressed)

    def finite(made: tuple[list[Tensor], list[Tensor], Tensor]) -> Tensor:
        return finite_rows(made[2]) & finite_rows(mean_views(made[0]))

    def features(part: Batch) -> Features | None:
        found = usable_samples(part, compressed_of, finite, drop)
        if found is None:
            return None
        kept, (logits, hidden, compressed) = found
        made = transform(compressed.flatten(0, -3))  # of averaged views one for all, being linear
        values = made.reshape(*compressed.shape[:-2], *made.shape[1:])
        values = values if labels == "all" else values[..., 0, :]
        return Features(kept, values, mean_views(logits), join(hidden) if hidden else None)

    parts: list[Features | None] = []
    (halvings or Halvings()).each(batch, features, parts.append)
    return _joined([part for part in parts if part is not None])


def _joined(parts: list[Features]) -> Features | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    batches, hidden = [part.batch for part in parts], [part.hidden for part in parts if part.hidden is not None]
    columns = zip(*((batch.inputs, batch.labels, batch.index) for batch in batches), strict=True)
    return Features(
        Batch(*(torch.cat(column) for column in columns)),
        torch.cat([part.values for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat(hidden) if hidden else None,
    )


def mean_views(parts: list[Tensor]) -> Tensor:
    """Return the mean of one tensor a view, one or two."""
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


def stack_views(parts: list[Tensor]) -> Tensor:
    """Return one tensor ``(B, ...)`` a view as ``(B, V, ...)``."""
    return torch.stack(parts, 1)


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
    num_scores = config.scores.num_scores(facts.num_classes) if config.scores.labels == "all" else None
    sizes = (rank, num_scores, facts.num_classes, facts.hidden)
    arrays = feature_arrays(*sizes, config.store.dtype, feature_rms, config.linear.num_stacked)
    rows, store = facts.num_rows[split], config.store
    unit_rows, shard_rows = config.runtime.unit_rows, store.shard_rows
    return StoreSpec(rows, unit_rows, store.chunk_rows, store.codec, arrays, attributes, shard_rows)


def feature_arrays(
    rank: int,
    num_scores: int | None,
    num_classes: int,
    hidden: int | None,
    dtype: str,
    feature_rms: float,
    num_views: int | None = None,
) -> dict[str, ArraySpec]:
    """Describe the arrays of a feature store.

    Args:
        rank: ``R``.
        num_scores: ``C`` for the features of all classes, fewer of buckets, None for those of one label a sample.
        num_classes: ``C``.
        hidden: width of the last hidden layer, or None.
        dtype: of the features as stored; float16 is scaled.
        feature_rms: the metric's.
        num_views: ``V`` of stacked views, None for their average.
    """
    rms = feature_rms / math.sqrt(num_scores or 1)
    scale = 2.0 ** round(math.log2(rms / STORED_RMS)) if dtype == "float16" else 1.0
    views = () if num_views is None else (num_views,)
    head = ("sample",) if num_views is None else ("sample", "view")
    tail: tuple[int, ...] = (rank,)
    dims: tuple[str, ...] = ("rank",)
    if num_scores is not None:
        tail, dims = (num_scores, rank), ("class" if num_scores == num_classes else "bucket", "rank")
    arrays = {
        "features": ArraySpec((*views, *tail), dtype, (*head, *dims), scale),
        "labels": ArraySpec((), "int64", ("sample",)),
        "logits": ArraySpec((num_classes,), "float32", ("sample", "class")),
        "index": ArraySpec((), "int64", ("sample",)),
    }
    if hidden is not None:
        arrays["hidden"] = ArraySpec((*views, hidden), "float32", (*head, "hidden"))
    return arrays
