"""Time of merging many units' sums on workers, and the driver's memory meanwhile."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ray
import torch

from fisher_ray.metric import basis_arrays, basis_attributes
from fisher_ray.records import LayerSketch, Receipt, Unit
from fisher_ray.runtime import Crew, Pool, Session
from fisher_ray.stages import Workbench, inspect_request, tasks
from fisher_ray.store import save_arrays
from tests.benchmarks.process import memory
from tests.stages.small_runs import small_config, write_pictures

NUM_UNITS, SIDE = 64, 64
NUM_ROWS = 3200
"""Of a ready-made sum: enough that both of its sketches are full."""
STORE_BYTES = 2 << 30
MERGED: dict[str, dict[str, Any]] = {
    "exact": {"rank": 1024},
    "nystrom, 512 columns": {"estimator": "nystrom", "rank": 256, "size": 512},
    "frequent directions, 512 rows": {"estimator": "frequent_directions", "rank": 256, "size": 512},
}


def ready_made(bench: Workbench, unit: Unit, attempt: int) -> tuple[Receipt, dict[str, Any]]:
    """Return a sum that was made before."""
    return Receipt(unit, attempt), _made(bench)


@cache
def _made(bench: Workbench) -> dict[str, Any]:
    sums, generator = bench.new_fisher_sum(), torch.Generator().manual_seed(0)
    for start in range(0, NUM_ROWS, 64):
        index = torch.arange(start, start + 64)
        sums.add(torch.randn(64, 1, sums.dim, generator=generator), index)
    return sums.to_arrays()


@contextmanager
def workers(side: int, metric: dict[str, Any]) -> Iterator[Pool]:
    """Yield two workers that merge a metric of ``side²`` coordinates, each with a sum made."""
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        asked = {"damping": "auto", "fraction": 1.0, **metric}
        runtime, compression = {"num_workers": 2, "cpus_per_worker": 1}, {"dim": side * side}
        config = small_config(Path(folder), metric=asked, runtime=runtime, compression=compression)
        bases = {"layer": LayerSketch("layer", (side, side), side * side, None)}
        attributes = {"kind": "basis", "bases": basis_attributes(bases)}
        save_arrays(f"{config.output}/basis.zarr", basis_arrays(bases), attributes)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            with (
                closing(Session()) as session,
                closing(Crew(session, config, inspect_request(config), print, lambda name, value: value)) as crew,
            ):
                pool = Pool(crew, config, print, lambda: None)
                reduce_units(pool, 8)  # every worker has had a unit
                yield pool
        finally:
            ray.shutdown()


def reduce_units(pool: Pool, num_units: int) -> float:
    """Reduce so many units, and return the seconds that it took."""
    units = [Unit(number, number, number + 1) for number in range(num_units)]
    start = time.perf_counter()
    pool.reduce("metric", ready_made, units, lambda receipt: None, merge=tasks.merge_fisher)
    return time.perf_counter() - start


def measure_merge() -> dict[str, float]:
    """Return the seconds by estimator, and print them."""
    found = {}
    for name, metric in MERGED.items():
        with workers(SIDE, metric) as pool:
            found[name] = reduce_units(pool, NUM_UNITS)
        print(f"merge of {NUM_UNITS} units, D {SIDE**2}, {name:30} {found[name]:6.1f} s", flush=True)
    return found


def measure_driver() -> dict[str, dict[str, int]]:
    """Return the driver's resident bytes by number of units, and print them."""
    found = {}
    side = 23  # 529 coordinates: 2.5 MB a unit
    with workers(side, {"rank": 256}) as pool:
        for num_units in (8, 32, 128):
            reduce_units(pool, num_units)
            now = memory("VmRSS")
            peak = memory("VmHWM")
            found[str(num_units)] = {"resident_bytes": now, "peak_bytes": peak}
            print(f"{num_units:4} units: driver {now / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB", flush=True)
    return found
