"""One worker, as the driver knows it, and the work in its hands."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fisher_ray.runtime.schedule import Work
from fisher_ray.runtime.worker import Place

Ref: TypeAlias = Any
"""A reference to an object in Ray's store."""


@dataclass(eq=False)
class Job:
    """A piece of work in a worker's hands.

    Attributes:
        work: which.
        kind: ``unit``, ``merge``, ``kept`` or ``part``: durations of one kind are alike.
        reply: will be its receipt.
        arrays: will be its result, in slices.
        keep: where the result is kept on storage too.
        since_s: when the worker got it, or came to it if it had another before.
        beside: whether the worker has had another since, which may have had the turn.
        until_s: when the worker is given up if it still has it: nobody waits for the result any more. None if
            somebody does.
    """

    work: Work
    kind: str
    reply: Ref
    arrays: list[Ref]
    keep: str | None = None
    since_s: float = field(default_factory=lambda: time.monotonic())
    beside: bool = False
    until_s: float | None = None


@dataclass(eq=False)
class Member:
    """One actor: starting until its place is known; with its jobs in the order in which it got them.

    With two jobs, which of them it computes is not known; most likely the first. ``life`` ends when the actor does, be
    it at work or not; ``death`` is how, once that is known. ``era`` is that of its start; ``ended_s`` is when the end
    of one that was given up became known.
    """

    handle: Any
    starting: Ref
    life: Ref
    era: int = 0
    since_s: float = field(default_factory=lambda: time.monotonic())
    place: Place | None = None
    death: BaseException | None = None
    ended_s: float | None = None
    jobs: deque[Job] = field(default_factory=deque)

    def take(self, job: Job) -> None:
        """Put a job into the worker's hands."""
        self.jobs.append(job)
        for other in self.jobs:
            other.beside = len(self.jobs) > 1

    def drop(self, job: Job) -> None:
        """Take a finished job off; the worker comes to the next one now."""
        first = job is self.jobs[0]
        self.jobs.remove(job)
        if first and self.jobs:
            self.jobs[0].since_s, self.jobs[0].beside = time.monotonic(), False

    def is_overdue(self, now: float, limit_s: float | None) -> bool:
        """Whether its job has taken longer than ``limit_s``, or it still has one for which nobody waits.

        A job that waits for the turn is not charged with it: the other one may take as long.
        """
        if any(job.until_s is not None and now > job.until_s for job in self.jobs):
            return True
        if limit_s is None or not self.jobs:
            return False
        return now - self.jobs[0].since_s > limit_s * (2 if self.jobs[0].beside else 1)
