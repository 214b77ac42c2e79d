"""What an actor runs: a unit's work, called as ``task(bench, unit, attempt, …)``, and steps that are done once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.metric import LowRankMetric, basis_arrays, basis_attributes
from fisher_ray.records import Batch, Receipt, Unit
from fisher_ray.stages import compression, shallow
from fisher_ray.stages.halving import Halvings
from fisher_ray.stages.host import Host
from fisher_ray.stages.passes import Features, batch_features, fisher_pass, kronecker_pass
from fisher_ray.stages.training import clean_batches, drop_row
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import save_arrays

Arrays = dict[str, np.ndarray]


@dataclass
class UnitLog:
    """What is to be told of a unit."""

    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    halvings: Halvings = field(default_factory=Halvings)

    def receipt(self, unit: Unit, attempt: int, num_bytes: int = 0) -> Receipt:
        """Return it for the driver."""
        return Receipt(unit, attempt, self.seconds, num_bytes, skipped=self.skipped, num_halvings=self.halvings.count)


@contextmanager
def unit_samples(bench: Workbench, split: str, unit: Unit, log: UnitLog) -> Iterator[Iterator[Batch]]:
    """Yield a unit's clean samples when it is its turn to compute; reading begins at once."""
    start = time.monotonic()
    batches = clean_batches(bench, split, range(unit.start, unit.stop), log.skipped, dict(unit.excluded))
    try:
        first = next(batches, None)
        log.seconds["read"] = time.monotonic() - start
        with bench.turn:
            start = time.monotonic()
            yield itertools.chain([] if first is None else [first], batches)
            log.seconds["compute"] = time.monotonic() - start
    finally:
        batches.close()


