"""What an actor runs for GradNet: a unit's work, and the step between two passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.metric import Normalisation, RangeSum
from fisher_ray.records import Batch, Receipt, Unit
from fisher_ray.stages.gradnet.entries import (
    Outputs,
    batch_outputs,
    label_entries,
    normalised,
    num_entries,
    parts,
)
from fisher_ray.stages.host import Host
from fisher_ray.stages.passes import finite_rows, usable_samples
from fisher_ray.stages.shallow import held_out
from fisher_ray.stages.tasks import Arrays, UnitLog, unit_samples
from fisher_ray.stages.training import drop_row
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import StoreWriter, open_features, save_arrays

ENTRIES, PREDICTIONS = "features/gradnet.zarr", "gradnet/predictions.zarr"
"""The stores of training samples' entries and of test samples' predictions, in the run folder."""

Entries = tuple[Tensor, Tensor]


def sum_ranges(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Find the ranges of a unit's kept entries."""
    log, sums = UnitLog(), RangeSum(bench.gradnet_entries.dim)
    for _, (values, coordinates) in _label_entries(bench, unit, log):
        kept = values != 0
        whole = bool(kept.all())
        sums.add_sparse(values if whole else values[kept], coordinates if whole else coordinates[kept])
    return log.receipt(unit, attempt), sums.to_arrays()


def merge_ranges(bench: Workbench, left: Arrays, right: Arrays) -> Arrays:
    """Merge two results of :func:`sum_ranges`."""
    return RangeSum.merge(left, right)


def save_ranges(bench: Workbench, ranges: Arrays) -> dict[str, float | int]:
    """Write ``gradnet/ranges.zarr``, the normalisation.

    Returns:
        ``largest``: the largest normalised value of the rows that the ranges are of; ``num_entries``: kept entries that
        they are of.

    Raises:
        DataError: if there was no entry at all, or a range is not finite.
    """
    section = bench.config.gradnet_section
    normalisation = Normalisation.from_ranges(ranges, section.power)  # for its checks, too
    ends = torch.from_numpy(np.stack([ranges["minimum"], ranges["maximum"]])[:, ranges["counts"] > 0])
    if not section.normalise:
        normalisation = Normalisation(power=section.power)
    largest = 1.0 if section.normalise else float(normalisation.apply(ends).abs().max())
    save_arrays(bench.url("gradnet/ranges.zarr"), normalisation.to_arrays(), {"kind": "normalisation"})
    return {"largest": largest, "num_entries": int(ranges["counts"].sum())}


def write_entries(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, None]:
    """Write a unit's normalised entries to the store ``features/gradnet.zarr``."""
    log, host = UnitLog(), Host(bench.device)
    found: dict[str, list[Tensor]] = {}
    for batch, (values, coordinates) in _label_entries(bench, unit, log):
        values = normalised(bench.gradnet_normalisation, values, coordinates)
        arrays = {"values": values, "coordinates": coordinates, "labels": batch.labels, "index": batch.index}
        for name, value in arrays.items():
            found.setdefault(name, []).append(host.copy(value))
    return _write(bench.store_writer(ENTRIES), unit, attempt, log, host, found)


def try_entries(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, None]:
    """Do as :func:`write_entries` with any rows, and write nothing."""
    log = UnitLog()
    for _ in _label_entries(bench, unit, log):
        pass
    return log.receipt(unit, attempt), None


def predict(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, None]:
    """Write a unit's predictions of the test split to the store ``gradnet/predictions.zarr``."""
    log, host = UnitLog(), Host(bench.device)
    found: dict[str, list[Tensor]] = {}
    for made in _outputs(bench, "test", unit, log):
        arrays = {"scores": made.scores, "base": made.logits, "labels": made.batch.labels, "index": made.batch.index}
        for name, value in arrays.items():
            found.setdefault(name, []).append(host.copy(value))
    return _write(bench.store_writer(PREDICTIONS), unit, attempt, log, host, found)


def try_predictions(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, None]:
    """Do as :func:`predict` with any rows, and write nothing."""
    log = UnitLog()
    for _ in _outputs(bench, "test", unit, log):
        pass
    return log.receipt(unit, attempt), None


