"""One point of a growth curve, in a process of its own: prints its seconds and its memory as JSON.

python -m tests.benchmarks.growth.point CURVE VALUE WAY THREADS
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

import fisher_ray
from fisher_ray.classifier.fitting import Labels
from fisher_ray.config import Kind
from fisher_ray.gradients import Compressor, ScoreEngine, Softmax, bucketed
from fisher_ray.models import mlp
from fisher_ray.records import Batch
from fisher_ray.stages.passes import batch_features
from tests.benchmarks.process import memory

MICRO_BATCH, WIDTH, NUM_BUCKETS = 64, 64, 64
PARAMETER_ROWS, PARAMETER_INPUTS, NUM_HIDDEN = 128, 256, 8
CLASS_ROWS = 512
WORKER_ROWS, WORKER_UNIT = 2048, 256


class Rows:
    """Random rows that are made when they are read, the same each time.

    Args:
        number: of them.
        width: numbers of a row.
    """

    def __init__(self, number: int, width: int) -> None:
        """See the class."""
        self.number, self.width = number, width

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.number, MICRO_BATCH):
            size = min(MICRO_BATCH, self.number - start)
            yield torch.randn(size, self.width, generator=generator), torch.zeros(size, dtype=torch.int64)


def rows(value: int, way: str) -> dict[str, float]:
    """``N`` samples of a network of a few thousand parameters."""
    return _passes(mlp((WIDTH, 32, 10)), Rows(value, WIDTH), labels=_labels(way), dim=256, rank=128)


def parameters(value: int, way: str) -> dict[str, float]:
    """A network of about ``P`` parameters in nine layers, compressed as ``way`` says; one drawn label a sample."""
    if way not in get_args(Kind):
        raise ValueError(f"way {way!r} is not one of {', '.join(get_args(Kind))}")
    width = round(math.sqrt(value / (NUM_HIDDEN - 1) + 324) - 18)  # the first layer's inputs and the classes taken off
    model = mlp((PARAMETER_INPUTS, *[width] * NUM_HIDDEN, 10))
    exact = sum(parameter.numel() for parameter in model.parameters())
    found = _passes(
        model, Rows(PARAMETER_ROWS, PARAMETER_INPUTS), labels="sampled", compression=way, dim=1024, rank=128
    )
    return {**found, "value": exact}


def classes(value: int, way: str) -> dict[str, float]:
    """``C`` classes of a small network; ``way`` is whose scores, or ``buckets`` of all classes."""
    buckets = NUM_BUCKETS if way == "buckets" else None
    options = {"labels": _labels("all" if buckets else way), "class_buckets": buckets, "dim": 256, "rank": 128}
    return _passes(mlp((WIDTH, WIDTH, value)), Rows(CLASS_ROWS, WIDTH), **options)


def workers(value: int, way: str) -> dict[str, float]:
    """A run of the paper's CNN on an embedded Ray, with so many workers of a core each; the parent sees its memory."""
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for file, number in (("train", WORKER_ROWS), ("test", WORKER_UNIT)):
            inputs = generator.standard_normal((number, 3, 24, 24), dtype=np.float32)
            np.savez(Path(folder) / f"{file}.npz", inputs=inputs, labels=generator.integers(10, size=number))
        data = {
            key: {"format": "numpy", "path": f"{file}.npz"} for key, file in (("shallow", "train"), ("test", "test"))
        }
        values: dict[str, Any] = {
            "output": f"{folder}/run",
            "data": {"root": folder, **data},
            "model": {"factory": "fisher_ray.models:paper_cnn", "pretrained": True},
            "scores": {"labels": _labels(way)},
            "compression": {"dim": 512},
            "metric": {"rank": 128},
            "store": {"chunk_rows": WORKER_UNIT},
            "runtime": {"num_workers": value, "cpus_per_worker": 1, "unit_rows": WORKER_UNIT},
        }
        fisher_ray.run(fisher_ray.Config.from_dict(values), until="features")
        stages = json.loads((Path(folder) / "run" / "run.json").read_text())["stages"]
    return {
        "value": value,
        "metric_s": stages["basis"]["seconds"] + stages["metric"]["seconds"],
        "features_s": stages["features/train"]["seconds"],
    }


CURVES: dict[str, Callable[[int, str], dict[str, float]]] = {
    "rows": rows,
    "parameters": parameters,
    "classes": classes,
    "workers": workers,
}


def _labels(way: str) -> Labels:
    if way not in (known := get_args(Labels)):
        raise ValueError(f"labels {way!r} are not one of {', '.join(known)}")
    return way  # type: ignore[return-value]


def _passes(model: nn.Module, data: Rows, *, labels: Labels, rank: int, **options: Any) -> dict[str, float]:
    """Fit the metric, then make the features of every row, which are dropped; in seconds of the processor."""
    model, base = model.eval(), memory("VmRSS")
    start = time.process_time()
    metric = fisher_ray.fit_metric(model, data, labels=labels, rank=rank, **options)
    metric_s, metric_bytes = time.process_time() - start, memory("VmHWM")
    buckets = metric.attributes.get("class_buckets")
    start, engine = time.process_time(), ScoreEngine(model, likelihood=bucketed(Softmax(), buckets))
    compressor, seen = Compressor(metric.bases, engine.blocks, engine.like), 0
    for inputs, targets in data:
        batch = Batch(inputs, targets, torch.arange(seen, seen + len(inputs)))
        made = batch_features(engine, compressor, metric.transform, batch, labels=labels, seed=0, views=1)
        assert made is not None
        seen += len(made.values)
    assert seen == data.number
    return {
        "metric_s": metric_s,
        "features_s": time.process_time() - start,
        "metric_bytes": metric_bytes - base,
        "peak_bytes": memory("VmHWM") - base,
    }


if __name__ == "__main__":
    curve, value, way, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    print(json.dumps({"value": int(value), **CURVES[curve](int(value), way)}))
