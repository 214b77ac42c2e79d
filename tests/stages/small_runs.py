"""Small runs in this process: pictures in a NumPy file, a small network, and the stages one after the other."""

from __future__ import annotations

from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisher_ray.config import Config
from fisher_ray.records import Unit
from fisher_ray.stages import Workbench, inspect_request, planning, tasks, training
from fisher_ray.stages.passes import feature_spec
from fisher_ray.store import create_store, seal

NUM_CLASSES = 3
ROWS = {"train": (0, 48), "shallow": (48, 118), "test": (118, 160)}


def convolution() -> nn.Module:
    """Return a network whose logits are no linear layer's, so that it has no last hidden layer."""
    return nn.Sequential(nn.Conv2d(1, NUM_CLASSES, (3, 2), bias=False), nn.AdaptiveMaxPool2d(1), nn.Flatten())


class LeftOut(nn.Module):
    """A network with a layer that its logits do not depend on."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.unused, self.fc = nn.Linear(7, 4), nn.Linear(12, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Use one of them."""
        return self.fc(x.flatten(1))


def write_pictures(folder: Path, bad: tuple[int, ...] = (), value: float = np.nan) -> None:
    """Write 160 noisy pictures of three classes; those of the rows ``bad`` of the shallow split are of ``value``."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, NUM_CLASSES, 160)
    centres = generator.normal(size=(NUM_CLASSES, 1, 4, 3))
    inputs = (centres[labels] + generator.normal(size=(160, 1, 4, 3))).astype(np.float32)
    inputs[[ROWS["shallow"][0] + row for row in bad]] = value
    np.savez(folder / "pictures.npz", inputs=inputs, labels=labels)


def small_config(folder: Path, **sections: Any) -> Config:
    """Return a configuration of the pictures in ``folder``; sections are merged into the small ones."""
    values: dict[str, Any] = {
        "output": str(folder / "run"),
        "data": {
            "root": str(folder),
            **{name: {"format": "numpy", "path": "pictures.npz", "rows": rows} for name, rows in ROWS.items()},
        },
        "model": {"factory": "fisher_ray.models:mlp", "kwargs": {"sizes": [12, 5, NUM_CLASSES]}},
        "base": {"steps": 12, "batch_size": 16, "lr": 0.1},
        "compression": {"dim": 40},
        "metric": {"rank": 24, "fraction": 1.0, "damping": 0.1},
        "store": {"dtype": "float32", "chunk_rows": 8},
        "runtime": {"unit_rows": 16, "micro_batch": 8},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(values.get(name), dict) and section else section
    return Config.from_dict(values).located()


def small_bench(folder: Path, *, bad: tuple[int, ...] = (), value: float = np.nan, **sections: Any) -> Workbench:
    """Return the workbench of a run that has its base network."""
    write_pictures(folder, bad, value)
    config = small_config(folder, **sections)
    bench = Workbench(config, inspect_request(config))
    list(training.train_base(bench))
    return bench


def shallow_rows(bench: Workbench) -> tuple[Tensor, Tensor]:
    """Return the shallow split's inputs and labels, read without the package."""
    start, stop = ROWS["shallow"]
    with np.load(Path(bench.config.data.root) / "pictures.npz") as arrays:
        return torch.from_numpy(arrays["inputs"][start:stop]), torch.from_numpy(arrays["labels"][start:stop])


def merged(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Add results as the workers do."""
    total = parts[0]
    for part in parts[1:]:
        total = {name: value + part[name] for name, value in total.items()}
    return total


def fit_metric(bench: Workbench) -> dict[str, Any]:
    """Run the stages ``basis`` and ``metric``, and return what the second is sealed with."""
    units = planning.metric_units(bench.config, bench.facts)
    kronecker = [tasks.sum_kronecker(bench, unit, 1)[1] for unit in units]
    tasks.choose_basis(bench, *([merged(kronecker)] if bench.config.compression.kind == "kronecker" else []))
    sums = [tasks.sum_fisher(bench, unit, 1)[1] for unit in units]
    return tasks.fit_metric(bench, reduce(partial(tasks.merge_fisher, bench), sums), fingerprints={})


def write_features(bench: Workbench, name: str, split: str) -> list[Unit]:
    """Run a feature stage, and return its units."""
    rank, rms = bench.metric.rank, bench.metric.feature_rms
    attributes = {"split": split, "labels": bench.config.scores.labels}
    spec = feature_spec(bench.config, bench.facts, split, rank, rms, attributes)
    create_store(bench.url(f"features/{name}.zarr"), spec)
    units = planning.split_units(bench.config, bench.facts, split)
    for unit in reversed(units):
        receipt, nothing = tasks.write_features(bench, unit, 1, split=split, name=f"features/{name}.zarr")
        assert nothing is None
        assert (receipt.unit, receipt.attempt) == (unit, 1)
        assert receipt.num_bytes > 0
    seal(bench.url(f"features/{name}.zarr"), len(units))
    return units
