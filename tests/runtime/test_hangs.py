"""Real workers that are slow, or do not answer."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fisher_ray.data import plan_units
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime import drive, passing, watch
from tests.integration.processes import alive, wait_for
from tests.runtime.crews import count, failing, rows, whole, workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def hanging_first(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, Any]:
    """As :func:`rows`; but the first unit's first attempt waits for a file."""
    while unit.start == 0 and attempt == 1 and not Path(folder, "go").exists():
        time.sleep(0.05)
    return rows(bench, unit, attempt, folder=folder)


def test_a_straggler_is_run_twice_and_its_worker_given_up_if_it_stays_away(tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "STRAGGLER_S", 1.0)
    monkeypatch.setattr(drive, "LEFTOVER_S", 1.0)
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


def stopping(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, Any]:
    """As :func:`rows`; but the first unit's first attempt stops its process, and with it whatever else that has."""
    if unit.start == 0 and attempt == 1:
        Path(folder, "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.1)
    return rows(bench, unit, attempt, folder=folder)


def test_both_units_of_a_worker_that_hangs_are_run_by_others_and_it_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "STRAGGLER_S", 1.0)
    monkeypatch.setattr(drive, "LEFTOVER_S", 2.0)
    heard: list[int] = []
    notes: list[str] = []
    with workers(tmp_path / "run", notes=notes) as given:
        units = plan_units(12, 1)
        given.map("features", stopping, units, lambda receipt: heard.append(receipt.unit.index), folder=str(tmp_path))
        assert sorted(heard) == list(range(12))
        os.kill(int((tmp_path / "stopped").read_text()), signal.SIGCONT)
        slow = [note for note in notes if "run twice" in note]
        assert len(slow) == len(set(slow)) == 2


def slowly(bench: Any, left: dict[str, Any], right: dict[str, Any], *, folder: str) -> dict[str, Any]:
    """Adds; but the first of all merges waits for a file."""
    with suppress(FileExistsError):
        Path(folder, "first").touch(exist_ok=False)
        while not Path(folder, "go").exists():
            time.sleep(0.05)
    return {name: value + right[name] for name, value in left.items()}


def test_a_merge_that_hangs_is_run_by_another_and_its_worker_free_again_when_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "STRAGGLING_MERGE_S", 1.0)
    notes: list[str] = []
    with workers(tmp_path / "run", notes=notes) as given:
        merge = partial(slowly, folder=str(tmp_path))
        total = given.reduce("metric", rows, plan_units(3, 1), lambda _: None, merge=merge, folder=str(tmp_path))
        assert whole(total)["sum"] == 3
        assert len([note for note in notes if "is slow at merging sums" in note]) == 1
        (tmp_path / "go").touch()
        crew = given._crew
        wait_for(lambda: (crew.wait(0.1), all(not member.jobs for member in crew.members))[1], 30, "the first's end")
        assert given.solo(count, total, threads=1) == 2


def endless(bench: Any, unit: Unit, attempt: int, *, folder: str, poison: list[int]) -> tuple[Receipt, Any]:
    """As :func:`rows`; but a poisonous row takes for ever."""
    while set(poison) & set(range(unit.start, unit.stop)) - set(dict(unit.excluded)):
        time.sleep(0.1)
    return rows(bench, unit, attempt, folder=folder)


def test_a_row_that_takes_for_ever_is_found_where_units_have_a_limit(tmp_path):
    asked = ["data.on_error=skip", "runtime.max_attempts=1", "runtime.unit_timeout_s=1.5"]
    excluded: dict[int, str] = {}
    with workers(tmp_path / "run", *asked) as given:
        total = whole(
            given.reduce(
                "metric", endless, plan_units(8, 4), lambda _: None, probe=endless, on_excluded=excluded.update,
                folder=str(tmp_path), poison=[6],
            )
        )  # fmt: skip
    assert total["sum"] == sum(range(8)) - 6
    assert [*excluded] == [6]
    assert "did not answer" in excluded[6]


def stopping_once(bench: Any, *, folder: str) -> int:
    """Stops its process, if it is the first."""
    if not Path(folder, "stopped").exists():
        Path(folder, "stopped").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return os.getpid()


def test_a_step_whose_worker_hangs_is_given_to_another(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "PING_S", 0.5)
    monkeypatch.setattr(watch, "SILENT_S", 2.0)
    notes: list[str] = []
    with workers(tmp_path / "run", notes=notes) as given:
        pid = given.solo(stopping_once, threads=1, folder=str(tmp_path))
    (note,) = [note for note in notes if "does not answer any more; another worker starts it anew" in note]
    assert note.startswith("stopping_once: ")
    assert f"pid {pid}," not in note


def computing(bench: Any) -> int:
    """Holds the interpreter as Python's own arithmetic does."""
    end = time.monotonic() + 4
    while time.monotonic() < end:
        sum(range(1000))
    return 1


def test_a_worker_that_computes_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "PING_S", 0.1)
    monkeypatch.setattr(watch, "SILENT_S", 1.5)
    notes: list[str] = []
    with workers(tmp_path / "run", notes=notes) as given:
        assert given.solo(computing, threads=1) == 1
    assert not [note for note in notes if "answer" in note]


def holding(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, Any]:
    """As :func:`rows`; but of the first unit with its row 1, the first attempt stays at it and all others fail.

    Without that row, it notes whether the first is there still.
    """
    holder = Path(folder, "holder")
    if unit.start == 0 and unit.stop > 1 and not unit.excluded:
        if attempt == 1:
            holder.write_text(str(os.getpid()))
            time.sleep(120)
        raise ZeroDivisionError("division by zero")
    if unit.excluded:
        Path(folder, "there" if alive(int(holder.read_text())) else "gone").touch()
    return rows(bench, unit, attempt, folder=folder)


def failing_in_part(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, Any]:
    """Fails by row 1."""
    return failing(bench, unit, attempt, folder=folder, poison=[1])


def test_a_worker_that_holds_rows_is_gone_before_its_unit_is_run_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "STRAGGLER_S", 1.0)
    excluded: dict[int, str] = {}
    with workers(tmp_path / "run", "runtime.max_attempts=1", "data.on_error=skip") as given:
        total = given.reduce(
            "metric", holding, plan_units(12, 2), lambda _: None, probe=failing_in_part,
            on_excluded=excluded.update, folder=str(tmp_path),
        )  # fmt: skip
        assert whole(total)["sum"] == sum(range(12)) - 1
    assert [*excluded] == [1]
    assert (tmp_path / "gone").exists()
    assert not (tmp_path / "there").exists()
