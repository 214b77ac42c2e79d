"""Mistakes in the driver, to see that they are found: each is what a slip in the real code would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import ray.exceptions

from fisher_ray.errors import DataError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime import drive
from fisher_ray.runtime.crew import Crew
from fisher_ray.runtime.drive import Drive
from fisher_ray.runtime.isolation import Isolation
from fisher_ray.runtime.passing import Pass
from fisher_ray.runtime.schedule import Schedule
from fisher_ray.runtime.tree import Node
from tests.simulation.invariants import BOUNDED, ENDS, EXCLUDED, ROWS, TREE, WRITTEN

_inputs, _unit, _take, _done = Schedule.inputs, Schedule.unit, Schedule.take, Schedule.done
_suspect, _drive_done = Isolation.__init__, Drive._done


def _left_twice(self: Schedule, node: Node) -> tuple[Any, Any]:
    left, right = _inputs(self, node)
    return (left, left) if self._attempts[node] > 1 else (left, right)


def _without_first_row(self: Schedule, node: Node) -> Unit:
    unit = _unit(self, node)
    return replace(unit, start=unit.start + 1) if self._attempts[node] > 1 and len(unit) > 1 else unit


def _as_they_came(self: Schedule, node: Node) -> tuple[Any, Any]:
    first, second = (self._results[child] for child in self._results if child in self._tree.children(node))
    return first, second


def _hear_always(self: Pass, receipt: Receipt) -> None:
    self.on_receipt(receipt)


def _give_back_nothing(self: Schedule, node: Node) -> None:
    return None


def _assign_all(self: Drive) -> None:
    for member in self._crew.ready:
        while (work := self._schedule.take()) is not None:
            self._send(member, *work)


def _units_first(self: Schedule, *, beside: bool = False) -> Any:
    if self._queue and not (beside and self.is_alone(self._queue.first)):
        return self.copy(self._queue.take())
    return _take(self, beside=beside)


def _keep_all(self: Schedule, work: Any, result: Any, *, kept: bool = False) -> bool:
    before = dict(self._results)
    first = _done(self, work, result, kept=kept)
    self._results |= {node: found for node, found in before.items() if node not in self._results}
    return first


def _fetch(self: Drive, job: Any, receipt: Receipt | None) -> None:
    with suppress(ray.exceptions.RayError):
        drive.ray.get(job.arrays)
    _drive_done(self, job, receipt)


def _blame_at_once(self: Isolation, unit: Unit, reason: str, max_attempts: int) -> None:
    _suspect(self, unit, reason, 1)


def _blame_all(self: Isolation, part: Unit, reason: str) -> None:
    self.passed(part)
    self.rows |= dict.fromkeys(range(part.start, part.stop), reason)


def _give_up_at_once(self: Schedule, work: Any, reason: str) -> None:
    raise DataError(reason)


Wrong = list[tuple[Any, str, Callable[..., Any]]]

PLANTED: dict[str, tuple[str, Wrong]] = {
    "a merge that is tried again takes one input twice": (ROWS, [(Schedule, "inputs", _left_twice)]),
    "a unit that is tried again lacks a row": (ROWS, [(Schedule, "unit", _without_first_row)]),
    "sums are merged in the order in which they came": (TREE, [(Schedule, "inputs", _as_they_came)]),
    "a unit is heard of whenever it is done": (WRITTEN, [(Pass, "hear", _hear_always)]),
    "rows are left out while others may write them": (
        WRITTEN,
        [(Crew, "ending", lambda self: []), (Drive, "_end", lambda self, member, why: None)],
    ),
    "nobody looks whether workers answer": (
        ENDS,
        [(Crew, "expired", lambda self: []), (Drive, "_stragglers", lambda self, ready: iter([]))],
    ),
    "work of dead workers is forgotten": (ENDS, [(Schedule, "_put_back", _give_back_nothing)]),
    "the first failure ends the run": (ENDS, [(Schedule, "failed", _give_up_at_once)]),
    "a worker is given all there is": (BOUNDED, [(Drive, "_assign", _assign_all)]),
    "units come before merges": (BOUNDED, [(Schedule, "take", _units_first)]),
    "sums are kept that are part of others": (BOUNDED, [(Schedule, "done", _keep_all)]),
    "the driver fetches sums": (BOUNDED, [(Drive, "_done", _fetch)]),
    "a row is blamed for one failure": (EXCLUDED, [(Isolation, "__init__", _blame_at_once)]),
    "all rows of a part are blamed": (EXCLUDED, [(Isolation, "failed", _blame_all)]),
}
"""By what it is: the invariant that it breaks, and what is put in the place of what."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Have a mistake in the driver."""
    with ExitStack() as patched:
        for kind, attribute, wrong in PLANTED[name][1]:
            patched.enter_context(mock.patch.object(kind, attribute, wrong))
        yield
