"""One scenario, run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

from fisher_ray.data import plan_units
from fisher_ray.runtime.schedule import Schedule
from tests.simulation.driving import simulated, watched
from tests.simulation.scale.costs import Scenario
from tests.simulation.scale.world import Costly, KeptSums, joined
from tests.simulation.sums import merged

THERE = 0.98
"""The share of the workers that a run waits for: the last ones may be lost meanwhile."""


@dataclass(frozen=True)
class Found:
    """What a scenario took.

    Attributes:
        scenario: its name.
        num_workers: of it.
        num_rows: of each pass.
        unit_rows: of a unit.
        start_s: until 98 % of the workers were there.
        metric_s: of the metric pass.
        solo_s: between the passes.
        features_s: of the feature pass.
        efficiency: useful seconds of GPUs over all seconds of the passes.
        metric_efficiency: of the metric pass.
        features_efficiency: of the feature pass.
        whole_efficiency: over all seconds of the run, start and solo step included.
        driver_load: the share of the passes in which the driver is busy.
        driver_unit_s: that it is busy for a unit and pass.
        moved_bytes: between machines, for merges.
        storage_bytes: read and written.
        held_bytes: of the sums that are held on the workers' machines at most; the driver holds none.
        wasted: units that were computed in vain, a unit.
        lost_machines: during the run.
        removed: kept sums that the driver removed.
        rounds: of the driver's loop.
    """

    scenario: str
    num_workers: int
    num_rows: int
    unit_rows: int
    start_s: float
    metric_s: float
    solo_s: float
    features_s: float
    efficiency: float
    metric_efficiency: float
    features_efficiency: float
    whole_efficiency: float
    driver_load: float
    driver_unit_s: float
    moved_bytes: float
    storage_bytes: float
    held_bytes: float
    wasted: float
    lost_machines: int
    removed: int
    rounds: int


@dataclass(frozen=True)
class Measured:
    """What simulating took on this machine.

    Attributes:
        seconds: in all.
        own_s: of the driver's own code.
        unit_s: of it, for a unit and pass.
        scan_s: of it, for a round and a worker.
    """

    seconds: float
    own_s: float
    unit_s: float
    scan_s: float


def decompose() -> None:
    """Stands for the eigenvectors of the sum."""


def run_scenario(scenario: Scenario, seed: int = 0) -> tuple[Found, Measured]:
    """Run both passes, and check that the sum is right and every unit was written."""
    begun, cpu_begun_s = time.perf_counter(), time.process_time()
    world = Costly(scenario, seed)
    times, busy_s, num_held = _passes(scenario, world)
    found = _found(scenario, world, times, world.driver_s - busy_s, num_held)
    seconds = time.perf_counter() - begun
    # Of the process's own seconds, so that what else the machine does is not counted; asking for them is slow.
    own_s = (time.process_time() - cpu_begun_s) * world.own_s / seconds
    scans = max(1, world.num_scanned // 2)
    return found, Measured(seconds, own_s, own_s / (2 * scenario.num_units), own_s / scans)


def _passes(scenario: Scenario, world: Costly) -> tuple[list[float], float, int]:
    """Return when the workers were there and steps ended, the driver's seconds before, and the sums held at most."""
    units, schedules, num_held = plan_units(scenario.num_rows, scenario.unit_rows), list[Schedule](), 0

    def look() -> None:
        nonlocal num_held
        num_held = max(num_held, len(schedules[0]._results) if schedules else 0)

    heard: dict[str, set[int]] = {"metric": set(), "features": set()}
    overrides = (f"runtime.num_workers={scenario.num_workers}", "runtime.wait_s=3600")
    with watched(schedules), simulated(world, world.work, world.begin, *overrides, check=look) as (pool, crew):
        world.leave()
        crew.top_up()
        while len(crew.ready) < THERE * scenario.num_workers:
            crew.wait(1.0)
            crew.top_up()
        times, busy_s = [world.now], world.driver_s
        kept = None if scenario.every_units is None else KeptSums(world, (scenario.every_units - 1).bit_length())
        total = pool.reduce(
            "metric", "task", units, lambda receipt: heard["metric"].add(receipt.unit.index), checkpoints=kept
        )
        times.append(world.now)
        assert total.refs[0].value == merged([(len(unit), unit.index + 1) for unit in units], joined)
        pool.solo(decompose, total, threads=1)
        times.append(world.now)
        pool.map("features", "task", units, lambda receipt: heard["features"].add(receipt.unit.index))
        times.append(world.now)
        world.enter()
    assert all(len(found) == len(units) for found in heard.values())
    return times, busy_s, num_held


def _found(scenario: Scenario, world: Costly, times: list[float], busy_s: float, num_held: int) -> Found:
    metric_s, solo_s, features_s = (later - earlier for earlier, later in pairwise(times))
    ideal_s, num_units = scenario.ideal_s, 2 * scenario.num_units
    return Found(
        scenario=scenario.name,
        num_workers=scenario.num_workers,
        num_rows=scenario.num_rows,
        unit_rows=scenario.unit_rows,
        start_s=times[0],
        metric_s=metric_s,
        solo_s=solo_s,
        features_s=features_s,
        efficiency=2 * ideal_s / (metric_s + features_s),
        metric_efficiency=ideal_s / metric_s,
        features_efficiency=ideal_s / features_s,
        whole_efficiency=2 * ideal_s / times[-1],
        driver_load=busy_s / (times[-1] - times[0]),
        driver_unit_s=busy_s / num_units,
        moved_bytes=world.moved_bytes,
        storage_bytes=world.files.bytes.total,
        held_bytes=num_held * scenario.costs.sum_bytes,
        wasted=(world.counts["run"] - num_units) / num_units,
        lost_machines=world.counts["lost machines"],
        removed=world.counts["removed"],
        rounds=world.counts["rounds"],
    )
