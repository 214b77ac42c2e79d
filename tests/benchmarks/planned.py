"""What `fisher-ray plan` says a run takes, over what it takes: three workloads, with one worker and with two.

    python -m tests.benchmarks.planned --data FOLDER [--workloads cnn,mlp,transformer] [--workers 1,2]

FOLDER has CIFAR-10 as Parquet files, for the paper's network; the multilayer perceptron and the transformer have inputs
of random numbers. Each run is planned right before it is made, on the same machine.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import fisher_ray
from fisher_ray import pipeline
from fisher_ray.config import Config
from fisher_ray.journal import read_run
from fisher_ray.records import SilentProgress
from fisher_ray.storage import Storage
from tests.benchmarks.gradients.workloads import TOKENS

CIFAR10 = Path("jobs/configs/cifar10.yaml")
SMALLER = ("base.steps=600", "metric.rank=256", "linear.views=1", "trained_on=null", "data.test.rows=[0,4000]")
ROWS = {"mlp": (2000, 24_000, 4000), "transformer": (500, 3000, 500)}
"""Of the three splits."""


def cnn(folder: Path, data: str) -> Config:
    """The paper's network on real pictures."""
    return Config.from_yaml(CIFAR10, [f"data.root={data}", f"output={folder}/run", *SMALLER])


def generated(name: str, folder: Path) -> Config:
    """A network on random numbers, or on random tokens."""
    rng, sizes = np.random.default_rng(0), ROWS[name]
    inputs = rng.integers(0, 2048, (sum(sizes), 64)) if name == "transformer" else rng.random((sum(sizes), 784), "f4")
    np.savez(folder / "inputs.npz", inputs=inputs, labels=rng.integers(0, 10, sum(sizes)))
    ends = np.cumsum([0, *sizes]).tolist()
    source = {"format": "numpy", "path": "inputs.npz"}
    splits = zip(("train", "shallow", "test"), itertools.pairwise(ends), strict=True)
    mlp = {"factory": "fisher_ray.models:mlp", "kwargs": {"sizes": [784, 1024, 1024, 10]}}
    values: dict[str, Any] = {
        "output": str(folder / "run"),
        "data": {"root": str(folder), **{split: {**source, "rows": [*rows]} for split, rows in splits}},
        "model": mlp if name == "mlp" else {"factory": "tests.benchmarks.gradients.workloads:Transformer"},
        "base": {"steps": 300},
        "trained_on": None,
        "compression": {"dim": 1024},
        "metric": {"rank": 256},
        "store": {"chunk_rows": 500},
        "runtime": {"unit_rows": 500},
    }
    if name == "transformer":
        values["data"]["transform"] = TOKENS
        values["scores"] = {"parameters": "layers.*", "labels": "sampled"}
    return Config.from_dict(values)


def main() -> None:
    """Plan and run, and print a line for each workload and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--workloads", default="cnn,mlp,transformer")
    parser.add_argument("--workers", default="1,2")
    options = parser.parse_args()
    print("| workload | workers | planned, s | run, s | planned over run |\n|---|---|---|---|---|")
    for name in options.workloads.split(","):
        for workers in map(int, options.workers.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                made = cnn(Path(folder), options.data) if name == "cnn" else generated(name, Path(folder))
                config = Config.from_dict(made.model_dump(mode="json"), [f"runtime.num_workers={workers}"])
                planned = pipeline.plan(config)["seconds"]
                fisher_ray.run(config, progress=SilentProgress())
                stages = read_run(Storage(config.output))["stages"]
            total = planned["total"]
            needed = sum(stage["seconds"] for key, stage in stages.items() if key != "report")
            line = (name, workers, f"{total:.0f}", f"{needed:.0f}", f"{total / needed:.2f}")
            print(f"| {' | '.join(map(str, line))} |", flush=True)


if __name__ == "__main__":
    main()
