"""One pass over units: what is to be done with each, and what came of it so far."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fisher_ray.errors import FisherRayError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.checkpoints import Checkpoints
from fisher_ray.runtime.member import Member
from fisher_ray.runtime.schedule import Schedule
from fisher_ray.runtime.tree import Node
from fisher_ray.runtime.worker import Merge, Task

STRAGGLER_S, STRAGGLING_MERGE_S = 5.0, 30.0
"""Work that takes less is never given to a second worker; merges move much, and two get in each other's way."""
STRAGGLER_RATIO = 2.0
"""How many times the median duration makes a straggler."""


@dataclass(eq=False)
class Held:
    """A unit that is taken up again, without some rows, once nobody can write them any more.

    Attributes:
        node: the unit's.
        unit: what is left of it.
        ending: workers that were given up, whose processes may still be there.
        since_s: when it was found out.
    """

    node: Node
    unit: Unit
    ending: list[Member]
    since_s: float = field(default_factory=lambda: time.monotonic())


@dataclass
class Pass:
    """One pass over units.

    Attributes:
        stage: its name, for people.
        schedule: what is left to do.
        task: called as ``task(workbench, unit, attempt, **options)``.
        options: plain values.
        on_receipt: hears of every finished unit, once: not again of one whose result was lost.
        merge: called as ``merge(workbench, left, right)``; None adds arrays.
        probe: as the task, for any rows, and without effect; None where rows cannot be looked at by themselves.
        checkpoints: which sums are kept on storage; None for none.
        on_excluded: hears of rows that fail by themselves, without which the pass goes on.
        num_slices: into which every sum is cut.
        heard: the units whose receipts have been handed on.
        held: units that wait for the end of workers.
        durations_s: of the last pieces of work, by kind.
        failure: what the pass ends with, once nothing is running.
        failed_s: since when that is known.
    """

    stage: str
    schedule: Schedule
    task: Task
    options: dict[str, Any]
    on_receipt: Callable[[Receipt], None]
    merge: Merge | None = None
    probe: Task | None = None
    checkpoints: Checkpoints | None = None
    on_excluded: Callable[[dict[int, str]], None] = lambda rows: None
    num_slices: int = 1
    heard: set[int] = field(default_factory=set)
    held: list[Held] = field(default_factory=list)
    durations_s: dict[str, deque[float]] = field(default_factory=dict)
    failure: FisherRayError | None = None
    failed_s: float = 0.0
    _slow_s: dict[str, float] = field(default_factory=dict, init=False)

    def fail(self, failure: FisherRayError) -> None:
        """Take note that the pass cannot end well; what is under way may end before."""
        self.failure, self.failed_s = failure, time.monotonic()

    def hear(self, receipt: Receipt) -> None:
        """Hand a receipt on, unless its unit's has been."""
        if receipt.unit.index not in self.heard:
            self.heard.add(receipt.unit.index)
            self.on_receipt(receipt)

    def took(self, kind: str, seconds: float) -> None:
        """Take note of how long a piece of work took."""
        self.durations_s.setdefault(kind, deque(maxlen=101)).append(seconds)
        self._slow_s.clear()

    def slow_s(self, kind: str) -> float:
        """After how many seconds a piece of work is given to a second worker too, by those of its kind, if any."""
        if kind not in self._slow_s:
            self._slow_s[kind] = self._find_slow_s(kind)
        return self._slow_s[kind]

    def _find_slow_s(self, kind: str) -> float:
        known = self.durations_s.get(kind) or [seconds for found in self.durations_s.values() for seconds in found]
        least = STRAGGLING_MERGE_S if kind == "merge" else STRAGGLER_S
        return max(least, STRAGGLER_RATIO * statistics.median(known)) if known else float("inf")
