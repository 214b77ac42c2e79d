"""Passes over units on real workers, whose tasks misbehave as they are told."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from fisher_ray.data import plan_units
from fisher_ray.errors import ConfigError, DataError, WorkersLostError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime import Checkpoints
from fisher_ray.storage import Storage
from tests.integration.processes import wait_for
from tests.integration.runs import worker_pid
from tests.runtime.crews import count, failing, rows, whole, workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def deadly(bench: Any, unit: Unit, attempt: int, *, folder: str, poison: list[int]) -> tuple[Receipt, Any]:
    """As :func:`rows`; but a poisonous row ends the process."""
    if set(poison) & set(range(unit.start, unit.stop)) - set(dict(unit.excluded)):
        os._exit(1)
    return rows(bench, unit, attempt, folder=folder)


def refusing(bench: Any, unit: Unit, attempt: int) -> tuple[Receipt, Any]:
    """Raises an error of the program's own."""
    raise ConfigError("not so")


def reading_then_computing(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, Any]:
    """Notes when it reads, which may be any time, and when it computes, which is its turn."""
    start = time.monotonic()
    time.sleep(0.2)
    with bench.turn:
        begin = time.monotonic()
        time.sleep(0.2)
        line = f"{start} {begin} {time.monotonic()}\n"
    Path(folder, str(unit.index)).write_text(line)
    return Receipt(unit, attempt), None


def test_every_unit_is_heard_of_once_and_sums_are_whole(tmp_path):
    heard: list[int] = []
    with workers(tmp_path / "run") as given:
        units = plan_units(50, 7)
        given.map("features", rows, units, lambda receipt: heard.append(receipt.unit.index), folder=str(tmp_path))
        total = whole(given.reduce("metric", rows, units, lambda _: None, folder=str(tmp_path)))
    assert sorted(heard) == list(range(8))
    assert total["sum"] == sum(range(50))


def test_one_unit_is_read_while_another_is_computed(tmp_path):
    with workers(tmp_path / "run", "runtime.num_workers=1") as given:
        given.map("features", reading_then_computing, plan_units(6, 1), lambda _: None, folder=str(tmp_path))
    spans = sorted(tuple(map(float, (tmp_path / str(unit)).read_text().split())) for unit in range(6))
    overlapping = [later[0] < earlier[2] for earlier, later in pairwise(spans)]
    assert sum(overlapping) >= 4
    turns = sorted((begin, end) for _, begin, end in spans)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(turns))


def test_workers_that_die_without_work_are_noticed_and_replaced(tmp_path):
    notes: list[str] = []
    with workers(tmp_path / "run", "runtime.max_attempts=1", notes=notes) as given:
        total = given.reduce("metric", rows, plan_units(4, 1), lambda _: None, folder=str(tmp_path))
        wait_for(lambda: (given._crew.wait(0.1), len(given._crew.ready) == 2)[1], 60, "both workers")
        for member in given._crew.ready:
            os.kill(member.place.pid, signal.SIGKILL)
        lost = lambda: [note for note in notes if note.startswith("lost the worker")]  # noqa: E731
        assert given.solo(count, total, threads=1) == 2
        wait_for(lambda: (given._crew.wait(0.1), len(lost()) == 2)[1], 30, "news of two deaths")


def test_a_worker_that_is_lost_after_long_work_has_its_time_to_come_back(tmp_path):
    with workers(tmp_path / "run", "runtime.num_workers=1", "runtime.wait_s=60") as given:
        given.wait_until_ready()
        given._crew._last_seen_s -= 3600  # so long did a step that is done once take
        os.kill(given._crew.ready[0].place.pid, signal.SIGKILL)
        total = given.reduce("metric", rows, plan_units(4, 1), lambda _: None, folder=str(tmp_path))
        assert whole(total)["sum"] == 6


@pytest.mark.parametrize(("task", "why"), [(deadly, "its worker died"), (failing, "ZeroDivisionError")])
def test_a_poisonous_row_is_found_and_left_out(task, why, tmp_path):
    skipped: dict[int, str] = {}
    notes: list[str] = []
    with workers(tmp_path / "run", "data.on_error=skip", "runtime.max_attempts=1", notes=notes) as given:
        units = plan_units(64, 8)
        total = whole(
            given.reduce(
                "metric", task, units, lambda receipt: skipped.update(receipt.skipped), probe=task,
                folder=str(tmp_path), poison=[37],
            )
        )  # fmt: skip
    assert total["sum"] == sum(range(64)) - 37
    assert list(skipped) == [37]
    assert why in skipped[37]
    assert [note for note in notes if "goes on without the rows that fail by themselves: [37]" in note]


def test_a_poisonous_row_is_named_after_all_the_rest_is_done(tmp_path):
    heard: list[int] = []
    with (
        workers(tmp_path / "run", "runtime.max_attempts=1") as given,
        pytest.raises(
            DataError, match=r"unit 4 with rows \[32, 40\): row 37 fails by itself: its worker died"
        ) as caught,
    ):
        given.map(
            "features", deadly, plan_units(64, 8), lambda receipt: heard.append(receipt.unit.index), probe=deadly,
            folder=str(tmp_path), poison=[37],
        )  # fmt: skip
    assert caught.value.row == 37
    assert sorted(heard) == [0, 1, 2, 3, 5, 6, 7]


