"""One seed's run, driver after driver, until it has ended or stopped for good; invariants are checked throughout."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, StorageError, WorkersLostError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.drive import LEFTOVER_S
from fisher_ray.runtime.isolation import MAX_ROWS
from fisher_ray.runtime.schedule import Schedule
from fisher_ray.runtime.worker import IN_FLIGHT
from tests.simulation.clock import HangError
from tests.simulation.driving import let_pass, simulated, watched
from tests.simulation.invariants import BOUNDED, ENDS, BrokenError, check, check_excluded, check_heard, check_sum
from tests.simulation.invariants import check_written as check_all_written
from tests.simulation.plan import draw
from tests.simulation.sums import Checkpoints
from tests.simulation.trouble import Troubled

MAX_DRIVERS = 30


class DriverKilledError(BaseException):
    """The driver's process has ended."""


def step() -> None:
    """Stands for what is made of the whole sum, once."""


def explore(seed: int) -> list[str]:
    """Run a seed.

    Returns:
        What happened, a line for each event.

    Raises:
        BrokenError: if an invariant is; ``events`` are what happened until then.
    """
    chance = random.Random(f"plan {seed}")
    world = Troubled(seed, draw(chance))
    try:
        _Run(world).until_the_end()
    except BrokenError as error:
        error.events = world.events  # type: ignore[attr-defined]
        raise
    return world.events


