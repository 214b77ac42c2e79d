"""The workers of one run: started as there is room for them, let go when they die, never waited for in vain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from fisher_ray.config import Config
from fisher_ray.errors import WorkersLostError
from fisher_ray.runtime.failures import raise_cause, reason
from fisher_ray.runtime.member import Job, Member
from fisher_ray.runtime.resources import (
    actor_options,
    cluster_resources,
    fitting,
    gpus_per_worker,
    num_workers,
    wanted,
)
from fisher_ray.runtime.session import Session
from fisher_ray.runtime.starts import Starts
from fisher_ray.runtime.worker import IN_FLIGHT, LIFE, Worker

Note = Callable[[str], None]

LOOK_S = 5.0
"""How often the cluster is asked whether it has grown or shrunk."""
MAX_FAILED_STARTS = 10
"""Workers that may end while they start, one after the other and with none alive, before the run stops."""
ANSWER_S = 30.0
"""How long a worker without work may take to answer."""
KILL_S = 6.0
"""How long the process of a worker may outlive it: Ray takes 5 s to kill one that is stopped."""
SILENT = "it did not answer any more"
NOTE_AFTER_S = 15.0
"""How long there may be no worker before the user is told."""


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
        self._looked_s = time.monotonic()
        self._last_seen_s: float | None = None  # when the last worker was ready, or none was wanted
        self._last_death = ""
        self._starts, self._refused = Starts(), False
        self._ending: list[Member] = []
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
            self._give_up_starts()
        if self._last_seen_s is None:
            self._last_seen_s = time.monotonic()
        while len(self._members) < self._target and self._may_start():
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
        return [member for member in self._members if member.is_overdue(now, limit_s)]

    def ending(self) -> list[Member]:
        """Return the workers that were given up, as long as their processes may still be there."""
        now = time.monotonic()
        for member in self._ending:
            if member.ended_s is None and ray.wait([member.life], timeout=0)[0]:
                member.ended_s = now
        self._ending = [m for m in self._ending if m.ended_s is None or now <= m.ended_s + KILL_S]
        return list(self._ending)

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
        if not isinstance(error, ray.exceptions.RayError):
            self._ending.append(member)
        self._last_death = reason(error)
        if member.place is not None:
            self._last_seen_s = time.monotonic()
            self._note(f"lost the worker on {member.place}; starting another")
            return
        self._starts.failed(member.era, pause=bool(self.ready))
        self._note(f"a worker ended while it started: {self._last_death}")
        num_failed = self._starts.num_failed
        if num_failed >= MAX_FAILED_STARTS and not self.ready:
            raise WorkersLostError(
                f"{num_failed} workers in a row ended while they started. The last one: {self._last_death}. "
                "Check that fisher_ray is installed on every machine, and that there is memory, then run again."
            )

    def close(self) -> None:
        """End the workers, so that something else can have their places; later work starts new ones."""
        for member in self._members:
            ray.kill(member.handle)
        self._members, self._last_seen_s = [], None

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

    def _give_up_starts(self) -> None:
        """Replace workers that hang while they start, if there is room for more than those that have started."""
        wait_s = self._config.runtime.wait_s
        hanging = [m for m in self._members if m.place is None and time.monotonic() - m.since_s > wait_s]
        if not (hanging and self.ready and fitting(self._config, self._gpus, cluster_resources()) > len(self.ready)):
            return
        for member in hanging:
            self.bury(member, TimeoutError(f"it had not started after {wait_s:.0f} s (runtime.wait_s)"))

    def _may_start(self) -> bool:
        if not self._members:
            self._refused = False
            return True
        if self._refused and not self.ready:
            return False  # first, those that start tell whether every place refuses
        return not self._starts.paused

    def _start(self) -> Member:
        options = actor_options(self._config, self._gpus, self._session.worker_environment())
        remote: Any = ray.remote
        handle = (
            remote(concurrency_groups={LIFE: 2})(Worker)
            .options(max_concurrency=IN_FLIGHT, **options)
            .remote(self._config, self._facts, self._config.runtime.cpus_per_worker, self._gpus > 0)
        )
        life = handle.live.options(concurrency_group=LIFE).remote()
        return Member(handle, handle.ready.remote(), life, self._starts.era)

    def _welcome(self, member: Member) -> None:
        try:
            place: Any = ray.get(member.starting)
            member.place, member.starting = place, None
            self._starts.succeeded()
            self._refused = False
        except ray.exceptions.RayTaskError as error:  # other machines may have what this one lacks
            self._refused = not self.ready
            self.bury(member, error)
            if not self._members:
                raise_cause(error)
        except ray.exceptions.RayError as error:
            self.bury(member, error)

    def _answers(self, member: Member) -> bool:
        """Ask a worker that is to do a step alone whether it lives, which is not known for a while after its end."""
        ref = member.handle.ready.options(concurrency_group=LIFE).remote()
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
        waited_s = 0.0 if self._last_seen_s is None else time.monotonic() - self._last_seen_s
        if waited_s > NOTE_AFTER_S and not self._waiting_noted:
            self._waiting_noted = True
            self._note(f"waiting for workers: {wanted(self._config, self._gpus)}")
        if waited_s > self._config.runtime.wait_s:
            last = f" The last one ended so: {self._last_death}." if self._last_death else ""
            raise WorkersLostError(
                f"no worker could be had for {waited_s:.0f} s (runtime.wait_s); {wanted(self._config, self._gpus)}."
                f"{last} Free or add machines, or ask for less under 'runtime', then run again to resume."
            )
