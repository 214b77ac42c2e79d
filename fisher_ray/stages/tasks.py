"""What an actor runs: a unit's work, called as ``task(bench, unit, attempt, …)``, and steps that are done once."""

from __future__ import annotations

import hashlib
import time
from functools import partial
from typing import Any

import numpy as np

from fisher_ray.metric import (
    LowRankMetric,
    bases_from,
    basis_arrays,
    choose_bases,
    decompose,
    identity_bases,
    zero_sums,
)
from fisher_ray.records import Receipt, Unit
from fisher_ray.stages import shallow
from fisher_ray.stages.passes import batch_features, fisher_pass, kronecker_pass
from fisher_ray.stages.training import clean_batches, drop_row
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import load_arrays, open_features, save_arrays, write_unit

Arrays = dict[str, np.ndarray]


def sum_kronecker(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Sum the factors' second moments over a unit."""
    start, skipped = time.monotonic(), dict[int, str]()
    batches = clean_batches(bench, "shallow", range(unit.start, unit.stop), skipped)
    drop = partial(drop_row, bench, "shallow", skipped)
    sums = kronecker_pass(bench.engine, batches, bench.config.scores.labels, bench.config.seed, drop)
    return _receipt(unit, attempt, start, skipped), {
        **zero_sums(bench.facts.block_shapes),
        **sums,
    }  # the same names in all


def sum_fisher(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Sum the Fisher over a unit, in compressed coordinates."""
    start, skipped = time.monotonic(), dict[int, str]()
    batches = clean_batches(bench, "shallow", range(unit.start, unit.stop), skipped)
    config, drop = bench.config, partial(drop_row, bench, "shallow", skipped)
    sums = fisher_pass(bench.engine, bench.compressor, batches, config.scores.labels, config.seed, drop)
    return _receipt(unit, attempt, start, skipped), sums


def write_features(bench: Workbench, unit: Unit, attempt: int, *, split: str, name: str) -> tuple[Receipt, None]:
    """Write a unit's features of ``split`` to the store ``features/<name>.zarr``."""
    start, skipped, config = time.monotonic(), dict[int, str](), bench.config
    parts: dict[str, list[np.ndarray]] = {}
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
    return Receipt(unit, attempt, seconds, num_bytes, skipped=skipped), None


def _no_rows(url: str) -> Arrays:
    """Return a store's arrays without rows, for a unit whose rows are all skipped."""
    layouts = open_features(url, allow_partial=True).arrays
    return {name: np.empty((0, *layout.shape[1:]), layout.dtype) for name, layout in layouts.items()}


def sum_gram(bench: Workbench, unit: Unit, attempt: int, *, part: str) -> tuple[Receipt, Arrays]:
    """Sum the linear model's Gram matrix over some rows of the feature store."""
    start = time.monotonic()
    sums = shallow.gram_sums(bench, unit, part)
    return _receipt(unit, attempt, start, {}), sums


def _receipt(unit: Unit, attempt: int, start: float, skipped: dict[int, str]) -> Receipt:
    return Receipt(unit, attempt, {"compute": time.monotonic() - start}, skipped=skipped)


def choose_basis(bench: Workbench, *sums: Arrays) -> dict[str, Any]:
    """Choose the compression from merged Kronecker sums (none for ``identity``), and write ``basis.zarr``.

    Returns:
        ``layers``: name, shape and number of coordinates of each.
    """
    shapes = bench.facts.block_shapes
    bases = choose_bases(sums[0], shapes, bench.config.compression.dim) if sums else identity_bases(shapes)
    save_arrays(bench.url("basis.zarr"), basis_arrays(bases), {"kind": "basis", "blocks": list(bases)})
    return {"layers": [{"name": n, "shape": list(shapes[n]), "coordinates": len(b.pairs)} for n, b in bases.items()]}


def fit_metric(bench: Workbench, sums: Arrays, *, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Decompose the merged Fisher sum, and write ``metric.zarr``.

    Returns:
        ``eigvals``, ``damping``, ``trace`` (of the compressed Fisher), ``num_samples``, ``rank``, ``feature_rms`` and
        ``fingerprint``.
    """
    settings = bench.config.metric
    eigvals, eigvecs, damping = decompose(sums, settings.rank, settings.damping)
    arrays, kept = load_arrays(bench.url("basis.zarr"))
    scores = bench.config.scores
    attributes = {"fingerprints": fingerprints, "labels": scores.labels, "parameters": bench.engine.selection}
    metric = LowRankMetric(bases_from(arrays, kept["blocks"]), eigvals, eigvecs, damping, attributes)
    metric.save(bench.url("metric.zarr"))
    num_samples = float(sums["counts"].sum())
    digest = hashlib.sha256(eigvals.numpy().tobytes() + eigvecs.numpy().tobytes() + repr(damping).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return {
        "eigvals": eigvals.tolist(),
        "damping": damping,
        "trace": float(np.trace(sums["fisher"].sum(0))) / num_samples,
        "num_samples": int(num_samples),
        "rank": metric.rank,
        "feature_rms": metric.feature_rms,
        "fingerprint": digest.hexdigest(),
    }
