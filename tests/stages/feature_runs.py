"""Run folders that hold what the logistic fit starts from: sealed features of random rows, and their sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fisher_ray.config import Config
from fisher_ray.data import plan_units
from fisher_ray.linear import GramSum
from fisher_ray.stages import Facts, Workbench, shallow
from fisher_ray.store import ArraySpec, StoreSpec, StoreWriter, create_store, seal

HIDDEN = 3


@dataclass(frozen=True)
class FeatureRun:
    """The run's parts, and its rows as one matrix: features, then the hidden layer."""

    config: Config
    facts: Facts
    x: np.ndarray
    labels: np.ndarray
    held: np.ndarray

    @property
    def bench(self) -> Workbench:
        return Workbench(self.config, self.facts)


def make_run(
    folder, num_rows=300, rank=4, num_classes=3, *, dtype="float64", chunk_rows=16, skipped=(), runtime=None, **linear
):
    """Write a run folder; unlike a run's own, its features may be float64, which lets fits be compared closely."""
    config = Config.from_dict(
        {
            "output": str(folder),
            "data": {"shallow": {"path": "a"}, "test": {"path": "b"}},
            "model": {"factory": "m:f", "checkpoint": "c"},
            "store": {"chunk_rows": chunk_rows},
            "linear": {"model": "logistic", "penalties": [0.003, 0.03, 0.3], "max_steps": 100, **linear},
            "runtime": {"unit_rows": 4 * chunk_rows, **(runtime or {})},
        }
    )
    facts = Facts({"shallow": num_rows, "test": 1}, {}, (1,), num_classes, HIDDEN, {}, 1, 64, 64)
    arrays = _rows(num_rows, rank, num_classes, dtype)
    _write(str(folder / "features/train.zarr"), arrays, config, dtype, dict.fromkeys(skipped, "not a picture"))
    bench = Workbench(config, facts)
    blocks = [shallow.linear_rows(bench, bench.train_store, part) for part in ("fit", "validation")]
    sums = [_sum(part, num_classes * rank + HIDDEN, num_classes) for part in blocks]
    shallow.save_sums(bench, *(item.to_arrays() for item in sums))
    kept = np.delete(np.arange(num_rows), list(skipped))
    held = [block["index"] for block in shallow.linear_rows(bench, bench.train_store, "validation")]
    stored = np.concatenate([arrays["features"].reshape(num_rows, -1), arrays["hidden"]], 1)
    where = np.isin(kept, torch.cat(held).numpy()) if held else np.zeros(len(kept), bool)
    return FeatureRun(config, facts, stored[kept], arrays["labels"][kept], where)


def _rows(num_rows, rank, num_classes, dtype):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_classes, num_rows)
    centres = generator.normal(size=(num_classes, num_classes, rank))
    scales = 10 ** generator.uniform(-1, 1, (num_classes, rank))
    features = (0.7 * centres[labels] + generator.normal(size=(num_rows, num_classes, rank)) + 2) * scales
    features[:, 0, 0] = 5.0  # a constant column
    hidden = generator.normal(size=(num_rows, HIDDEN)).astype(np.float32)
    logits = np.zeros((num_rows, num_classes), np.float32)
    features = features.astype(dtype).astype(np.float64 if dtype == "float64" else np.float32)
    return {"features": features, "labels": labels, "index": np.arange(num_rows), "logits": logits, "hidden": hidden}


def _write(url, arrays, config, dtype, skipped):
    dtypes = {"features": dtype, "labels": "int64", "index": "int64", "logits": "float32", "hidden": "float32"}
    specs = {
        name: ArraySpec(value.shape[1:], dtypes[name], tuple("nabc"[: value.ndim])) for name, value in arrays.items()
    }
    num_rows, unit_rows = len(arrays["labels"]), config.runtime.unit_rows
    create_store(url, StoreSpec(num_rows, unit_rows, config.store.chunk_rows, "none", specs))
    units = plan_units(num_rows, unit_rows)
    for unit in units:
        rows = slice(unit.start, unit.stop)
        gone = {row: reason for row, reason in skipped.items() if row in range(unit.start, unit.stop)}
        StoreWriter(url).write_unit(unit, {name: value[rows] for name, value in arrays.items()}, skipped=gone)
    seal(url, len(units))


def _sum(blocks, num_columns, num_classes):
    sums = GramSum.zeros(num_columns, num_classes)
    for block in blocks:
        sums.add(block["x"], block["labels"])
    return sums
