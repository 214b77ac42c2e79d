"""The real driver on a simulated world."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fisher_ray.config import Config
from fisher_ray.runtime import crew, drive, member, passing, pool, resources, starts, watch
from fisher_ray.runtime.schedule import Schedule
from tests.integration.runs import digits
from tests.simulation.actors import Behave, Outcome
from tests.simulation.world import World

MODULES = (crew, drive, member, passing, pool, resources, starts, watch)


def let_pass(world: World, given: crew.Crew, seconds: float) -> None:
    """Let the leftovers of a pass end."""
    end = world.now + seconds
    while world.now < end:
        if not given.members:
            return world.spend(end - world.now)
        given.wait(1.0)
        for late in given.expired():
            given.bury(late, TimeoutError("gone"))


@contextmanager
def watched(schedules: list[Schedule]) -> Iterator[None]:
    """Put the schedule of every pass into a list."""

    def drive_of(crew: Any, given: Any, *arguments: Any, **options: Any) -> drive.Drive:
        schedules.append(given.schedule)
        return drive.Drive(crew, given, *arguments, **options)

    with mock.patch.object(pool, "Drive", drive_of):
        yield


@cache
def _config(*overrides: str) -> Config:
    return digits(Path("nowhere"), *overrides)


@contextmanager
def simulated(
    world: World,
    behave: Behave | None = None,
    start: Callable[[int], Outcome] | None = None,
    *overrides: str,
    notes: list[str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, crew.Crew]]:
    """A pool and its crew, by default of two workers that start within a second and take one for everything."""
    world.behave, world.start = behave or world.behave, start or world.start
    config = _config("runtime.num_workers=2", "runtime.gpus_per_worker=0", "data.on_error=skip", *overrides)
    note = ([] if notes is None else notes).append
    session: Any = SimpleNamespace(embedded=True, connect=lambda: None, worker_environment=dict)
    metrics = SimpleNamespace(show=lambda *values: None, retry=lambda *values: None)
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(pool, "DriverMetrics", return_value=metrics))
        for module, name in itertools.product(MODULES, ("ray", "time")):
            if hasattr(module, name):
                patched.enter_context(mock.patch.object(module, name, world))
        made = crew.Crew(session, config, None, note, lambda name, value: value)
        yield pool.Pool(made, config, note, check), made
