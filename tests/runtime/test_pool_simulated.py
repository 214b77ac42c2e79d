"""Passes over units on simulated workers with a clock of their own: what takes minutes with real ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fisher_ray.data import plan_units
from fisher_ray.errors import FisherRayError, StoreError, WorkersLostError
from fisher_ray.runtime.crew import KILL_S
from fisher_ray.runtime.drive import LEFTOVER_S
from fisher_ray.runtime.tree import Node
from fisher_ray.runtime.watch import PING_S, SILENT_S
from tests.simulation.actors import DIE, HANG, STOP, Asked, Outcome
from tests.simulation.driving import let_pass, simulated
from tests.simulation.sums import Checkpoints, as_text, merged
from tests.simulation.world import World

NO = ZeroDivisionError("no")


def takes(asked: Asked, task: str, unit: int) -> bool:
    return asked.name == "run" and asked.task == task and asked.unit.index == unit


# -- copies that hold rows which are left out meanwhile


def test_a_copy_that_holds_excluded_rows_counts_no_more():
    world, excluded, heard = World(), dict[int, str](), list[Any]()

    def behave(asked: Asked) -> Outcome:
        if takes(asked, "task", 0):
            if asked.worker == 1:
                return 20.0, "ok"  # slow, but it lives through its row 1, and ends before those who leave it out
            return (0.1, NO) if 1 in asked.rows else (30.0, "ok")
        return 0.1, NO if asked.name == "run" and 1 in asked.rows else "ok"

    with simulated(world, behave, None, "runtime.num_workers=3", "runtime.max_attempts=2") as (pool, _):
        total = pool.reduce(
            "metric", "task", plan_units(16, 2), heard.append, probe="probe", on_excluded=excluded.update
        )
        assert [*excluded] == [1]
        assert total.refs[0].value.startswith("((([0]+[2, 3])+")
        assert Counter(receipt.unit.index for receipt in heard) == Counter(range(8))
        assert total.given.schedule._running == Counter()


def test_a_copy_that_ends_before_rows_are_excluded_counts_with_all_of_them():
    """Its result comes while the rows are looked at: none is excluded, and nobody hears of any."""
    world, excluded = World(), dict[int, str]()

    def behave(asked: Asked) -> Outcome:
        if takes(asked, "task", 0):
            return (8.0, "ok") if asked.worker == 1 else (0.1, NO)
        return (50.0, NO) if asked.task == "probe" else (0.1, "ok")

    with simulated(world, behave, None, "runtime.num_workers=3", "runtime.max_attempts=1") as (pool, _):
        total = pool.reduce(
            "metric", "task", plan_units(16, 2), lambda _: None, probe="probe", on_excluded=excluded.update
        )
        assert excluded == {}
        assert total.refs[0].value.startswith("((([0, 1]+[2, 3])+")


@pytest.mark.parametrize("slow_s", [30.0, 20.5, 18.0])
@pytest.mark.parametrize("linger_s", [0.0, KILL_S - 1])
def test_a_copy_that_holds_excluded_rows_writes_none_after_they_are_left_out(linger_s, slow_s):
    world, writes, times = World(linger_s=linger_s), list[str](), dict[str, float]()

    class Disk(dict[Any, Any]):
        def __setitem__(self, place: Any, value: str) -> None:
            if place == Node(0, 0):
                writes.append(value)
            super().__setitem__(place, value)

    world.storage = Disk()

    def behave(asked: Asked) -> Outcome:
        if takes(asked, "task", 0):
            if asked.worker == 1:
                return slow_s, "ok"
            if 1 not in asked.rows:
                times["again"] = world.now
        if asked.name == "run" and 1 in asked.rows:
            return 1.0, NO
        if takes(asked, "task", 1):
            return 4.9, "ok"
        return 0.1 if asked.name == "run" else 1.0, "ok"

    def excluded(rows: dict[int, str]) -> None:
        times["excluded"] = world.now

    overrides = ("runtime.num_workers=3", "runtime.max_attempts=2")
    with simulated(world, behave, None, *overrides) as (pool, crew):
        kept: Any = Checkpoints(world, 0)
        total = pool.reduce(
            "metric", "task", plan_units(16, 2), lambda _: None, probe="probe", checkpoints=kept, on_excluded=excluded
        )
        let_pass(world, crew, 100)
        assert total.refs[0].value.startswith("((([0]+[2, 3])+")
    assert writes[-1] == "[0]"
    assert times["excluded"] + KILL_S <= times["again"] <= times["excluded"] + KILL_S + 2


def test_what_else_the_worker_has_that_is_ended_is_no_failure():
    world, notes = World(), list[str]()

    def behave(asked: Asked) -> Outcome:
        if asked.name == "run" and asked.worker == 1:
            return 1000.0, "ok"
        if asked.name == "run" and 1 in asked.rows:
            return 0.1, NO
        return 5.0, "ok"

    overrides = ("runtime.num_workers=2", "runtime.max_attempts=1")
    with simulated(world, behave, None, *overrides, notes=notes) as (pool, _):
        total = pool.reduce("metric", "task", plan_units(32, 2), lambda _: None, probe="probe")
        assert total.refs[0].value == merged(["[0]", *(f"[{2 * i}, {2 * i + 1}]" for i in range(1, 16))], as_text)
        assert total.given.schedule._running == Counter()
        assert not total.given.schedule._alone


# -- slow work


def test_a_merge_that_hangs_among_long_units_is_run_twice_after_what_merges_take():
    world, notes, hung = World(), list[str](), list[float]()

    def behave(asked: Asked) -> Outcome:
        if asked.name == "merge" and not hung and world.now > 500:
            hung.append(world.now)
            return HANG, "ok"
        return (100.0 if asked.name == "run" else 0.5), "ok"

    with simulated(world, behave, None, "runtime.num_workers=4", notes=notes) as (pool, _):
        pool.reduce("metric", "task", plan_units(32, 1), lambda _: None)
    assert [note for note in notes if "is slow at merging sums" in note]
    assert not [note for note in notes if "is slow at unit" in note]


def test_long_merges_after_short_units_are_not_slow():
    notes: list[str] = []
    with simulated(World(), lambda asked: (1.0 if asked.name == "run" else 100.0, "ok"), notes=notes) as (pool, _):
        pool.reduce("metric", "task", plan_units(16, 1), lambda _: None)
    slow = [note for note in notes if "run twice" in note]
    assert len(slow) <= 1  # the first merge of all has only units to be held against


def test_a_merge_that_is_left_over_from_a_larger_pass_does_not_disturb_the_next():
    world, hung = World(), list[float]()

    def behave(asked: Asked) -> Outcome:
        if asked.name == "merge" and asked.inputs[0].value.count("+") == 3 and not hung:  # at the top, of 8 units
            hung.append(world.now)
            return HANG, "ok"
        return (1.0 if asked.name == "run" else 0.5), "ok"

    with simulated(world, behave) as (pool, crew):
        pool.reduce("basis", "task", plan_units(8, 1), lambda _: None)
        pool.map("features", "task", plan_units(1, 1), lambda _: None)
        assert [job for member in crew.members for job in member.jobs]
        let_pass(world, crew, LEFTOVER_S + 2)
        assert not [job for member in crew.members for job in member.jobs]
    assert hung


def test_a_unit_under_suspicion_is_given_to_nobody_else():
    world, kills = World(1), Counter[str]()

    def behave(asked: Asked) -> Outcome:
        if takes(asked, "task", 0) and asked.worker == 1:
            return 10000.0, "ok"
        if asked.name == "run" and 5 in asked.rows:
            kills[asked.task] += 1
            return 1.0, DIE
        return (6.0 if asked.name == "run" else 0.1), "ok"

    with simulated(world, behave, None, "runtime.num_workers=8", "runtime.max_attempts=3") as (pool, _):
        pool.map("features", "task", plan_units(1024, 128), lambda _: None, probe="probe")
    assert kills["task"] == 3
    assert kills["probe"] == 7 + 3 - 1  # 64, 32, … 2 rows, and the one row three times


@pytest.mark.parametrize("how", [HANG, STOP])
def test_a_worker_that_hangs_at_a_part_does_not_hold_the_pass_up(how):
    world, hung, notes, excluded = World(limit_s=1e4), list[int](), list[str](), dict[int, str]()

    def behave(asked: Asked) -> Outcome:
        if asked.task == "probe" and not hung:
            hung.append(asked.worker)
            return HANG, how or "ok"
        return 1.0, NO if asked.name == "run" and 5 in asked.rows else "ok"

    with simulated(world, behave, None, "runtime.num_workers=4", notes=notes) as (pool, crew):
        pool.map("features", "task", plan_units(32, 8), lambda _: None, probe="probe", on_excluded=excluded.update)
        assert [*excluded] == [5]
        assert len([note for note in notes if "is slow at rows [0, 4) of unit 0; run twice" in note]) == 1
        let_pass(world, crew, LEFTOVER_S + 2)
        assert not [member for member in crew.members if member.place is not None and member.place.pid == hung[0]]


def test_a_part_that_two_have_counts_once():
    world, parts, excluded = World(), Counter[tuple[int, int]](), dict[int, str]()

    def behave(asked: Asked) -> Outcome:
        if asked.task == "probe":
            parts[asked.unit.start, asked.unit.stop] += 1
            first = parts[asked.unit.start, asked.unit.stop] == 1
            return (40.0 if first and len(asked.rows) == 4 else 1.0), NO if 5 in asked.rows else "ok"
        return 1.0, NO if asked.name == "run" and 5 in asked.rows else "ok"

    with simulated(world, behave, None, "runtime.num_workers=4", "runtime.max_attempts=2") as (pool, _):
        pool.map("features", "task", plan_units(32, 8), lambda _: None, probe="probe", on_excluded=excluded.update)
    assert [*excluded] == [5]
    assert parts == {(0, 4): 2, (4, 8): 2, (4, 6): 1, (6, 8): 1, (4, 5): 1, (5, 6): 2}


def test_a_unit_is_not_charged_with_the_turn_of_another():
    world, notes = World(3, overtakes=True), list[str]()
    with simulated(world, lambda asked: (18.0, "ok"), None, "runtime.unit_timeout_s=30", notes=notes) as (pool, _):
        pool.map("features", "task", plan_units(40, 1), lambda _: None)
    assert not [note for note in notes if note.startswith("lost the worker")]


@pytest.mark.parametrize("units", [1, 40])
def test_a_worker_that_hangs_is_given_up_after_two_limits_at_most(units):
    world, hung, deaths = World(3, overtakes=True), list[float](), list[float]()

    def behave(asked: Asked) -> Outcome:
        if (world.now > 20 and not hung) or (units == 1 and not hung):
            hung.append(world.now)
            world.actors[asked.worker - 1].die, die = (
                lambda *_: (deaths.append(world.now), die()),
                world.actors[asked.worker - 1].die,
            )
            return HANG, "ok"
        return 18.0, "ok"

    with simulated(world, behave, None, "runtime.unit_timeout_s=30") as (pool, _):
        pool.map("features", "task", plan_units(units, 1), lambda _: None)
    assert hung[0] + 30 <= deaths[0] <= hung[0] + 30 * (1 if units == 1 else 2) + 2


def test_a_kept_sum_that_two_cannot_read_is_computed_once():
    world, asked_for, notes = World(), list[Asked](), list[str]()
    world.storage[Node(0, 0)] = "[0]"

    def behave(asked: Asked) -> Outcome:
        asked_for.append(asked)
        if asked.name == "restore":
            return (30.0, StoreError("corrupt")) if asked.worker == 1 else (27.0, StoreError("corrupt"))
        return 4.0 if takes(asked, "task", 0) else 1.0, "ok"

    with simulated(world, behave, None, "runtime.num_workers=3", notes=notes) as (pool, _):
        kept: Any = Checkpoints(world, 9)
        total = pool.reduce("metric", "task", plan_units(8, 1), lambda _: None, checkpoints=kept)
        assert total.refs[0].value == merged([f"[{row}]" for row in range(8)], as_text)
    assert len([asked for asked in asked_for if asked.name == "restore"]) == 2
    assert len([asked for asked in asked_for if takes(asked, "task", 0)]) == 1
    assert len([note for note in notes if "a kept sum cannot be read" in note]) == 1


def test_every_unit_is_heard_of_once_although_sums_are_lost():
    world, heard, lost = World(), list[int](), list[float]()

    def behave(asked: Asked) -> Outcome:
        if asked.name == "merge" and asked.inputs[0].value.count("+") == 1 and not lost:
            lost.append(world.now)
            asked.inputs[0].lost = True
        return 1.0, "ok"

    with simulated(world, behave) as (pool, _):
        total = pool.reduce("metric", "task", plan_units(4, 1), lambda receipt: heard.append(receipt.unit.index))
        assert sorted(heard) == [0, 1, 2, 3]
        total.refs[0].lost = True
        assert pool.solo(step, total, threads=1) == f"({merged(['[0]', '[1]', '[2]', '[3]'], as_text)})"
    assert lost
    assert sorted(heard) == [0, 1, 2, 3]


# -- steps that are done once


def step() -> None:
    """Stands for what a worker does once."""


def test_a_step_whose_worker_hangs_is_given_to_another():
    world, notes, begun = World(), list[str](), list[float]()

    def behave(asked: Asked) -> Outcome:
        begun.append(world.now)
        return (HANG, STOP) if len(begun) == 1 else (1.0, "ok")

    with simulated(world, behave, notes=notes) as (pool, crew):
        assert pool.solo(step, threads=1) == "()"
        assert [note for note in notes if "step: host (pid 1, cpu) does not answer any more; another worker" in note]
        assert len(crew.members) == 2
    assert SILENT_S <= begun[1] - begun[0] <= SILENT_S + PING_S + 5


def test_a_step_whose_worker_hangs_later_is_given_to_another():
    world, begun = World(), list[float]()

    def behave(asked: Asked) -> Outcome:
        begun.append(world.now)
        if len(begun) == 1:
            world.after(3600.0, world.actors[asked.worker - 1].stop)
        return 7200.0, "ok"

    with simulated(world, behave) as (pool, _):
        assert pool.solo(step, threads=1) == "()"
    assert 3600 + SILENT_S - PING_S <= begun[1] - begun[0] <= 3600 + SILENT_S + PING_S + 5


def test_a_step_may_take_hours_if_its_worker_answers():
    world = World()
    with simulated(world, lambda asked: (7200.0, "ok")) as (pool, _):
        assert pool.solo(step, threads=1) == "()"
    assert len(world.actors) == 2


def test_a_step_whose_workers_hang_again_and_again_stops_the_run():
    with (
        simulated(World(limit_s=1e4), lambda asked: (HANG, STOP)) as (pool, _),
        pytest.raises(WorkersLostError, match="step lost its worker 3 times: it has not answered for"),
    ):
        pool.solo(step, threads=1)


# -- errors


def test_an_error_of_the_programs_own_ends_a_pass_at_once():
    world = World()
    with (
        simulated(world, lambda asked: (1.0, FisherRayError("not so"))) as (pool, _),
        pytest.raises(FisherRayError, match=r"^not so$"),
    ):
        pool.map("features", "task", plan_units(4, 1), lambda _: None)
    assert world.now < 5