def test_where_every_row_fails_no_row_is_blamed(tmp_path):
    with (
        workers(tmp_path / "run", "data.on_error=skip") as given,
        pytest.raises(DataError, match=r"it is not they that are to blame\. The last time: ZeroDivisionError"),
    ):
        given.map(
            "features", failing, plan_units(256, 256), lambda _: None, probe=failing,
            folder=str(tmp_path), poison=list(range(256)),
        )  # fmt: skip


def test_without_a_probe_a_unit_that_fails_is_named(tmp_path):
    with (
        workers(tmp_path / "run") as given,
        pytest.raises(DataError, match=r"unit 1 with rows \[4, 8\) failed 3 times; the last time: ZeroDivisionError"),
    ):
        given.map("features", failing, plan_units(8, 4), lambda _: None, folder=str(tmp_path), poison=[6])


def test_a_units_worker_that_dies_again_and_again_stops_the_run(tmp_path):
    with (
        workers(tmp_path / "run", "runtime.max_attempts=2") as given,
        pytest.raises(WorkersLostError, match=r"unit 1 .* was tried 2 times: its worker died.*[Rr]un again"),
    ):
        given.map("features", deadly, plan_units(8, 4), lambda _: None, folder=str(tmp_path), poison=[6])


def test_an_error_of_the_programs_own_comes_back_as_it_is(tmp_path):
    with workers(tmp_path / "run") as given, pytest.raises(ConfigError, match=r"^not so$"):
        given.map("features", refusing, plan_units(2, 1), lambda _: None)


def sized(bench: Any, unit: Unit, attempt: int) -> tuple[Receipt, dict[str, np.ndarray]]:
    """Arrays of 1 MB, and a small one."""
    return Receipt(unit, attempt), {"large": np.full((1000, 125), float(unit.index)), "small": np.array([1, 2])}


def largest(bench: Any, sums: dict[str, np.ndarray]) -> list[float]:
    """What a step that is done once makes of a sum."""
    return [float(sums["large"].min()), float(sums["large"].max()), *map(float, sums["small"])]


def test_a_large_sum_lies_in_slices(tmp_path):
    with workers(tmp_path / "run") as given:
        total = given.reduce("linear", sized, plan_units(5, 1), lambda _: None, num_slices=4)
        slices = ray.get(total.refs)
        assert [part["large"].shape for part in slices] == [(250, 125)] * 4
        assert given.solo(largest, total, threads=1) == [10.0, 10.0, 5.0, 10.0]


def test_only_sums_that_are_added_are_cut(tmp_path):
    with workers(tmp_path / "run") as given, pytest.raises(ValueError, match="merged by slices"):
        given.reduce("metric", sized, plan_units(2, 1), lambda _: None, merge=lambda _, left, right: left, num_slices=2)


@pytest.mark.parametrize(("damaged", "num_slices"), [(False, 1), (True, 1), (False, 3)])
def test_a_reduction_that_was_interrupted_goes_on_from_what_was_kept(damaged, num_slices, tmp_path):
    units, checkpoints = plan_units(22, 1), Checkpoints(Storage(str(tmp_path / "run")), "metric/all", 4)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    notes: list[str] = []

    pids: set[int] = set()

    def interrupt(receipt: Receipt) -> None:
        pids.add(worker_pid(receipt))
        if receipt.unit.index == 15:
            raise KeyboardInterrupt

    kept_on: dict[str, Any] = {"checkpoints": checkpoints, "num_slices": num_slices}
    with workers(tmp_path / "run", notes=notes) as given, pytest.raises(KeyboardInterrupt):
        given.reduce("metric", rows, units, interrupt, **kept_on, folder=str(first))
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60, "the workers to end")
    kept = checkpoints.found()  # now that no worker can add to them
    assert kept
    num_kept = sum(2**node.level for node in kept)
    if damaged:
        folder = Path(checkpoints.url(kept[0]))  # others may be there that are unfinished, or part of this one
        chunk = next(path for path in sorted((folder / "matrix/c").rglob("*")) if path.is_file())
        chunk.write_bytes(chunk.read_bytes()[:-1])
    with workers(tmp_path / "run", notes=notes) as given:
        total = whole(given.reduce("metric", rows, units, lambda _: None, **kept_on, folder=str(second)))
    assert total["sum"] == sum(range(22))
    assert total["matrix"].tolist() == [[22 * i, i * sum(range(22))] for i in range(1, 6)]
    assert f"metric: the sums of {num_kept} of 22 units are there already" in notes
    again = {int(path.name.split("-")[0]) for path in second.iterdir()}
    if damaged:
        assert len(again) > 22 - num_kept
        assert [note for note in notes if "a kept sum cannot be read, and is computed again" in note]
    else:
        assert len(again) == 22 - num_kept
