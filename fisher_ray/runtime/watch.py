"""Whether a worker that is at a step of any length still lives."""

from __future__ import annotations

import time
from typing import Any

import ray

from fisher_ray.runtime.worker import LIFE

PING_S = 10.0
"""How often it is asked."""
SILENT_S = 60.0
"""How long it may take to answer: arithmetic of Python's own can hold the interpreter for long."""


class SilentError(TimeoutError):
    """A worker does not answer any more."""


class Watch:
    """Asks one worker again and again, beside its work.

    Args:
        handle: the actor's.
    """

    def __init__(self, handle: Any) -> None:
        """Ask nothing yet."""
        self._handle, self._asked, self._since_s = handle, None, time.monotonic()

    def look(self) -> None:
        """Return at once, whether it has answered yet or not.

        Raises:
            SilentError: if it has not for :data:`SILENT_S`.
            RayError: if it is dead.
        """
        now = time.monotonic()
        if self._asked is None:
            if now - self._since_s > PING_S:
                self._asked, self._since_s = self._handle.ready.options(concurrency_group=LIFE).remote(), now
        elif ray.wait([self._asked], timeout=0)[0]:
            ray.get(self._asked)
            self._asked, self._since_s = None, now
        elif now - self._since_s > SILENT_S:
            raise SilentError(f"it has not answered for {now - self._since_s:.0f} s")
