"""Passes over units on real workers, whose tasks misbehave as they are told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from fisher_ray.data import plan_units
from fisher_ray.errors import ConfigError, DataError, WorkersLostError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime import Checkpoints, Crew, Pool, Session, passing, pool
from fisher_ray.storage import Storage
from tests.integration.runs import digits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@contextmanager
def workers(output: Path, *overrides: str, notes: list[str] | None = None) -> Iterator[Pool]:
    config = digits(output, "runtime.num_workers=2", *overrides)
    note = (notes if notes is not None else []).append
    with closing(Session()) as session, closing(Crew(session, config, None, note, lambda _, value: value)) as crew:
        yield Pool(crew, config, note, lambda: None)


def rows(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, dict[str, np.ndarray]]:
    """The sum of the unit's rows, and a file that says that it was computed."""
    wanted = [row for row in range(unit.start, unit.stop) if row not in dict(unit.excluded)]
    Path(folder, f"{unit.start}-{unit.stop}-{attempt}-{os.getpid()}").touch()
    return Receipt(unit, attempt, skipped=dict(unit.excluded)), {"sum": np.array(float(sum(wanted)))}


def hanging_first(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, Any]:
    """As :func:`rows`; but the first unit's first attempt waits for a file."""
    while unit.start == 0 and attempt == 1 and not Path(folder, "go").exists():
        time.sleep(0.05)
    return rows(bench, unit, attempt, folder=folder)


def deadly(bench: Any, unit: Unit, attempt: int, *, folder: str, poison: list[int]) -> tuple[Receipt, Any]:
    """As :func:`rows`; but a poisonous row ends the process."""
    if set(poison) & set(range(unit.start, unit.stop)) - set(dict(unit.excluded)):
        os._exit(1)
    return rows(bench, unit, attempt, folder=folder)


def failing(bench: Any, unit: Unit, attempt: int, *, folder: str, poison: list[int]) -> tuple[Receipt, Any]:
    """As :func:`rows`; but a poisonous row is an error that names nothing."""
    if set(poison) & set(range(unit.start, unit.stop)) - set(dict(unit.excluded)):
        raise ZeroDivisionError("division by zero")
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
        total = ray.get(given.reduce("metric", rows, units, lambda _: None, folder=str(tmp_path)).ref)
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


def test_a_straggler_is_run_twice_and_its_worker_given_up_if_it_stays_away(tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "STRAGGLER_S", 1.0)
    monkeypatch.setattr(pool, "LEFTOVER_S", 1.0)
    heard: list[int] = []
    notes: list[str] = []
    with workers(tmp_path / "run", notes=notes) as given:
        units = plan_units(12, 1)
        given.map(
            "features", hanging_first, units, lambda receipt: heard.append(receipt.unit.index), folder=str(tmp_path)
        )
        assert sorted(heard) == list(range(12))
        assert [note for note in notes if "is slow at unit 0 with rows [0, 1); run twice" in note]
        while not any(note.startswith("lost the worker on") for note in notes):
            given.map("features", rows, units, lambda _: None, folder=str(tmp_path))
        (tmp_path / "go").touch()


@pytest.mark.parametrize(("task", "why"), [(deadly, "its worker died"), (failing, "ZeroDivisionError")])
def test_a_poisonous_row_is_found_and_left_out(task, why, tmp_path):
    skipped: dict[int, str] = {}
    notes: list[str] = []
    with workers(tmp_path / "run", "data.on_error=skip", "runtime.max_attempts=1", notes=notes) as given:
        units = plan_units(64, 8)
        total = ray.get(
            given.reduce(
                "metric", task, units, lambda receipt: skipped.update(receipt.skipped), probe=task,
                folder=str(tmp_path), poison=[37],
            ).ref
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


@pytest.mark.parametrize("damaged", [False, True])
def test_a_reduction_that_was_interrupted_goes_on_from_what_was_kept(damaged, tmp_path):
    units, checkpoints = plan_units(22, 1), Checkpoints(Storage(str(tmp_path / "run")), "metric/all", 4)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    notes: list[str] = []

    def interrupt(receipt: Receipt) -> None:
        if receipt.unit.index == 15:
            raise KeyboardInterrupt

    with workers(tmp_path / "run", notes=notes) as given:
        with pytest.raises(KeyboardInterrupt):
            given.reduce("metric", rows, units, interrupt, checkpoints=checkpoints, folder=str(first))
        kept = checkpoints.found()
        assert kept
        num_kept = sum(2**node.level for node in kept)
        if damaged:
            chunk = next(path for path in (tmp_path / "run/sums").rglob("c*") if path.is_file())
            chunk.write_bytes(chunk.read_bytes()[:-1])
    with workers(tmp_path / "run", notes=notes) as given:
        total = ray.get(
            given.reduce("metric", rows, units, lambda _: None, checkpoints=checkpoints, folder=str(second)).ref
        )
    assert total["sum"] == sum(range(22))
    assert f"metric: the sums of {num_kept} of 22 units are there already" in notes
    again = {int(path.name.split("-")[0]) for path in second.iterdir()}
    if damaged:
        assert len(again) > 22 - num_kept
        assert [note for note in notes if "a kept sum cannot be read, and is computed again" in note]
    else:
        assert len(again) == 22 - num_kept
