"""Whole feature passes over their own arithmetic, and that over what the device's matrix products reach.

    python -m tests.benchmarks.pipeline [--workloads cnn,resnet18,gpt2] [--precisions float32,bfloat16] [--json FILE]

Each workload is a run on embedded Ray with one worker, on a GPU if there is one: a network with random weights; inputs
in a file; metric and features, which are read back by nobody. *Kernel*: features of one micro-batch that lies on the
device already, again and again, in this process. *Pipeline*: the run's own, of reading, decoding, computing, copying
and writing, from the end of the first unit to that of the last. *Products*: operations of the kernel (multiplications
and additions each counted, as by torch's counter) in a second, over those of large matrix products in the same
precision.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fisher_ray
from fisher_ray.config import Config
from fisher_ray.journal import EVENTS_FILE
from fisher_ray.records import Batch
from fisher_ray.stages import Workbench, inspect_request
from fisher_ray.stages.passes import batch_features
from fisher_ray.stages.workbench import score_engine
from tests.benchmarks.gradients.workloads import TOKENS

NUM_TOKENS, LENGTH = 50_257, 512
MIN_SECONDS = 3.0
"""That a kernel and matrix products are timed for, at least."""


@dataclass(frozen=True)
class Workload:
    """A network, its inputs, and what is computed of them.

    Attributes:
        factory: of the network.
        inputs: makes so many.
        labels: as of ``scores.labels``.
        kind: of the compression.
        micro_batch: samples at a time.
        unit_rows: samples of a unit.
        transform: as of ``data.transform``.
        num_units: of the features.
    """

    factory: str
    inputs: Callable[[int], np.ndarray]
    labels: str
    kind: str
    micro_batch: int
    unit_rows: int
    transform: str | None = None
    num_units: int = 12

    def scaled(self, share: float) -> tuple[int, int]:
        """Return the samples of a micro-batch and of a unit on a device that is ``share`` as fast."""
        unit = max(2, round(self.unit_rows * share))
        return min(max(1, round(self.micro_batch * share)), unit), unit


def _pictures(side: int) -> Callable[[int], np.ndarray]:
    return lambda number: np.random.default_rng(0).standard_normal((number, 3, side, side), dtype=np.float32)


def _tokens(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, NUM_TOKENS, (number, LENGTH))


WORKLOADS = {
    "cnn": Workload("fisher_ray.models:paper_cnn", _pictures(24), "all", "kronecker", 1024, 8192),
    "resnet18": Workload("tests.benchmarks.gradients.workloads:resnet18", _pictures(32), "all", "random", 256, 4096),
    "gpt2": Workload(
        "tests.benchmarks.gradients.workloads:gpt2_small",
        _tokens,
        "sampled",
        "random",
        32,
        512,
        TOKENS,
    ),
}


class Operations(TorchDispatchMode):
    """Counts the operations of products and convolutions, as torch's own counter does, which bears no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


def configuration(work: Workload, folder: Path, share: float, precision: str) -> Config:
    """Write a workload's inputs, and return the configuration of its run."""
    micro_batch, unit_rows = work.scaled(share)
    number = unit_rows * work.num_units
    np.savez(folder / "inputs.npz", inputs=work.inputs(number), labels=np.arange(number) % 10)
    rows = {"shallow": [0, number], "test": [0, unit_rows]}
    source = {"format": "numpy", "path": "inputs.npz"}
    return Config.from_dict(
        {
            "output": str(folder / "run"),
            "data": {
                "root": str(folder),
                "transform": work.transform,
                **{name: {**source, "rows": span} for name, span in rows.items()},
            },
            "model": {"factory": work.factory, "pretrained": True},
            "base": None,
            "trained_on": None,
            "scores": {"labels": work.labels, "precision": precision},
            "compression": {"kind": work.kind, "dim": 2048},
            "metric": {"rank": 512, "fraction": 1 / work.num_units},
            "store": {"chunk_rows": unit_rows},
            "runtime": {"num_workers": 1, "unit_rows": unit_rows, "micro_batch": micro_batch},
        }
    )


def pipeline_rate(folder: Path) -> float:
    """Return the samples a second of a run's features, from the end of the first unit to that of the last."""
    events = [json.loads(line) for line in (folder / "run" / EVENTS_FILE).read_text().splitlines()]
    units = [item for item in events if item["event"] == "unit done" and item["stage"] == "features/train"]
    ends = sorted((datetime.fromisoformat(item["time"]), item["rows"]) for item in units)
    seconds = (ends[-1][0] - ends[0][0]).total_seconds()
    return sum(stop - start for _, (start, stop) in ends[1:]) / seconds


def repeated(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one ``run``, of many."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    wait()
    start, number = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < MIN_SECONDS:
        run()
        number += 1
        wait()
    return spent / number


def products_rate(device: torch.device, precision: str) -> float:
    """Return the operations a second of products of large matrices."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    return 2 * side**3 / repeated(lambda: left @ right, device)


def kernel(config: Config, device: torch.device) -> tuple[float, float]:
    """Return the samples a second of the features alone, and the operations of a sample."""
    facts = inspect_request(config)
    bench = Workbench(config, facts, str(device))
    rows = range(bench.micro_batch)
    inputs = torch.from_numpy(np.load(f"{config.data.root}/inputs.npz")["inputs"][: len(rows)]).to(device)
    labels = torch.arange(len(rows), device=device) % 10
    batch = Batch(inputs, labels, torch.arange(len(rows)))

    def run(engine: Any) -> None:
        how: dict[str, Any] = {"labels": config.scores.labels, "seed": config.seed, "views": config.linear.views}
        batch_features(engine, bench.compressor, bench.metric.transform, batch, **how)

    with Operations() as counted:
        run(score_engine(config, bench.model))
    seconds = repeated(lambda: run(bench.engine), device)
    return len(rows) / seconds, counted.total / len(rows)


def measured(name: str, precision: str, share: float, device: torch.device) -> dict[str, float]:
    """Run a workload; rates in samples and operations a second."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(WORKLOADS[name], Path(folder), share, precision)
        fisher_ray.run(config, until="features")
        whole = pipeline_rate(Path(folder))
        alone, operations = kernel(config, device)
    most = products_rate(device, precision)
    found = {"kernel": alone, "pipeline": whole, "pipeline/kernel": whole / alone}
    return {**found, "gflop": operations / 1e9, "tflops": alone * operations / 1e12, "share": alone * operations / most}


def main() -> None:
    """Measure, print a line for each workload and precision, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--precisions", default="float32,bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--share", type=float, default=1.0 if torch.cuda.is_available() else 1 / 64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # as a worker
    print(torch.cuda.get_device_name() if device.type == "cuda" else "one thread of the processor", flush=True)
    results: dict[str, dict[str, float]] = {}
    for name in options.workloads.split(","):
        for precision in options.precisions.split(","):
            found = results[f"{name} {precision}"] = measured(name, precision, options.share, device)
            rates = f"kernel {found['kernel']:,.1f}/s, pipeline {found['pipeline']:,.1f}/s"
            made = f"{found['gflop']:,.2f} GFLOP a sample, {found['tflops']:,.2f} TFLOP/s"
            ratios = f"pipeline {found['pipeline/kernel']:.2f} of kernel, kernel {found['share']:.2f} of products"
            print(f"{name:8} {precision:8} {rates}; {made}; {ratios}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
