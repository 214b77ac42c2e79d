"""Workers that do not start, or end while they do: how long no other is started, and when the run stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fisher_ray.data import plan_units
from fisher_ray.errors import ConfigError, WorkersLostError
from fisher_ray.runtime import member as member_module
from fisher_ray.runtime.crew import MAX_FAILED_STARTS, Crew
from fisher_ray.runtime.member import Job, Member
from fisher_ray.runtime.starts import MAX_PAUSE_S
from tests.simulation.actors import DIE, HANG, Outcome
from tests.simulation.driving import simulated
from tests.simulation.world import World


def test_a_job_has_twice_its_limit_as_long_as_it_is_beside_another(monkeypatch):
    clock = World()
    monkeypatch.setattr(member_module, "time", clock)
    one, first, second = Member(None, None, None), Job("a", "unit", None, []), Job("b", "unit", None, [])
    one.take(first)
    assert (one.is_overdue(30, 30), one.is_overdue(31, 30), one.is_overdue(1e9, None)) == (False, True, False)
    clock.now = 20
    one.take(second)
    assert (one.is_overdue(60, 30), one.is_overdue(61, 30)) == (False, True)
    clock.now = 40
    one.drop(first)
    assert (one.is_overdue(70, 30), one.is_overdue(71, 30)) == (False, True)
    second.until_s = 50
    assert (one.is_overdue(50, 30), one.is_overdue(51, 30), one.is_overdue(51, None)) == (False, True, True)


@contextmanager
def beginners(num_workers: int) -> Iterator[tuple[Crew, World]]:
    """A crew whose workers start when they are told to."""
    world = World()
    with simulated(world, None, lambda number: (HANG, "ok"), f"runtime.num_workers={num_workers}") as (_, crew):
        crew.top_up()
        yield crew, world


def begin(crew: Crew, number: int = 1, how: str = "ok") -> None:
    """Let some of those that start have started, or end."""
    for member in [member for member in crew.members if member.place is None][:number]:
        member.handle.come_up(how)
    crew.wait(0)


def pause_s(crew: Crew, world: World) -> float:
    """How long it takes until another worker is started."""
    before, start = len(crew.members), world.now
    crew.top_up()
    while len(crew.members) == before:
        assert world.now - start < 1000
        world.now += 0.5
        crew.top_up()
    return world.now - start


def test_after_each_failed_start_the_next_is_tried_later_up_to_a_minute():
    pauses = []
    with beginners(2) as (crew, world):
        begin(crew)
        for _ in range(8):
            begin(crew, how=DIE)
            pauses.append(pause_s(crew, world))
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]


def test_a_worker_that_starts_makes_the_pauses_short_again():
    with beginners(3) as (crew, world):
        begin(crew)
        for _ in range(3):
            begin(crew, 2, DIE)
            world.now += MAX_PAUSE_S
            crew.top_up()
        begin(crew)
        begin(crew, how=DIE)
        assert pause_s(crew, world) == 2.0


def test_a_lost_worker_that_had_started_is_replaced_at_once():
    with beginners(2) as (crew, world):
        begin(crew, 2)
        world.actors[0].die()
        crew.wait(0)
        crew.top_up()
        assert len(crew.members) == 2


def test_with_no_worker_alive_the_next_is_started_at_once_and_the_run_stops_after_some():
    with beginners(1) as (crew, _):
        for _ in range(MAX_FAILED_STARTS - 1):
            begin(crew, how=DIE)
            crew.top_up()
            assert len(crew.members) == 1
        with pytest.raises(WorkersLostError, match=f"{MAX_FAILED_STARTS} workers in a row ended while they started"):
            begin(crew, how=DIE)


def test_the_last_worker_that_dies_in_a_pause_is_replaced_at_once():
    with beginners(2) as (crew, world):
        begin(crew)
        for _ in range(6):
            begin(crew, how=DIE)
            world.now += MAX_PAUSE_S
            crew.top_up()
        begin(crew, how=DIE)
        world.actors[0].die()
        crew.wait(0)
        crew.top_up()
        assert len(crew.members) >= 1


def test_many_that_end_together_are_one_failed_start():
    with beginners(8) as (crew, world):
        begin(crew)
        begin(crew, 7, DIE)
        assert len(crew.members) == 1
        assert pause_s(crew, world) == 2.0
        assert len(crew.members) == 8


def test_those_that_began_before_another_failed_make_no_pause_longer():
    with beginners(4) as (crew, world):
        begin(crew)
        begin(crew, how=DIE)
        world.now += 1.5
        begin(crew, 2, DIE)
        assert pause_s(crew, world) == 0.5


# -- in a pass


def refused(number: int) -> ConfigError:
    return ConfigError(f"no GPU on machine {number}")


@pytest.mark.parametrize("first", [1.0, 3.0])
def test_a_machine_that_cannot_be_used_does_not_end_the_run_if_another_can(first):
    world, notes = World(), list[str]()

    def start(number: int) -> Outcome:
        return (first, refused(number)) if number != 2 else (2.0, "ok")

    with simulated(world, None, start, notes=notes) as (pool, crew):
        pool.map("features", "task", plan_units(50, 1), lambda _: None)
        assert len(crew.ready) == 1
    assert [note for note in notes if "a worker ended while it started: ConfigError: no GPU on machine 1" in note]
    assert 3 <= len(world.actors) <= 8


def test_where_no_machine_can_be_used_the_run_ends_with_what_they_lack():
    world = World()
    with (
        simulated(world, None, lambda number: (float(number), refused(number)), "runtime.num_workers=4") as (pool, _),
        pytest.raises(ConfigError, match="no GPU on machine 4"),
    ):
        pool.map("features", "task", plan_units(4, 1), lambda _: None)
    assert len(world.actors) == 4


def test_a_worker_that_hangs_while_it_starts_is_replaced():
    world, notes = World(), list[str]()

    def start(number: int) -> Outcome:
        return (HANG, "ok") if number == 2 else (1.0, "ok")

    with simulated(world, lambda asked: (10.0, "ok"), start, "runtime.wait_s=100", notes=notes) as (pool, crew):
        pool.map("features", "task", plan_units(100, 1), lambda _: None)
        assert len(crew.ready) == 2
    assert len([note for note in notes if "TimeoutError: it had not started after 100 s" in note]) == 1
    assert len(world.actors) == 3


def test_a_worker_for_which_there_is_no_room_is_not_replaced():
    world, notes = World(), list[str]()
    world.resources = {"CPU": 1.0}

    def start(number: int) -> Outcome:
        return (HANG, "ok") if number == 2 else (1.0, "ok")

    with simulated(world, lambda asked: (10.0, "ok"), start, "runtime.wait_s=100", notes=notes) as (pool, _):
        pool.map("features", "task", plan_units(100, 1), lambda _: None)
    assert len(world.actors) == 2
    assert not [note for note in notes if "ended while it started" in note]


def test_a_run_goes_on_however_many_workers_end_while_they_start():
    world = World()

    def start(number: int) -> Outcome:
        return 1.0, "ok" if number == 1 else DIE

    with simulated(world, lambda asked: (1000.0, "ok"), start, "runtime.num_workers=64") as (pool, _):
        pool.map("features", "task", plan_units(200, 1), lambda _: None)
    assert len(world.actors) > 64 + 1024


def test_the_wait_for_a_worker_ends_although_each_ends_while_it_starts():
    world = World()
    with (
        simulated(world, None, lambda number: (500.0, DIE), "runtime.wait_s=600") as (pool, _),
        pytest.raises(WorkersLostError, match=r"no worker could be had for 60\d s .* The last one ended so"),
    ):
        pool.map("features", "task", plan_units(4, 1), lambda _: None)
    assert world.now < 610


def test_after_the_workers_were_let_go_the_wait_begins_anew():
    world = World()
    with simulated(world, None, lambda number: (50.0, "ok"), "runtime.wait_s=60") as (pool, crew):
        pool.wait_until_ready()
        crew.close()
        world.now += 5000
        pool.map("features", "task", plan_units(4, 1), lambda _: None)


def test_many_that_end_together_before_any_is_ready_do_not_stop_the_run():
    world = World()
    many = MAX_FAILED_STARTS + 6

    def start(number: int) -> Outcome:
        return (2.0, DIE) if number <= many else (10.0, "ok")

    with simulated(world, None, start, f"runtime.num_workers={many + 1}") as (pool, _):
        pool.map("features", "task", plan_units(4, 1), lambda _: None)
