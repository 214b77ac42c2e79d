"""The workers of one run: started as there is room for them, let go when they die, never waited for in vain."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ray
import ray.exceptions

from fisher_ray.config import Config
from fisher_ray.errors import WorkersLostError
from fisher_ray.runtime.failures import raise_cause, reason
from fisher_ray.runtime.resources import actor_options, gpus_per_worker, num_workers, wanted
from fisher_ray.runtime.schedule import Work
from fisher_ray.runtime.session import Session
from fisher_ray.runtime.worker import IN_FLIGHT, LIFE, Place, Worker

Ref: TypeAlias = Any
"""A reference to an object in Ray's store."""
Note = Callable[[str], None]

LOOK_S = 5.0
"""How often the cluster is asked whether it has grown or shrunk."""
MAX_FAILED_STARTS = 10
"""Workers that may end while they start, one after the other and with none alive, before the run stops."""
MAX_PAUSE_S = 60.0
"""How long at most no worker is started after one that ended while it started; 2 s at first. None with none alive."""
ANSWER_S = 30.0
"""How long a worker without work may take to answer."""
SILENT = "it did not answer any more"
NOTE_AFTER_S = 15.0
"""How long there may be no worker before the user is told."""


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
        until_s: when the worker is given up if it still has it: nobody waits for the result any more. None if
            somebody does.
    """

    work: Work
    kind: str
    reply: Ref
    arrays: list[Ref]
    keep: str | None = None
    since_s: float = field(default_factory=time.monotonic)
    until_s: float | None = None


@dataclass(eq=False)
class Member:
    """One actor: starting until its place is known; with its jobs in the order in which it got them.

    With two jobs, which of them it computes is not known; most likely the first. ``life`` ends when the actor does, be
    it at work or not; ``death`` is how, once that is known.
    """

    handle: Any
    starting: Ref
    life: Ref
    place: Place | None = None
    death: BaseException | None = None
    jobs: deque[Job] = field(default_factory=deque)

    def drop(self, job: Job) -> None:
        """Take a finished job off; the worker comes to the next one now."""
        first = job is self.jobs[0]
        self.jobs.remove(job)
        if first and self.jobs:
            self.jobs[0].since_s = time.monotonic()


class Crew:
    """Workers of one run.

    Args:
        session: the connection.
        config: the run's.
        facts: what the first look at the request found.
        note: told what a user may want to know.
        decide: called as ``decide(name, value)``, returns what was decided when the run first came here: whether GPUs
            compute changes a result's last bits.
    """

    def __init__(
        self, session: Session, config: Config, facts: Any, note: Note, decide: Callable[[str, Any], Any]
    ) -> None:
        """See the class."""
        self._session, self._config, self._facts, self._note, self._decide = session, config, facts, note, decide
        self._members: list[Member] = []
        self._target, self._gpus = 0, 0.0
        self._looked_s = self._last_seen_s = time.monotonic()
        self._last_death = ""
        self._failed_starts, self._pause_until_s = 0, 0.0
        self._waiting_noted = False

    @property
    def ready(self) -> list[Member]:
        """The workers that have answered, and live."""
        return [member for member in self._members if member.place is not None and member.death is None]

    @property
    def members(self) -> list[Member]:
        """All workers, those that start and those that are dead but have not been buried too."""
        return list(self._members)

    @property
    def target(self) -> int:
        """How many workers there are to be."""
        self.top_up()
        return self._target

    @property
    def gpus(self) -> float:
        """The GPUs of each worker."""
        self.top_up()
        return self._gpus

    def top_up(self) -> None:
        """Connect if need be, see how large the cluster is, and start the workers that are missing."""
        if not self._target:
            self._note(
                "starting workers in this process" if self._session.embedded else "starting workers on the cluster"
            )
            self._session.connect()
            found = gpus_per_worker(self._config)
            asked = self._config.runtime.gpus_per_worker
            self._gpus = float(self._decide("gpus_per_worker", found) if asked == "auto" else found)
            self._target = num_workers(self._config, self._gpus)
        elif time.monotonic() - self._looked_s > LOOK_S:
            self._looked_s = time.monotonic()
            self._follow(num_workers(self._config, self._gpus))
        if not self._members:
            self._last_seen_s = time.monotonic()
        while len(self._members) < self._target and (not self._members or time.monotonic() >= self._pause_until_s):
            self._members.append(self._start())

    def any_idle(self, check: Callable[[], None]) -> Member:
        """Return a worker without a job, as soon as there is one; ``check`` is called meanwhile.

        Raises:
            WorkersLostError: if there was none for ``runtime.wait_s``.
        """
        self.top_up()
        while True:
            check()
            for member in self.ready:
                if not member.jobs and self._answers(member):
                    return member
            self.top_up()
            self.wait(1.0)
            for member in self.expired():
                self.bury(member, TimeoutError(SILENT))

    def expired(self) -> list[Member]:
        """Return the workers that are overdue, by ``runtime.unit_timeout_s`` or with what nobody waits for."""
        now, limit_s = time.monotonic(), self._config.runtime.unit_timeout_s
        return [
            member
            for member in self._members
            if any(job.until_s is not None and now > job.until_s for job in member.jobs)
            or (limit_s is not None and member.jobs and now - member.jobs[0].since_s > limit_s)
        ]

    def wait(self, timeout_s: float) -> list[tuple[Member, Job]]:
        """Wait until a worker answers, and return the jobs that are finished and that somebody waits for.

        Raises:
            WorkersLostError: if there was no worker for ``runtime.wait_s``.
        """
        starting = {member.starting: member for member in self._members if member.starting is not None}
        at_work = {job.reply: (member, job) for member in self._members for job in member.jobs}
        lives = {member.life: member for member in self.ready}
        refs = [*starting, *at_work, *lives]
        if not refs:
            raise RuntimeError("nothing runs and nothing starts, but the work is not finished")
        came, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if len(came) == 1 and len(refs) > 1:
            came, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in came:
            if ref in starting:
                self._welcome(starting[ref])
            elif ref in lives:
                self._ended(lives[ref])
        self._check_alive()
        ended = [at_work[ref] for ref in came if ref in at_work]
        for member, job in ended:
            if job.until_s is not None:
                member.drop(job)
        for member in self.members:
            if member.death is not None and not member.jobs:
                self.bury(member, member.death)
        return [(member, job) for member, job in ended if job.until_s is None]

    def bury(self, member: Member, error: BaseException) -> None:
        """Take note that a worker is dead, or as good as."""
        if member not in self._members:
            return
        self._members.remove(member)
        ray.kill(member.handle)  # it may only be out of reach
        self._last_death = reason(error)
        if member.place is not None:
            self._last_seen_s = time.monotonic()
            self._note(f"lost the worker on {member.place}; starting another")
            return
        self._failed_starts += 1
        if self.ready:
            self._pause_until_s = time.monotonic() + min(MAX_PAUSE_S, 2.0**self._failed_starts)
        self._note(f"a worker ended while it started: {self._last_death}")
        if self._failed_starts >= MAX_FAILED_STARTS and not self.ready:
            raise WorkersLostError(
                f"{self._failed_starts} workers in a row ended while they started. The last one: {self._last_death}. "
                "Check that fisher_ray is installed on every machine, and that there is memory, then run again."
            )

    def close(self) -> None:
        """End the workers, so that something else can have their places; later work starts new ones."""
        for member in self._members:
            ray.kill(member.handle)
        self._members = []

    def _follow(self, target: int) -> None:
        """Have as many workers as there is room for now; those that are there are left alone."""
        if target > self._target:
            self._note(f"the cluster has grown: {target} workers instead of {self._target}")
        self._target = target
        for member in [member for member in self._members if member.place is None]:
            if len(self._members) <= target:
                return
            self._members.remove(member)
            ray.kill(member.handle)

    def _start(self) -> Member:
        options = actor_options(self._config, self._gpus, self._session.worker_environment())
        remote: Any = ray.remote
        handle = (
            remote(concurrency_groups={LIFE: 1})(Worker)
            .options(max_concurrency=IN_FLIGHT, **options)
            .remote(self._config, self._facts, self._config.runtime.cpus_per_worker, self._gpus > 0)
        )
        return Member(handle, handle.ready.remote(), handle.live.options(concurrency_group=LIFE).remote())

    def _welcome(self, member: Member) -> None:
        try:
            place: Any = ray.get(member.starting)
            member.place, member.starting = place, None
            self._failed_starts = 0
        except ray.exceptions.RayTaskError as error:
            if not self.ready:
                raise_cause(error)
            self.bury(member, error)
        except ray.exceptions.RayError as error:
            self.bury(member, error)

    def _answers(self, member: Member) -> bool:
        """Ask a worker that is to do a step alone whether it lives, which is not known for a while after its end."""
        ref = member.handle.ready.remote()
        came, _ = ray.wait([ref], timeout=ANSWER_S)
        try:
            ray.get(came or ref, timeout=0)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self.bury(member, error)
            return False
        return True

    def _ended(self, member: Member) -> None:
        """Take note that a worker is dead; it is buried when what has become of its work has been seen."""
        try:
            ray.get(member.life)
        except ray.exceptions.RayError as error:
            member.death = error
            self._last_seen_s = time.monotonic()

    def _check_alive(self) -> None:
        if self.ready:
            self._last_seen_s, self._waiting_noted = time.monotonic(), False
            return
        waited_s = time.monotonic() - self._last_seen_s
        if waited_s > NOTE_AFTER_S and not self._waiting_noted:
            self._waiting_noted = True
            self._note(f"waiting for workers: {wanted(self._config, self._gpus)}")
        if waited_s > self._config.runtime.wait_s:
            last = f" The last one ended so: {self._last_death}." if self._last_death else ""
            raise WorkersLostError(
                f"no worker could be had for {waited_s:.0f} s (runtime.wait_s); {wanted(self._config, self._gpus)}."
                f"{last} Free or add machines, or ask for less under 'runtime', then run again to resume."
            )
