"""What an actor runs: a unit's work, called as ``task(bench, unit, attempt, …)``, and steps that are done once."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from fisher_ray.metric import LowRankMetric, basis_arrays, basis_attributes
from fisher_ray.records import Receipt, Unit
from fisher_ray.stages import compression, shallow
from fisher_ray.stages.halving import Halvings
from fisher_ray.stages.passes import batch_features, fisher_pass, kronecker_pass
from fisher_ray.stages.training import clean_batches, drop_row
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import open_features, save_arrays, write_unit

Arrays = dict[str, np.ndarray]


def sum_kronecker(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Sum the factors' second moments over a unit, of the layers that are compressed by them."""
    start, skipped, config = time.monotonic(), dict[int, str](), bench.config
    batches = clean_batches(bench, "shallow", range(unit.start, unit.stop), skipped)
    drop, halvings = partial(drop_row, bench, "shallow", skipped), Halvings()
    plans = compression.plan(config.compression, config.metric, bench.facts.block_shapes)
    layers, labels, draws = plans.with_moments, config.metric_labels, config.metric.draws
    sums = kronecker_pass(bench.engine, layers, batches, labels, config.seed, drop, halvings, draws)
    return _receipt(unit, attempt, start, skipped, halvings.count), sums


def sum_fisher(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Sum the Fisher over a unit, in compressed coordinates."""
    start, skipped, config = time.monotonic(), dict[int, str](), bench.config
    batches = clean_batches(bench, "shallow", range(unit.start, unit.stop), skipped)
    drop, labels, draws = partial(drop_row, bench, "shallow", skipped), config.metric_labels, config.metric.draws
    sums, halvings = bench.new_fisher_sum(), Halvings()
    arrays = fisher_pass(bench.engine, bench.compressor, sums, batches, labels, config.seed, drop, halvings, draws)
    return _receipt(unit, attempt, start, skipped, halvings.count), arrays


def merge_fisher(bench: Workbench, left: Arrays, right: Arrays) -> Arrays:
    """Merge two results of :func:`sum_fisher`."""
    return bench.new_fisher_sum().merge(left, right)


def write_features(bench: Workbench, unit: Unit, attempt: int, *, split: str, name: str) -> tuple[Receipt, None]:
    """Write a unit's features of ``split`` to the store ``features/<name>.zarr``."""
    start, skipped, config = time.monotonic(), dict[int, str](), bench.config
    parts: dict[str, list[np.ndarray]] = {}
    halvings = Halvings()
    for batch in clean_batches(bench, split, range(unit.start, unit.stop), skipped):
        made = batch_features(
            bench.engine,
            bench.compressor,
            bench.metric,
            batch,
            labels=config.scores.labels,
            seed=config.seed,
            views=config.linear.views,
            drop=partial(drop_row, bench, split, skipped),
            halvings=halvings,
        )
        if made is None:
            continue
        arrays = {"features": made.values, "logits": made.logits}
        arrays |= {"labels": made.batch.labels, "index": made.batch.index}
        for key, value in {**arrays, **({"hidden": made.hidden} if made.hidden is not None else {})}.items():
            parts.setdefault(key, []).append(value.cpu().numpy())
    computed, url = time.monotonic(), bench.url(f"features/{name}.zarr")
    joined = {key: np.concatenate(values) for key, values in parts.items()} or _no_rows(url)
    num_bytes = write_unit(url, unit, joined, attempt=attempt, skipped=skipped)
    seconds = {"compute": computed - start, "write": time.monotonic() - computed}
    return Receipt(unit, attempt, seconds, num_bytes, skipped=skipped, num_halvings=halvings.count), None


def _no_rows(url: str) -> Arrays:
    """Return a store's arrays without rows, for a unit whose rows are all skipped."""
    layouts = open_features(url, allow_partial=True).arrays
    return {name: np.empty((0, *layout.shape[1:]), layout.dtype) for name, layout in layouts.items()}


def sum_gram(bench: Workbench, unit: Unit, attempt: int, *, part: str) -> tuple[Receipt, Arrays]:
    """Sum the linear model's Gram matrix over some rows of the feature store."""
    start = time.monotonic()
    sums = shallow.gram_sums(bench, unit, part)
    return _receipt(unit, attempt, start, {}), sums


def _receipt(unit: Unit, attempt: int, start: float, skipped: dict[int, str], num_halvings: int = 0) -> Receipt:
    seconds = {"compute": time.monotonic() - start}
    return Receipt(unit, attempt, seconds, skipped=skipped, num_halvings=num_halvings)


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
    metric = LowRankMetric(bench.bases, parts, layers, attributes)
    metric.save(bench.url("metric.zarr"))
    return {
        "num_samples": int(sums["counts"].sum()),
        "rank": metric.rank,
        "feature_rms": metric.feature_rms,
        "fingerprint": metric.fingerprint,
        **metric.summary(),
    }