class _Run:
    def __init__(self, world: Troubled) -> None:
        self._world, self._plan = world, world.plan
        self._units = plan_units(self._plan.num_rows, self._plan.unit_rows)
        self._excluded: dict[str, dict[int, str]] = {"metric": {}, "features": {}}
        self._finished: set[int] = set()  # units with a manifest
        self._summed = False
        self._schedules: list[Schedule] = []
        self._killed_s = float("inf")
        self._size = 0

    def until_the_end(self) -> None:
        world, kills_s = self._world, list(self._plan.kills_s)
        world.log(f"plan: {self._plan}")
        for number in range(1, MAX_DRIVERS + 1):
            if number > self._plan.num_troubled:
                world.calm_down()
            self._killed_s = world.now + kills_s.pop(0) if kills_s else float("inf")
            world.limit_s = world.now + self._plan.wait_s + 300.0
            world.counts.clear()
            world.counts["starved"] = not world.fleet.living
            self._size = 0
            if self._drive(number):
                return
            for actor in world.actors:
                actor.die(world.linger_s)
        raise BrokenError(ENDS, f"{MAX_DRIVERS} drivers have not come to an end")

    def _drive(self, number: int) -> bool:
        """Run one driver, and return whether no other is needed."""
        world = self._world
        world.log(f"driver {number} starts")
        try:
            overrides = self._plan.overrides
            with (
                watched(self._schedules),
                simulated(world, world.work, world.begin, *overrides, check=self._look) as given,
            ):
                self._pass(*given)
        except DriverKilledError:
            world.log(f"driver {number} is killed")
            return False
        except (DataError, WorkersLostError, StorageError) as error:
            world.log(f"driver {number} stops: {error}")
            check(ENDS, self._may_stop(error), f"without reason: {error}")
            return isinstance(error, DataError) and bool(self._blamed())
        except HangError as error:
            raise BrokenError(ENDS, str(error)) from error
        except BrokenError:
            raise
        except Exception as error:
            raise BrokenError(ENDS, f"{type(error).__name__}: {error}") from error
        return True

    def _pass(self, pool: Any, crew: Any) -> None:
        if not self._summed:
            self._sum(pool)
        self._write(pool)
        self._world.grant(3 * LEFTOVER_S)
        let_pass(self._world, crew, 2 * LEFTOVER_S)
        self._check_written()
        self._world.log("all is written")

    def _sum(self, pool: Any) -> None:
        stage, heard, plan, world = "metric", Counter[int](), self._plan, self._world
        kept: Any = None if plan.kept_level is None else Checkpoints(world, plan.kept_level)
        found = [] if kept is None else kept.found()
        there = {u for node in found for u in range(node.first_unit, node.first_unit + (1 << node.level))}
        units = self._without_excluded(stage, self._units)
        for node in found:
            check_sum(world.storage[node], self._rows(stage)[node.first_unit : node.first_unit + (1 << node.level)])
        total = pool.reduce(
            stage, "task", units, lambda receipt: heard.update([receipt.unit.index]),
            probe="probe", checkpoints=kept, on_excluded=self._excluded[stage].update,
        )  # fmt: skip
        check_sum(total.refs[0].value, self._rows(stage))
        world.log(f"the sum is {total.refs[0].value}")
        result = pool.solo(step, total, threads=1)
        check_sum(result[1:-1], self._rows(stage))
        new = {unit for unit in range(len(units)) if unit not in there or heard[unit]}
        check_heard(heard, new)
        check_excluded(self._excluded[stage], plan.broken, world.excused(stage), not plan.tough)
        check(BOUNDED, not total.given.schedule._running, f"still running: {total.given.schedule._running}")
        for node, value in world.storage.items():
            check_sum(value, self._rows(stage)[node.first_unit : node.first_unit + (1 << node.level)])
        world.storage.clear()
        self._summed = True

    def _write(self, pool: Any) -> None:
        stage, heard = "features", Counter[int]()
        todo = [unit for unit in self._without_excluded(stage, self._units) if unit.index not in self._finished]

        def received(receipt: Receipt) -> None:
            heard.update([receipt.unit.index])
            self._finished.add(receipt.unit.index)

        pool.map(stage, "task", todo, received, probe="probe", on_excluded=self._excluded[stage].update)
        check_heard(heard, [unit.index for unit in todo])
        check_excluded(self._excluded[stage], self._plan.broken, self._world.excused(stage), not self._plan.tough)
        self._check_written()

    def _check_written(self) -> None:
        written = self._world.written
        found = {unit: [*written[unit, 0], *written.get((unit, 1), [])] for unit, half in written if not half}
        check_all_written(found, self._rows("features"))

    # -- what is looked at while a driver is at work

    def _look(self) -> None:
        """Called as the run's check: ends a driver when its time has come, and sees what is held."""
        if self._world.now >= self._killed_s:
            raise DriverKilledError
        if self._schedules:
            room = self._world.fleet.num_slots
            asked = self._plan.num_workers
            self._size = max(self._size, 1, room if asked == "auto" else min(int(asked), room))
            wrong = sum(self._world.counts.values())
            levels = len(self._units).bit_length() + 1
            bound = (2 * IN_FLIGHT * self._size + wrong + 1) * (levels + 1)
            num_held = len(self._schedules[-1]._results)
            check(BOUNDED, num_held <= bound, f"{num_held} sums are held, more than {bound}")

    def _may_stop(self, error: Exception) -> bool:
        """Whether what has happened to this driver is reason enough."""
        counts, least = self._world.counts, self._plan.max_attempts
        if isinstance(error, StorageError):
            return counts["refused"] > 0
        if isinstance(error, DataError):
            fickle = bool(self._plan.tough and self._plan.broken)  # tough workers clear rows by which others fail
            return bool(self._blamed()) or fickle or counts["fail"] + counts["deaths"] >= least
        starved = counts["starved"] or counts["lost machines"] > 0 or counts["bad start"] > 0
        return starved or counts["deaths"] + counts["lost inputs"] >= least

    def _blamed(self) -> list[int]:
        """Rows for which a run stops that does not leave them out, or that are too many in one unit."""
        bad = [set(self._plan.broken) | set(self._world.excused(stage)) for stage in ("metric", "features")]
        crowded = any(len(rows & set(range(u.start, u.stop))) >= MAX_ROWS for rows in bad for u in self._units)
        return sorted(set.union(*bad)) if crowded or not self._plan.skips else []

    def _rows(self, stage: str) -> list[list[int]]:
        excluded = self._excluded[stage]
        return [[row for row in range(u.start, u.stop) if row not in excluded] for u in self._units]

    def _without_excluded(self, stage: str, units: Iterable[Unit]) -> list[Unit]:
        rows = sorted(self._excluded[stage].items())
        return [replace(u, excluded=tuple(item for item in rows if u.start <= item[0] < u.stop)) for u in units]
