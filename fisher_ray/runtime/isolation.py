"""Finding the rows that a unit fails by, in halves."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

from fisher_ray.records import Unit

MAX_ROWS = 8
"""Rows of one unit that may fail by themselves before the cause is not sought in rows any more."""


class Isolation:
    """Parts of one unit that has failed: each is tried, and one that fails is cut in two, down to single rows.

    A single row is blamed when it has failed as often as a unit may, since it may be the machine that did.

    Args:
        unit: what has failed, or killed its workers, so often that its rows are under suspicion.
        reason: how it failed last.
        max_attempts: how often a single row may fail.

    Attributes:
        unit: as given.
        reason: as given.
        rows: the rows that failed by themselves, and how.
    """

    def __init__(self, unit: Unit, reason: str, max_attempts: int) -> None:
        """See the class."""
        self.unit, self.reason, self._max_attempts = unit, reason, max_attempts
        self._failures: Counter[int] = Counter()
        self.rows: dict[int, str] = {}
        self._waiting = deque(_cut(unit) or [unit])
        self._tried: set[tuple[int, int]] = set()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to try."""
        return self.hopeless or not (self._waiting or self._tried)

    @property
    def hopeless(self) -> bool:
        """Whether so many rows fail that it is not they that are to blame."""
        return len(self.rows) >= MAX_ROWS

    def take(self) -> Unit | None:
        """Return the next part to try; None if there is none just now."""
        if self.hopeless or not self._waiting:
            return None
        part = self._waiting.popleft()
        self._tried.add((part.start, part.stop))
        return part

    def tries(self, part: Unit) -> bool:
        """Whether a part is in somebody's hands who has not come back with it."""
        return (part.start, part.stop) in self._tried

    def passed(self, part: Unit) -> None:
        """Clear the rows of a part."""
        self._tried.discard((part.start, part.stop))

    def returned(self, part: Unit) -> None:
        """Put a part back that was not tried after all."""
        self._tried.discard((part.start, part.stop))
        self._waiting.appendleft(part)

    def failed(self, part: Unit, reason: str) -> None:
        """Go on with the halves of a part, or try its one row again, or blame it."""
        self._tried.discard((part.start, part.stop))
        if halves := _cut(part):
            self._waiting.extendleft(reversed(halves))
            return
        self._failures[part.start] += 1
        if self._failures[part.start] < self._max_attempts:
            self._waiting.appendleft(part)
        else:
            self.rows[part.start] = reason

    def cleared(self) -> Unit:
        """Return the unit without the rows that fail."""
        return replace(self.unit, excluded=(*self.unit.excluded, *sorted(self.rows.items())))


def _cut(part: Unit) -> list[Unit]:
    """Return a part's halves; nothing if it is one row."""
    middle = part.start + len(part) // 2
    return [] if len(part) < 2 else [replace(part, stop=middle), replace(part, start=middle)]
