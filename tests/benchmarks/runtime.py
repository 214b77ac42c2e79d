"""What scheduling costs: time a unit by number of workers, the driver's memory by number of units, two workers for one.

``python -m tests.benchmarks.runtime --data FOLDER`` (CIFAR-10, for the last; left out without).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

from fisher_ray import pipeline
from fisher_ray.config import Config
from fisher_ray.data import plan_units
from fisher_ray.records import Receipt, SilentProgress, Unit
from fisher_ray.runtime import Crew, Pool, Session
from tests.integration.runs import digits

NAP_S = 0.5
UNITS_EACH = 40
"""Units for each worker, beside two at the beginning that are not counted."""


def nap(bench: Any, unit: Unit, attempt: int) -> tuple[Receipt, None]:
    """Compute nothing for a while, in turn, as a GPU would."""
    with bench.turn:
        time.sleep(NAP_S)
    return Receipt(unit, attempt, {"compute": NAP_S}), None


def count(bench: Any, unit: Unit, attempt: int) -> tuple[Receipt, dict[str, np.ndarray]]:
    """Return a sum of the size of a small metric's."""
    return Receipt(unit, attempt), {"sum": np.ones(20_000)}


@contextmanager
def workers(number: int) -> Iterator[Pool]:
    """Yield that many workers, all of them there."""
    ray.init(address="local", num_cpus=number, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = digits(Path(folder), f"runtime.num_workers={number}")
            with (
                closing(Session()) as session,
                closing(Crew(session, config, None, print, lambda name, value: value)) as crew,
            ):
                pool = Pool(crew, config, print, lambda: None)
                while len(crew.ready) < number:
                    crew.top_up()
                    crew.wait(1.0)
                pool.map("features", nap, plan_units(2 * number, 1), lambda _: None)
                yield pool
    finally:
        ray.shutdown()


def overhead() -> None:
    """Print the time of a unit beyond its own, by number of workers."""
    for number in (1, 2, 4, 8, 16):
        with workers(number) as pool:
            start = time.perf_counter()
            pool.map("features", nap, plan_units(UNITS_EACH * number, 1), lambda _: None)
            each_s = (time.perf_counter() - start) / UNITS_EACH - NAP_S
        # One driver serves all: at W workers a unit of U seconds leaves it U / W for each.
        print(f"{number:3} workers: {1000 * each_s:6.1f} ms a unit of each", flush=True)


def driver_memory() -> None:
    """Print the driver's resident memory after passes over few and many rows."""
    with workers(2) as pool:
        for num_rows in (10_000, 10_000_000):
            units = plan_units(num_rows, 2048)
            start = time.perf_counter()
            pool.reduce("metric", count, units, lambda _: None)
            pool.map("features", count, units, lambda _: None)
            seconds = time.perf_counter() - start
            now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            print(f"{num_rows:9} rows, {len(units):5} units: driver {now / 1e6:.0f} MB, {seconds:.1f} s", flush=True)


class _Seconds(SilentProgress):
    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def stage_done(self, name: str, seconds: float) -> None:
        self.found[name] = seconds


def speedup(data: str) -> None:
    """Print the feature pass' seconds with one worker on one core and with two on two, interleaved.

    A worker reads ahead in a thread, so one alone on two cores would have more than one.
    """
    cores = sorted(os.sched_getaffinity(0))
    overrides = ["data.shallow.rows=[25000, 31144]", "data.test.rows=[0, 512]", "base.steps=20", "metric.fraction=0.2"]
    overrides += ["store.chunk_rows=512", "runtime.unit_rows=512", "compression.dim=1024", "metric.rank=512"]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for number in seconds:
            with tempfile.TemporaryDirectory() as folder:
                asked = [*overrides, f"data.root={data}", f"output={folder}", f"runtime.num_workers={number}"]
                heard = _Seconds()
                config = Config.from_yaml("jobs/configs/cifar10.yaml", asked)
                os.sched_setaffinity(0, cores[:number])
                pipeline.run(config, until="features", progress=heard)
                os.sched_setaffinity(0, cores)
                seconds[number].append(heard.found["features/train"])
                print(f"{number} workers: {json.dumps(heard.found)}", flush=True)
    medians = {number: sorted(values)[1] for number, values in seconds.items()}
    print(f"two workers for one: {medians[1] / medians[2]:.2f} times as fast")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="What scheduling costs.")
    parser.add_argument("--data", help="folder of CIFAR-10's Parquet files")
    data = parser.parse_args().data
    overhead()
    driver_memory()
    if data:
        speedup(data)


if __name__ == "__main__":
    main()
