"""How the starts of workers went, and when the next may be tried."""

from __future__ import annotations

import time

MAX_PAUSE_S = 60.0
"""How long at most no worker is started after one that ended while it started; 2 s at first. None with none alive."""


class Starts:
    """Counts starts that failed, those that fail together once.

    Attributes:
        era: what a worker is started in; one that fails counts if none has since it was started.
        num_failed: in a row.
    """

    def __init__(self) -> None:
        """None yet."""
        self.era = self.num_failed = 0
        self._until_s = 0.0

    @property
    def paused(self) -> bool:
        """Whether no other is to be tried yet."""
        return time.monotonic() < self._until_s

    def succeeded(self) -> None:
        """Take note of one that went well."""
        self.num_failed = 0

    def failed(self, era: int, *, pause: bool) -> None:
        """Take note of one that did not.

        Args:
            era: in which it was started.
            pause: whether the next has time.
        """
        if era != self.era:
            return
        self.era, self.num_failed = self.era + 1, self.num_failed + 1
        if pause:
            self._until_s = time.monotonic() + min(MAX_PAUSE_S, 2.0 ** min(self.num_failed, 10))
