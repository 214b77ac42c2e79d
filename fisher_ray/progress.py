"""Progress: a live view in a terminal or a notebook, plain lines elsewhere (a job's log, a file), or JSON lines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fisher_ray.records import Progress, Receipt

LINE_INTERVAL_S = 30.0
"""How often a stage says how far it is, in plain or JSON lines; its beginning, its end and notes apart."""


@dataclass
class _Stage:
    """One stage's counts."""

    total: int | None
    units: int = 0
    rows: int = 0
    num_bytes: int = 0
    retries: int = 0
    workers: set[str] = field(default_factory=set)
    started_s: float = field(default_factory=time.monotonic)
    told_s: float = field(default_factory=time.monotonic)

    def add(self, receipt: Receipt) -> None:
        self.units += 1
        self.rows += len(receipt.unit)
        self.num_bytes += receipt.num_bytes
        self.retries += receipt.attempt > 1
        self.workers.add(receipt.worker)

    def is_due(self, *, last: bool) -> bool:
        """Whether it is time to say how far it is, which it then counts as said."""
        now = time.monotonic()
        if not last and now - self.told_s < LINE_INTERVAL_S:
            return False
        self.told_s = now
        return True

    def numbers(self) -> dict[str, Any]:
        """Return all that is known, in plain values."""
        spent_s = max(time.monotonic() - self.started_s, 1e-9)
        found: dict[str, Any] = {"units": self.units, "total": self.total, "rows": self.rows, "bytes": self.num_bytes}
        found |= {"rows_per_second": self.rows / spent_s, "bytes_per_second": self.num_bytes / spent_s}
        left = None if self.total is None or not self.units else spent_s / self.units * (self.total - self.units)
        return {**found, "seconds_left": left, "workers": len(self.workers), "retries": self.retries}

    def speed(self) -> str:
        """Return the same in words: what there is of it."""
        found = self.numbers()
        words = [f"{found['rows_per_second']:,.0f} rows/s"]
        words += [f"{decimal(round(found['bytes_per_second']))}/s"] if self.num_bytes else []
        words += [f"{duration(found['seconds_left'])} left"] if found["seconds_left"] else []
        words += [f"{found['workers']} workers"] if found["workers"] > 1 else []
        words += [f"{self.retries} retried"] if self.retries else []
        return ", ".join(words)


def duration(seconds: float) -> str:
    """Return a time in the unit that it is spoken of in."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class LineProgress:
    """Writes one plain line at a time."""

    def __init__(self, console: Console) -> None:
        """Write to ``console``."""
        self._console = console
        self._stages: dict[str, _Stage] = {}

    def stage_started(self, name: str, total: int | None) -> None:
        """Say that the stage starts."""
        self._stages[name] = _Stage(total)
        self.note(f"{name}: started" + (f", {total} units" if total is not None else ""))

    def unit_done(self, stage: str, receipt: Receipt) -> None:
        """Count the unit; say so now and then."""
        counts = self._stages[stage]
        counts.add(receipt)
        if counts.is_due(last=counts.units == counts.total):
            total = "" if counts.total is None else f"/{counts.total}"
            self.note(f"{stage}: {counts.units}{total} units, {counts.rows} rows, {counts.speed()}")

    def advanced(self, stage: str, done: int, total: int, text: str) -> None:
        """Say so now and then."""
        if self._stages[stage].is_due(last=done == total):
            self.note(f"{stage}: {done}/{total} {text}")

    def note(self, text: str) -> None:
        """Write ``text`` as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage_done(self, name: str, seconds: float) -> None:
        """Say how long it took."""
        self.note(f"{name}: done in {seconds:.1f} s")


class JsonProgress:
    """Writes a JSON object a line, each with its ``event`` and its ``time`` (seconds since 1970)."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.time) -> None:
        """Write to ``stream``."""
        self._stream, self._clock = stream, clock
        self._stages: dict[str, _Stage] = {}

    def tell(self, event: str, **values: Any) -> None:
        """Write one line."""
        print(json.dumps({"event": event, "time": self._clock(), **values}), file=self._stream, flush=True)

    def stage_started(self, name: str, total: int | None) -> None:
        """Tell ``stage started``: ``stage``, ``total`` units or null."""
        self._stages[name] = _Stage(total)
        self.tell("stage started", stage=name, total=total)

    def unit_done(self, stage: str, receipt: Receipt) -> None:
        """Count the unit; now and then tell ``units done``: what there is of counts, rates and time left."""
        counts = self._stages[stage]
        counts.add(receipt)
        if counts.is_due(last=counts.units == counts.total):
            self.tell("units done", stage=stage, **counts.numbers())

    def advanced(self, stage: str, done: int, total: int, text: str) -> None:
        """Tell ``advanced`` now and then: ``stage``, ``done``, ``total``, ``text``."""
        if self._stages[stage].is_due(last=done == total):
            self.tell("advanced", stage=stage, done=done, total=total, text=text)

    def note(self, text: str) -> None:
        """Tell ``note``: ``text``."""
        self.tell("note", text=text)

    def stage_done(self, name: str, seconds: float) -> None:
        """Tell ``stage done``: ``stage``, ``seconds``."""
        self.tell("stage done", stage=name, seconds=seconds)


class LiveProgress:
    """Draws a bar for each stage."""

    def __init__(self, bars: Bars) -> None:
        """Draw on ``bars``, which the caller starts and stops."""
        self._bars = bars
        self._stages: dict[str, tuple[TaskID, _Stage]] = {}

    def stage_started(self, name: str, total: int | None) -> None:
        """Add the stage's bar."""
        self._stages[name] = self._bars.add_task(name, total=total, speed=""), _Stage(total)

    def unit_done(self, stage: str, receipt: Receipt) -> None:
        """Move the bar on."""
        task, counts = self._stages[stage]
        counts.add(receipt)
        self._bars.update(task, completed=counts.units, speed=counts.speed())

    def advanced(self, stage: str, done: int, total: int, text: str) -> None:
        """Move the bar on."""
        task, counts = self._stages[stage]
        counts.units = total
        self._bars.update(task, completed=done, total=total, speed=text)

    def note(self, text: str) -> None:
        """Write ``text`` above the bars."""
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage_done(self, name: str, seconds: float) -> None:
        """Fill the bar and stop its clock."""
        task, counts = self._stages[name]
        units = counts.units or 1
        self._bars.update(task, total=units, completed=units)
        self._bars.stop_task(task)


def configure_logging(console: Console, debug: bool) -> None:
    """Log warnings to ``console``, above the live view if there is one; under ``debug`` all that this package says."""
    handler = RichHandler(console=console, show_path=False) if console.is_terminal else logging.StreamHandler()
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if debug:
        logging.getLogger("fisher_ray").setLevel(logging.DEBUG)


def new_console() -> Console:
    """Return where progress is drawn: a notebook's cell, or stderr."""
    console = Console()
    return console if console.is_jupyter else Console(stderr=True)


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Draw on ``console`` what the yielded progress hears."""
    if not (console.is_terminal or console.is_jupyter):
        yield LineProgress(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, TextColumn("{task.fields[speed]}"), console=console) as bars:
        yield LiveProgress(bars)