def count_held_out(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, Arrays]:
    """Count a unit's validation rows, and those that GradNet and the base network get right: ``total`` and by name."""
    log, counts = UnitLog(), np.zeros(3)
    for made in _outputs(bench, "shallow", unit, log, held_out_only=True):
        right = [(scores.argmax(1) == made.batch.labels).sum() for scores in (made.scores, made.logits)]
        counts += [*map(float, right), len(made.batch.labels)]
    return log.receipt(unit, attempt), dict(zip(("gradnet", "base", "total"), counts, strict=True))


def share_held_out(bench: Workbench, counts: Arrays) -> dict[str, Any]:
    """Return the accuracies ``gradnet`` and ``base`` on the ``num_rows`` validation rows; None if there are none."""
    total = int(counts["total"])
    shares = {name: float(counts[name]) / total if total else None for name in ("gradnet", "base")}
    return {**shares, "num_rows": total}


def count_test(bench: Workbench) -> dict[str, Any]:
    """Count the test rows that GradNet and the base network get right.

    Returns:
        ``total`` rows, ``num_classes``, and by model the ``correct`` ones.
    """
    right, total = {"base": 0, "gradnet": 0}, 0
    for block in open_features(bench.url(PREDICTIONS)).iter_chunks(("scores", "base", "labels")):
        for name, scores in (("base", block["base"]), ("gradnet", block["scores"])):
            right[name] += int((torch.from_numpy(scores).argmax(1).numpy() == block["labels"]).sum())
        total += len(block["labels"])
    return {"total": total, "num_classes": bench.facts.num_classes, "correct": right}


def _label_entries(bench: Workbench, unit: Unit, log: UnitLog) -> Iterator[tuple[Batch, Entries]]:
    """Yield some of a unit's samples and the kept entries of their gradients, not normalised."""
    config, engine, kept = bench.config, bench.gradnet_engine, bench.gradnet_entries
    how = {"seed": config.seed, "draws": config.gradnet_section.draws, "views": config.linear.views}

    def make(part: Batch) -> tuple[Batch, Entries] | None:
        return usable_samples(part, lambda some: label_entries(engine, kept, some, **how), _finite_entries, drop)

    drop, width = partial(drop_row, bench, "shallow", log.skipped), num_entries(config) * kept.num_kept
    with unit_samples(bench, "shallow", unit, log) as batches:
        for batch in batches:
            for part in parts(batch, width, config.runtime.memory_bytes):
                made: list[tuple[Batch, Entries] | None] = []
                log.halvings.each(part, make, made.append)
                yield from (found for found in made if found is not None)


def _outputs(
    bench: Workbench, split: str, unit: Unit, log: UnitLog, *, held_out_only: bool = False
) -> Iterator[Outputs]:
    config, engine, kept = bench.config, bench.gradnet_engine, bench.gradnet_entries
    tools = (engine, kept, bench.gradnet_normalisation, bench.gradnet)

    def make(part: Batch) -> tuple[Batch, Outputs] | None:
        return usable_samples(part, lambda some: batch_outputs(*tools, some, views=config.linear.views), _finite, drop)

    drop, width = partial(drop_row, bench, split, log.skipped), bench.facts.num_classes * kept.num_kept
    with unit_samples(bench, split, unit, log) as batches:
        for batch in batches:
            chosen = _held_out(bench, batch) if held_out_only else batch
            for part in parts(chosen, width, config.runtime.memory_bytes) if len(chosen.inputs) else ():
                made: list[tuple[Batch, Outputs] | None] = []
                log.halvings.each(part, make, made.append)
                yield from (found[1] for found in made if found is not None)


def _held_out(bench: Workbench, batch: Batch) -> Batch:
    held = torch.from_numpy(held_out(batch.index.numpy(), bench.config.seed, bench.config.gradnet_section.validation))
    here = held.to(batch.inputs.device)
    return Batch(batch.inputs[here], batch.labels[here], batch.index[held])


def _finite_entries(found: Entries) -> Tensor:
    return finite_rows(found[0])


def _finite(found: Outputs) -> Tensor:
    return finite_rows(found.scores) & finite_rows(found.logits)


def _write(
    writer: StoreWriter, unit: Unit, attempt: int, log: UnitLog, host: Host, found: dict[str, list[Tensor]]
) -> tuple[Receipt, None]:
    start = time.monotonic()
    host.wait()
    joined = {name: torch.cat(values).numpy() for name, values in found.items()} or writer.no_rows()
    num_bytes = writer.write_unit(unit, joined, attempt=attempt, skipped=log.skipped)
    log.seconds["write"] = time.monotonic() - start
    return log.receipt(unit, attempt, num_bytes), None