def sum_kronecker(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Sum the factors' second moments over a unit, of the layers that are compressed by them."""
    log, config = UnitLog(), bench.config
    drop, labels, draws = partial(drop_row, bench, "shallow", log.skipped), config.metric_labels, config.metric.draws
    layers = compression.plan(config.compression, config.metric, bench.facts.block_shapes).with_moments
    with unit_samples(bench, "shallow", unit, log) as batches:
        sums = kronecker_pass(bench.engine, layers, batches, labels, config.seed, drop, log.halvings, draws)
    return log.receipt(unit, attempt), sums


def sum_fisher(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Sum the Fisher over a unit, in compressed coordinates."""
    log, config = UnitLog(), bench.config
    drop, labels, draws = partial(drop_row, bench, "shallow", log.skipped), config.metric_labels, config.metric.draws
    with unit_samples(bench, "shallow", unit, log) as batches:
        engine, compressor, sums = bench.engine, bench.compressor, bench.new_fisher_sum()
        arrays = fisher_pass(engine, compressor, sums, batches, labels, config.seed, drop, log.halvings, draws)
    return log.receipt(unit, attempt), arrays


def merge_fisher(bench: Workbench, left: Arrays, right: Arrays) -> Arrays:
    """Merge two results of :func:`sum_fisher`."""
    return bench.new_fisher_sum().merge(left, right)


def write_features(bench: Workbench, unit: Unit, attempt: int, *, split: str, name: str) -> tuple[Receipt, None]:
    """Write a unit's features of ``split`` to the store ``name`` in the run folder."""
    log = UnitLog()
    parts: dict[str, list[Tensor]] = {}
    host = Host(bench.device)
    for made in _features(bench, split, unit, log):
        arrays = {"features": made.values, "logits": made.logits}
        arrays |= {"labels": made.batch.labels, "index": made.batch.index}
        for key, value in {**arrays, **({"hidden": made.hidden} if made.hidden is not None else {})}.items():
            parts.setdefault(key, []).append(host.copy(value))
    start = time.monotonic()
    host.wait()
    writer = bench.store_writer(name)
    joined = {key: torch.cat(values).numpy() for key, values in parts.items()} or writer.no_rows()
    num_bytes = writer.write_unit(unit, joined, attempt=attempt, skipped=log.skipped)
    log.seconds["write"] = time.monotonic() - start
    return log.receipt(unit, attempt, num_bytes), None


def try_features(bench: Workbench, unit: Unit, attempt: int, *, split: str, name: str) -> tuple[Receipt, None]:
    """Do as :func:`write_features` with any rows, and write nothing."""
    log = UnitLog()
    for _ in _features(bench, split, unit, log):
        pass
    return log.receipt(unit, attempt), None


def _features(bench: Workbench, split: str, unit: Unit, log: UnitLog) -> Iterator[Features]:
    config, drop = bench.config, partial(drop_row, bench, split, log.skipped)
    with unit_samples(bench, split, unit, log) as batches:
        for batch in batches:
            made = batch_features(
                bench.engine,
                bench.compressor,
                bench.metric.transform,
                batch,
                labels=config.scores.labels,
                seed=config.seed,
                views=config.linear.views,
                stacked=config.linear.num_stacked is not None,
                drop=drop,
                halvings=log.halvings,
            )
            if made is not None:
                yield made


def sum_gram(bench: Workbench, unit: Unit, attempt: int, *, part: str) -> tuple[Receipt, Arrays]:
    """Sum the linear model's Gram matrix over some rows of the feature store."""
    return _summed(bench, unit, attempt, partial(shallow.gram_sums, part=part))


def sum_columns(bench: Workbench, unit: Unit, attempt: int, *, part: str) -> tuple[Receipt, Arrays]:
    """Sum the linear model's columns and their squares over some rows of the feature store."""
    return _summed(bench, unit, attempt, partial(shallow.column_sums, part=part))


def _summed(
    bench: Workbench, unit: Unit, attempt: int, add: Callable[[Workbench, Unit], Arrays]
) -> tuple[Receipt, Arrays]:
    log = UnitLog()
    with bench.turn:
        start = time.monotonic()
        sums = add(bench, unit)
        log.seconds["compute"] = time.monotonic() - start
    return log.receipt(unit, attempt), sums


def choose_basis(bench: Workbench, *sums: Arrays) -> dict[str, Any]:
    """Choose the compression, from merged Kronecker sums where a layer's is by them, and write ``basis.zarr``.

    Returns:
        ``layers``: name, shape and number of coordinates of each.
    """
    config, shapes = bench.config, bench.facts.block_shapes
    moments = sums[0] if sums else None
    bases = compression.choose_compression(config.compression, bench.engine.blocks, moments, config.seed)
    save_arrays(bench.url("basis.zarr"), basis_arrays(bases), {"kind": "basis", "bases": basis_attributes(bases)})
    return {"layers": [{"name": n, "shape": list(shapes[n]), "coordinates": b.dim} for n, b in bases.items()]}


def fit_metric(bench: Workbench, sums: Arrays, *, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Decompose the merged Fisher sum, and write ``metric.zarr``.

    Returns:
        ``num_samples``, ``rank``, ``feature_rms``, ``fingerprint``, and what
        :meth:`fisher_ray.metric.LowRankMetric.summary` tells.
    """
    config = bench.config
    parts, layers = bench.new_fisher_sum().decompose(sums)
    settings = config.metric.model_dump(mode="json", include={"estimator", "structure", "draws", "centered"})
    attributes = {"fingerprints": fingerprints, "parameters": bench.engine.selection, **settings}
    attributes |= {"labels": config.scores.labels, "metric_labels": config.metric_labels}
    attributes["precision"] = config.scores.precision
    if config.bucketing is not None:
        attributes["class_buckets"] = [*config.bucketing]
    metric = LowRankMetric(bench.bases, parts, layers, attributes)
    metric.save(bench.url("metric.zarr"))
    return {
        "num_samples": int(sums["counts"].sum()),
        "rank": metric.rank,
        "feature_rms": metric.feature_rms,
        "fingerprint": metric.fingerprint,
        **metric.summary(),
    }
