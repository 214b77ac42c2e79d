"""Progress: a live view in a terminal or a notebook, plain lines on stderr elsewhere (a job's log, a file)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fisher_ray.records import Progress, Receipt

LINE_INTERVAL_S = 5.0
"""Plain lines about units come no more often than this, the last of a stage apart."""


@dataclass
class _Stage:
    """One stage's counts: units, rows, and when it started."""

    total: int | None
    units: int = 0
    rows: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def add(self, receipt: Receipt) -> None:
        self.units += 1
        self.rows += len(receipt.unit)

    def speed(self) -> str:
        return f"{self.rows / max(time.monotonic() - self.started_s, 1e-9):,.0f} rows/s"


class LineProgress:
    """Writes one plain line at a time."""

    def __init__(self, console: Console) -> None:
        """Write to ``console``."""
        self._console = console
        self._stages: dict[str, _Stage] = {}
        self._last_line_s = time.monotonic()

    def stage_started(self, name: str, total: int | None) -> None:
        """Say that the stage starts."""
        self._stages[name] = _Stage(total)
        self.note(f"{name}: started" + (f", {total} units" if total is not None else ""))

    def unit_done(self, stage: str, receipt: Receipt) -> None:
        """Count the unit; say so now and then."""
        counts = self._stages[stage]
        counts.add(receipt)
        if counts.units == counts.total or time.monotonic() - self._last_line_s >= LINE_INTERVAL_S:
            total = "" if counts.total is None else f"/{counts.total}"
            self.note(f"{stage}: {counts.units}{total} units, {counts.rows} rows, {counts.speed()}")

    def advanced(self, stage: str, done: int, total: int, text: str) -> None:
        """Say so now and then."""
        if done == total or time.monotonic() - self._last_line_s >= LINE_INTERVAL_S:
            self.note(f"{stage}: {done}/{total} {text}")

    def note(self, text: str) -> None:
        """Write ``text`` as it is."""
        self._last_line_s = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage_done(self, name: str, seconds: float) -> None:
        """Say how long it took."""
        self.note(f"{name}: done in {seconds:.1f} s")


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
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, TextColumn("{task.fields[speed]}"), console=console) as bars:
        yield LiveProgress(bars)
