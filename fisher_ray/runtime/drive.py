"""The loop that keeps the workers at work until a pass over units is finished."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.exceptions

from fisher_ray.errors import DataError, FisherRayError, StoreError, WorkersLostError
from fisher_ray.records import Receipt
from fisher_ray.runtime.crew import SILENT, Crew, Note
from fisher_ray.runtime.failures import raise_cause, reason
from fisher_ray.runtime.isolation import Isolation
from fisher_ray.runtime.member import Job, Member
from fisher_ray.runtime.metrics import DriverMetrics
from fisher_ray.runtime.passing import Held, Pass
from fisher_ray.runtime.schedule import Part, Work
from fisher_ray.runtime.tree import Node

POLL_S = 1.0
"""How often the loop looks around when nothing comes back."""
LEFTOVER_S = 60.0
"""How long a worker may go on with work that another has finished before it is given up."""
END_S = 60.0
"""How long Ray may take to end a worker that may write what is left out."""


class Drive:
    """Hands a pass out to the workers, and takes in what comes of it.

    Args:
        crew: the workers.
        given: the pass.
        note: told what a user may want to know.
        check: called often; raises if the run may not go on.
        metrics: of the driver.
        skip: whether a unit goes on without the rows that fail by themselves.
    """

    def __init__(
        self, crew: Crew, given: Pass, note: Note, check: Callable[[], None], metrics: DriverMetrics, *, skip: bool
    ) -> None:
        """Hand out nothing yet."""
        self._crew, self._given, self._schedule = crew, given, given.schedule
        self._note, self._check, self._metrics, self._skip = note, check, metrics, skip

    def run(self) -> None:
        """Return when nothing is left to do; raises as :meth:`Pool.map`."""
        given = self._given
        try:
            while not self._schedule.finished:
                self._check()
                self._crew.top_up()
                if given.failure is None:
                    self._assign()
                elif not self._has_work() or time.monotonic() > given.failed_s + LEFTOVER_S:
                    raise given.failure
                self._metrics.show(given.stage, self._schedule.num_waiting, len(self._crew.ready))
                for member, job in self._crew.wait(POLL_S):
                    self._take_in(member, job)
                self._limit_leftovers()
                for member in self._crew.expired():
                    self._lost(member, TimeoutError(SILENT))
                for node, isolation in self._schedule.concluded():
                    self._judge(node, isolation)
                self._resume()
        finally:
            self._limit_leftovers(everything=True)

    def _assign(self) -> None:
        """Hand out work: first to those who have none, and a second unit where enough wait for everybody."""
        ready, schedule = self._crew.ready, self._schedule
        stragglers = self._stragglers(ready)
        for member in ready:
            if not member.jobs and (work := schedule.take() or next(stragglers, None)) is not None:
                self._send(member, *work)
        for member in ready:
            if len(member.jobs) != 1 or schedule.num_waiting < len(ready):
                continue
            if member.jobs[0].until_s is not None or schedule.is_alone(member.jobs[0].work):
                continue
            if (work := schedule.take(beside=True)) is not None:
                self._send(member, *work)

    def _stragglers(self, ready: list[Member]) -> Iterator[tuple[Work, int]]:
        """Yield the pieces of work that one worker has had for long, to be done by another too."""
        now = time.monotonic()
        for member in ready:
            for job in member.jobs:
                if now - member.jobs[0].since_s < self._given.slow_s(job.kind):
                    continue
                if job.until_s is None and self._schedule.may_copy(job.work):
                    what = self._schedule.name(job.work)
                    self._note(f"{self._given.stage}: {member.place} is slow at {what}; run twice")
                    yield self._schedule.copy(job.work)

    def _send(self, member: Member, work: Work, attempt: int) -> None:
        given, schedule, keep, slices = self._given, self._schedule, None, self._given.num_slices
        if isinstance(work, Part):
            kind, call = "part", member.handle.run.options(num_returns=2)
            *arrays, reply = call.remote(given.stage, given.probe, work.unit, attempt, given.options, None, 1)
        elif schedule.is_kept(work):
            keep = given.checkpoints.url(work) if given.checkpoints is not None else None
            kind, call = "kept", member.handle.restore.options(num_returns=slices + 1)
            *arrays, reply = call.remote(keep, slices)
        else:
            keep = given.checkpoints.place(work) if given.checkpoints is not None else None
            if work.level == 0:
                kind, call = "unit", member.handle.run.options(num_returns=slices + 1)
                unit = schedule.unit(work)
                *arrays, reply = call.remote(given.stage, given.task, unit, attempt, given.options, keep, slices)
            else:
                kind, call = "merge", member.handle.merge.options(num_returns=slices + 1)
                *arrays, reply = call.remote(given.merge, *schedule.inputs(work), keep)
        member.take(Job(work, kind, reply, arrays, keep))

    def _take_in(self, member: Member, job: Job) -> None:
        """Take in what came of a job."""
        if job not in member.jobs:
            return  # its worker was buried meanwhile
        try:
            receipt: Any = ray.get(job.reply)
        except ray.exceptions.RayTaskError as error:
            member.drop(job)
            self._failed(member, job, error)
        except ray.exceptions.ObjectLostError as error:
            member.drop(job)
            self._input_lost(job, error)
        except ray.exceptions.RayError as error:  # died, killed for memory, its node gone
            self._lost(member, error)
        else:
            member.drop(job)
            self._done(job, receipt)

    def _done(self, job: Job, receipt: Receipt | None) -> None:
        if not self._schedule.done(job.work, job.arrays, kept=job.keep is not None):
            return
        self._given.took(job.kind, time.monotonic() - job.since_s)
        if job.keep is not None and isinstance(job.work, Node) and self._given.checkpoints is not None:
            self._given.checkpoints.remove(self._schedule.superseded(job.work))
        if receipt is not None:
            self._given.hear(receipt)

    def _failed(self, member: Member, job: Job, error: ray.exceptions.RayTaskError) -> None:
        if not self._schedule.wants(job.work):
            self._schedule.release(job.work)
        elif isinstance(error.cause, ray.exceptions.ObjectLostError):
            self._input_lost(job, error)
        elif isinstance(error.cause, StoreError) and job.kind == "kept" and isinstance(job.work, Node):
            self._unkept(job.work, error.cause)
        elif isinstance(error.cause, FisherRayError) and not _tells(job.work, error.cause):
            raise_cause(error)
        else:
            self._retry()
            self._schedule.failed(job.work, reason(error))
            if isinstance(job.work, Node):
                self._note(f"a piece of work failed on {member.place} and is tried again: {reason(error)}")

    def _unkept(self, node: Node, error: StoreError) -> None:
        if not self._schedule.is_kept(node):  # another could not read it either
            self._schedule.give_back(node)
            return
        self._schedule.unkept(node)
        if self._given.checkpoints is not None:
            self._given.checkpoints.remove([node])
        self._note(f"{self._given.stage}: a kept sum cannot be read, and is computed again: {error}")

    def _input_lost(self, job: Job, error: BaseException) -> None:
        self._retry()
        if isinstance(job.work, Part) or job.work.level == 0 or self._schedule.is_kept(job.work):
            self._schedule.failed(job.work, reason(error))
        elif units := self._schedule.lost(job.work):
            self._note(f"sums of {len(units)} units were lost with their machine and are computed again")

    def _lost(self, member: Member, error: BaseException) -> None:
        """Take note that a worker died: of its job, or if it had two, of either, so that each is tried alone."""
        self._crew.bury(member, error)
        jobs, member.jobs = list(member.jobs), deque()
        for job in jobs:
            if job.until_s is not None:
                continue
            self._retry()
            if len(jobs) > 1:
                self._schedule.died_beside(job.work)
            else:
                self._schedule.died(job.work, f"on {member.place}, {reason(error)}")

    def _retry(self) -> None:
        self._metrics.retry(self._given.stage)

    def _judge(self, node: Node, isolation: Isolation) -> None:
        """Go on with a unit whose rows have been looked at, or end the pass with what was found."""
        name, rows = self._schedule.name(node), isolation.rows
        if isolation.hopeless:
            why = (
                f"{name} failed again and again, and so do {len(rows)} of its rows by themselves, so it is not they "
                f"that are to blame. The last time: {isolation.reason}"
            )
            self._given.fail(DataError(why))
        elif rows and not self._skip:
            row, why = next(iter(rows.items()))
            others = f" ({len(rows) - 1} more rows do too: {[*rows][1:]})" if len(rows) > 1 else ""
            what = f"{name}: row {row} fails by itself{others}: {why}."
            self._given.fail(DataError(f"{what} Correct it, or leave such rows out with data.on_error: skip.", row=row))
        else:
            if rows:
                self._note(f"{self._given.stage}: {name} goes on without the rows that fail by themselves: {[*rows]}")
                self._given.on_excluded(rows)
            self._give_up(node, end=bool(rows))
            ending = self._crew.ending() if rows else []
            self._given.held.append(Held(node, isolation.cleared(), ending))

    def _give_up(self, node: Node, *, end: bool) -> None:
        """Wait no more for those who have a unit with all of its rows; end them if these are to be left out."""
        for member in self._crew.members:
            for job in [job for job in member.jobs if job.work == node and job.until_s is None]:
                self._abandon(job)
                if end:
                    self._end(member, f"it had rows of {self._schedule.name(node)} that are left out")

    def _end(self, member: Member, why: str) -> None:
        """End a worker; what else it has is put back as it was."""
        jobs, member.jobs = list(member.jobs), deque()
        self._crew.bury(member, TimeoutError(why))
        for job in jobs:
            if job.until_s is None:
                self._schedule.returned(job.work)

    def _resume(self) -> None:
        """Take up the units again whose rows nobody can write any more that are left out.

        Raises:
            WorkersLostError: if a worker does not end.
        """
        held, ending = self._given.held, self._crew.ending() if self._given.held else []
        for item in list(held):
            if not any(member in ending for member in item.ending):
                held.remove(item)
                self._schedule.resume(item.node, item.unit)
            elif time.monotonic() > item.since_s + END_S:
                what = self._schedule.name(item.node)
                raise WorkersLostError(f"a worker that has rows of {what} does not end. Run again to resume.")

    def _has_work(self) -> bool:
        return any(job.until_s is None for member in self._crew.members for job in member.jobs)

    def _limit_leftovers(self, *, everything: bool = False) -> None:
        """Set a limit to workers that are still at what others have finished, or at anything: a pass that is over."""
        for member in self._crew.members:
            for job in member.jobs:
                if job.until_s is None and (everything or not self._schedule.wants(job.work)):
                    self._abandon(job)

    def _abandon(self, job: Job) -> None:
        self._schedule.release(job.work)
        job.until_s = time.monotonic() + LEFTOVER_S


def _tells(work: Work, error: FisherRayError) -> bool:
    """Whether an error is what was looked for: rows that are tried by themselves, and are wrong."""
    return isinstance(work, Part) and isinstance(error, DataError)
