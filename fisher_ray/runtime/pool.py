"""The loop that keeps the workers at work until a pass over units is finished."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from fisher_ray.config import Config
from fisher_ray.errors import DataError, FisherRayError, StoreError, WorkersLostError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.checkpoints import Checkpoints
from fisher_ray.runtime.crew import SILENT, Crew, Job, Member, Note, Ref
from fisher_ray.runtime.failures import raise_cause, reason
from fisher_ray.runtime.isolation import Isolation
from fisher_ray.runtime.metrics import DriverMetrics
from fisher_ray.runtime.passing import Pass
from fisher_ray.runtime.schedule import Node, Part, Schedule, Work
from fisher_ray.runtime.worker import Merge, Task

POLL_S = 1.0
"""How often the loop looks around when nothing comes back."""
LEFTOVER_S = 60.0
"""How long a worker may go on with work that another has finished before it is given up."""


@dataclass(frozen=True)
class Sum:
    """A sum over units, which lies in the object store of some machine.

    Attributes:
        given: the pass that made it, and can make it again.
    """

    given: Pass

    @property
    def refs(self) -> list[Ref]:
        """References to the arrays' slices."""
        return list(self.given.schedule.result)


class Pool:
    """Runs passes over units, and steps that are done once, on a crew of workers.

    Args:
        crew: the workers.
        config: the run's.
        note: told what a user may want to know.
        check: called often; raises if the run may not go on.
    """

    def __init__(self, crew: Crew, config: Config, note: Note, check: Callable[[], None]) -> None:
        """See the class."""
        self._crew, self._note, self._check = crew, note, check
        self._max_attempts, self._on_error = config.runtime.max_attempts, config.data.on_error
        self._metrics: DriverMetrics | None = None

    def map(
        self,
        stage: str,
        task: Task,
        units: Sequence[Unit],
        on_receipt: Callable[[Receipt], None],
        *,
        probe: Task | None = None,
        on_excluded: Callable[[dict[int, str]], None] = lambda rows: None,
        **options: Any,
    ) -> None:
        """Run ``task(workbench, unit, attempt, **options)`` for every unit; receipts come back, never arrays.

        Args:
            stage: its name.
            task: may be run twice for one unit, with the same effect.
            units: in order.
            on_receipt: hears of every unit, once.
            probe: as the task, for any rows, and without effect: finds the rows that a unit fails by.
            on_excluded: hears of such rows, where the pass goes on without them.
            options: plain values.

        Raises:
            FisherRayError: the task's own, at once.
            DataError: if a unit failed ``runtime.max_attempts`` times, naming its rows.
            WorkersLostError: if there was no worker for ``runtime.wait_s``.
        """
        schedule = Schedule(units, self._max_attempts, merge=False, isolate=probe is not None)
        self._drive(Pass(stage, schedule, task, options, on_receipt, probe=probe, on_excluded=on_excluded))

    def reduce(
        self,
        stage: str,
        task: Task,
        units: Sequence[Unit],
        on_receipt: Callable[[Receipt], None],
        *,
        merge: Merge | None = None,
        probe: Task | None = None,
        checkpoints: Checkpoints | None = None,
        on_excluded: Callable[[dict[int, str]], None] = lambda rows: None,
        num_slices: int = 1,
        **options: Any,
    ) -> Sum:
        """Run the task for every unit, and merge its arrays along a fixed tree, on the workers.

        Args:
            stage: its name.
            task: called as ``task(workbench, unit, attempt, **options)``.
            units: in order.
            on_receipt: hears of every unit, once.
            merge: called as ``merge(workbench, left, right)``; by default, arrays are added.
            probe: as in :meth:`map`.
            checkpoints: sums that are kept on storage, and taken from there.
            on_excluded: as in :meth:`map`.
            num_slices: into which a sum that is merged by adding is cut, so that no more than a slice of it is copied
                at a time.
            options: plain values.

        Returns:
            The sum, for :meth:`solo`. Raises as :meth:`map`.
        """
        if merge is not None and num_slices != 1:
            raise ValueError("only sums that are added are merged by slices")
        kept = checkpoints.found() if checkpoints is not None else []
        isolate = probe is not None
        schedule = Schedule(units, self._max_attempts, merge=True, kept=kept, isolate=isolate)
        if num_kept := len(units) - schedule.num_units:
            self._note(f"{stage}: the sums of {num_kept} of {len(units)} units are there already")
        given = Pass(stage, schedule, task, options, on_receipt, merge, probe, checkpoints, on_excluded, num_slices)
        self._drive(given)
        return Sum(given)

    def solo(
        self,
        task: Callable[..., Any],
        *inputs: Sum,
        threads: int,
        on_item: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> Any:
        """Run ``task(workbench, *inputs, **options)`` once, on one worker with ``threads`` threads.

        Args:
            task: returns one value, or yields several.
            inputs: what :meth:`reduce` returned; computed again if the machine that holds it is lost.
            threads: for its arithmetic.
            on_item: hears every item but the last; from the first again when the worker was lost.
            options: plain values.

        Returns:
            The last item. Raises as :meth:`map`.
        """
        failure: WorkersLostError
        for attempt in range(1, self._max_attempts + 1):
            member = self._crew.any_idle(self._check)
            try:
                return self._stream(member, task, [item.refs for item in inputs], threads, on_item, options)
            except ray.exceptions.ObjectLostError:
                for item in inputs:
                    self._restore(item.given)
                failure = WorkersLostError(f"{task.__name__} lost its sums {attempt} times. Run again to resume.")
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:  # died, killed for memory, its node gone
                self._crew.bury(member, error)
                failure = WorkersLostError(f"{task.__name__} lost its worker {attempt} times. {reason(error)}")
        raise failure

    def _restore(self, given: Pass) -> None:
        units = given.schedule.lost_result()
        self._note(f"{given.stage}: the whole sum was lost with its machine; {len(units)} units are computed again")
        self._drive(given)

    def wait_until_ready(self) -> None:
        """Return when a worker is there.

        Raises:
            WorkersLostError: if none was for ``runtime.wait_s``.
        """
        self._crew.any_idle(self._check)

    def num_cpus(self) -> int:
        """Return the cores of the machine that the first worker runs on."""
        place = self._crew.any_idle(self._check).place
        return place.num_cpus if place is not None else 1

    # -- the loop

    def _drive(self, given: Pass) -> None:
        self._metrics = self._metrics or DriverMetrics()
        try:
            while not given.schedule.finished:
                self._check()
                self._crew.top_up()
                if given.failure is None:
                    self._assign(given)
                elif not self._has_work() or time.monotonic() > given.failed_s + LEFTOVER_S:
                    raise given.failure
                self._metrics.show(given.stage, given.schedule.num_waiting, len(self._crew.ready))
                for member, job in self._crew.wait(POLL_S):
                    self._take_in(given, member, job)
                self._limit_leftovers(given)
                for member in self._crew.expired():
                    self._lost(given, member, TimeoutError(SILENT))
                for node, isolation in given.schedule.concluded():
                    self._judge(given, node, isolation)
        finally:
            self._limit_leftovers(given, everything=True)

    def _assign(self, given: Pass) -> None:
        """Hand out work: first to those who have none, and a second unit where enough wait for everybody."""
        ready, schedule = self._crew.ready, given.schedule
        for member in ready:
            if not member.jobs and (work := schedule.take() or self._straggler(given)) is not None:
                self._send(member, given, *work)
        for member in ready:
            if len(member.jobs) != 1 or schedule.num_waiting < len(ready):
                continue
            if member.jobs[0].until_s is not None or schedule.is_alone(member.jobs[0].work):
                continue
            if (work := schedule.take(beside=True)) is not None:
                self._send(member, given, *work)

    def _straggler(self, given: Pass) -> tuple[Work, int] | None:
        """Return a piece of work that one worker has had for long, to be done by another too."""
        now = time.monotonic()
        for member in self._crew.ready:
            for job in member.jobs:
                if now - member.jobs[0].since_s < given.slow_s(job.kind):
                    continue
                if job.until_s is None and isinstance(job.work, Node) and given.schedule.num_running(job.work) == 1:
                    self._note(f"{given.stage}: {member.place} is slow at {given.schedule.name(job.work)}; run twice")
                    return given.schedule.copy(job.work)
        return None

    def _send(self, member: Member, given: Pass, work: Work, attempt: int) -> None:
        schedule, keep, slices = given.schedule, None, given.num_slices
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
        member.jobs.append(Job(work, kind, reply, arrays, keep))

    def _take_in(self, given: Pass, member: Member, job: Job) -> None:
        """Take in what came of a job."""
        if job not in member.jobs:
            return  # its worker was buried meanwhile
        try:
            receipt: Any = ray.get(job.reply)
        except ray.exceptions.RayTaskError as error:
            member.drop(job)
            self._failed(given, member, job, error)
        except ray.exceptions.ObjectLostError as error:
            member.drop(job)
            self._input_lost(given, job, error)
        except ray.exceptions.RayError as error:  # died, killed for memory, its node gone
            self._lost(given, member, error)
        else:
            member.drop(job)
            self._done(given, job, receipt)

    def _done(self, given: Pass, job: Job, receipt: Receipt | None) -> None:
        if not given.schedule.done(job.work, job.arrays, kept=job.keep is not None):
            return
        given.took(job.kind, time.monotonic() - job.since_s)
        if job.keep is not None and isinstance(job.work, Node) and given.checkpoints is not None:
            given.checkpoints.remove(given.schedule.superseded(job.work))
        if receipt is not None:
            given.on_receipt(receipt)

    def _failed(self, given: Pass, member: Member, job: Job, error: ray.exceptions.RayTaskError) -> None:
        if not given.schedule.wants(job.work):
            given.schedule.release(job.work)
        elif isinstance(error.cause, ray.exceptions.ObjectLostError):
            self._input_lost(given, job, error)
        elif isinstance(error.cause, StoreError) and isinstance(job.work, Node) and given.schedule.is_kept(job.work):
            given.schedule.unkept(job.work)
            if given.checkpoints is not None:
                given.checkpoints.remove([job.work])
            self._note(f"{given.stage}: a kept sum cannot be read, and is computed again: {error.cause}")
        elif isinstance(error.cause, FisherRayError) and not _tells(job.work, error.cause):
            raise_cause(error)
        else:
            self._retry(given)
            given.schedule.failed(job.work, reason(error))
            if isinstance(job.work, Node):
                self._note(f"a piece of work failed on {member.place} and is tried again: {reason(error)}")

    def _input_lost(self, given: Pass, job: Job, error: BaseException) -> None:
        self._retry(given)
        if isinstance(job.work, Part) or job.work.level == 0 or given.schedule.is_kept(job.work):
            given.schedule.failed(job.work, reason(error))
        elif units := given.schedule.lost(job.work):
            self._note(f"sums of {len(units)} units were lost with their machine and are computed again")

    def _lost(self, given: Pass, member: Member, error: BaseException) -> None:
        """Take note that a worker died: of its job, or if it had two, of either, so that each is tried alone."""
        self._crew.bury(member, error)
        jobs, member.jobs = list(member.jobs), deque()
        for job in jobs:
            if job.until_s is not None:
                continue
            self._retry(given)
            if len(jobs) > 1:
                given.schedule.died_beside(job.work)
            else:
                given.schedule.died(job.work, f"on {member.place}, {reason(error)}")

    def _retry(self, given: Pass) -> None:
        if self._metrics is not None:
            self._metrics.retry(given.stage)

    def _judge(self, given: Pass, node: Node, isolation: Isolation) -> None:
        """Go on with a unit whose rows have been looked at, or end the pass with what was found."""
        name, rows = given.schedule.name(node), isolation.rows
        if isolation.hopeless:
            why = (
                f"{name} failed again and again, and so do {len(rows)} of its rows by themselves, so it is not they "
                f"that are to blame. The last time: {isolation.reason}"
            )
            given.fail(DataError(why))
        elif rows and self._on_error != "skip":
            row, why = next(iter(rows.items()))
            others = f" ({len(rows) - 1} more rows do too: {[*rows][1:]})" if len(rows) > 1 else ""
            what = f"{name}: row {row} fails by itself{others}: {why}."
            given.fail(DataError(f"{what} Correct it, or leave such rows out with data.on_error: skip.", row=row))
        else:
            if rows:
                self._note(f"{given.stage}: {name} goes on without the rows that fail by themselves: {[*rows]}")
                given.on_excluded(rows)
            for job in [job for member in self._crew.members for job in member.jobs if job.work == node]:
                self._abandon(given, job)  # it has the rows still
            given.schedule.resume(node, isolation.cleared())

    def _has_work(self) -> bool:
        return any(job.until_s is None for member in self._crew.members for job in member.jobs)

    def _limit_leftovers(self, given: Pass, *, everything: bool = False) -> None:
        """Set a limit to workers that are still at what others have finished, or at anything: a pass that is over."""
        for member in self._crew.members:
            for job in member.jobs:
                if everything or not given.schedule.wants(job.work):
                    self._abandon(given, job)

    def _abandon(self, given: Pass, job: Job) -> None:
        if job.until_s is None:
            given.schedule.release(job.work)
            job.until_s = time.monotonic() + LEFTOVER_S

    def _stream(
        self,
        member: Member,
        task: Callable[..., Any],
        inputs: Sequence[Sequence[Ref]],
        threads: int,
        on_item: Callable[[Any], None] | None,
        options: dict[str, Any],
    ) -> Any:
        call = member.handle.solo.options(num_returns="streaming")
        items = self._items(call.remote(task, threads, list(inputs), options))
        last = next(items, None)
        for item in items:
            if on_item is not None:
                on_item(last)
            last = item
        return last

    def _items(self, stream: Any) -> Iterator[Any]:
        while True:
            self._check()
            came, _ = ray.wait([stream], timeout=POLL_S)
            if not came:
                continue
            try:
                yield ray.get(next(stream))
            except StopIteration:
                return
            except ray.exceptions.RayTaskError as error:
                raise_cause(error)


def _tells(work: Work, error: FisherRayError) -> bool:
    """Whether an error is what was looked for: rows that are tried by themselves, and are wrong."""
    return isinstance(work, Part) and isinstance(error, DataError)
