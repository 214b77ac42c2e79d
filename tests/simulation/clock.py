"""Time that passes when the driver waits, or is charged for its own work: hours in an instant."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class HangError(Exception):
    """The simulated time is up."""


class Clock:
    """What happens, in the order of its time; of one time, in the order in which it was put down.

    Args:
        limit_s: when the simulation is given up.
    """

    def __init__(self, limit_s: float = 1e6) -> None:
        self.now, self.limit_s = 0.0, limit_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def monotonic(self) -> float:
        return self.now

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def is_due(self, end: float) -> bool:
        """Whether anything happens until then."""
        return bool(self._events) and self._events[0][0] <= end

    def pass_until(self, end: float) -> None:
        """Let the next thing happen, or the time pass."""
        if self.is_due(end):
            self.now, _, act = heapq.heappop(self._events)
            act()
        else:
            self.now = end
        if self.now > self.limit_s:
            raise HangError(f"still at it after {self.now:.0f} s")

    def spend(self, seconds: float) -> None:
        """Let everything happen that happens meanwhile: the driver is busy."""
        end = self.now + seconds
        while seconds and (self.is_due(end) or self.now < end):
            self.pass_until(end)
