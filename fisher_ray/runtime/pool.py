"""Actors that come and go, and the loop that keeps them at work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import ray
import ray.exceptions

from fisher_ray.config import Config
from fisher_ray.errors import FisherRayError, WorkersLostError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.schedule import Node, Schedule
from fisher_ray.runtime.session import Session
from fisher_ray.runtime.worker import Merge, Place, Worker

Ref: TypeAlias = Any
"""A reference to an object in Ray's store."""
Note = Callable[[str], None]
POLL_S = 1.0
"""How often the loop looks around when nothing comes back."""

MAX_FAILED_STARTS = 10
"""Workers that may end while they start, one after the other and with none alive, before the run stops."""
NOTE_AFTER_S = 15.0
"""How long there may be no worker before the user is told."""


@dataclass(eq=False)
class _Member:
    """One actor: starting until its place is known, then idle or at work."""

    handle: Any
    starting: Ref
    place: Place | None = None
    node: Node | None = None
    reply: Ref = None
    arrays: Ref = None

    @property
    def waited_for(self) -> Ref:
        return self.starting if self.starting is not None else self.reply


class Pool:
    """Workers of one run. Work goes only to those that have answered; one that dies is replaced.

    Args:
        session: the connection.
        config: the run's.
        facts: what the first look at the request found.
        note: told what a user may want to know.
    """

    def __init__(self, session: Session, config: Config, facts: Any, note: Note) -> None:
        """See the class."""
        self._session, self._config, self._facts, self._note = session, config, facts, note
        self._members: list[_Member] = []
        self._target = 0
        self._last_seen_s = time.monotonic()
        self._last_death = ""
        self._failed_starts = 0
        self._waiting_noted = False

    def map(
        self,
        task: Callable[..., tuple[Receipt, None]],
        units: Sequence[Unit],
        on_receipt: Callable[[Receipt], None],
        **options: Any,
    ) -> None:
        """Run ``task(workbench, unit, attempt, **options)`` for every unit; receipts come back, never arrays.

        Raises:
            FisherRayError: the task's own, at once.
            DataError: if a unit failed ``runtime.max_attempts`` times.
            WorkersLostError: if there was no worker for ``runtime.wait_s``.
        """
        self._drive(Schedule(units, self._config.runtime.max_attempts, merge=False), task, on_receipt, options)

    def reduce(
        self,
        task: Callable[..., tuple[Receipt, Any]],
        units: Sequence[Unit],
        on_receipt: Callable[[Receipt], None],
        *,
        merge: Merge | None = None,
        **options: Any,
    ) -> Ref:
        """Run the task for every unit, and merge its arrays along a fixed tree, on the workers.

        Args:
            task: called as ``task(workbench, unit, attempt, **options)``.
            units: in order.
            on_receipt: hears of every unit.
            merge: called as ``merge(workbench, left, right)``; by default, arrays are added.
            options: plain values.

        Returns:
            A reference to the sum, for :meth:`solo`. Raises as :meth:`map`.
        """
        schedule = Schedule(units, self._config.runtime.max_attempts, merge=True)
        self._drive(schedule, task, on_receipt, options, merge)
        return schedule.result

    def solo(
        self,
        task: Callable[..., Any],
        *inputs: Ref,
        threads: int,
        on_item: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> Any:
        """Run ``task(workbench, *inputs, **options)`` once, on one worker with ``threads`` threads.

        Args:
            task: returns one value, or yields several.
            inputs: references that :meth:`reduce` returned.
            threads: for its arithmetic.
            on_item: hears every item but the last; from the first again when the worker was lost.
            options: plain values.

        Returns:
            The last item. Raises as :meth:`map`.
        """
        failure: WorkersLostError
        for attempt in range(1, self._config.runtime.max_attempts + 1):
            member = self._any_ready()
            try:
                return self._stream(member, task, inputs, threads, on_item, options)
            except ray.exceptions.ObjectLostError as error:
                raise WorkersLostError(f"{task.__name__}: a sum was lost with its machine. Run again.") from error
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:  # died, killed for memory, its node gone
                self._bury(member, error)
                failure = WorkersLostError(f"{task.__name__} lost its worker {attempt} times. {reason(error)}")
        raise failure

    def wait_until_ready(self) -> None:
        """Return when a worker is there.

        Raises:
            WorkersLostError: if none was for ``runtime.wait_s``.
        """
        if not self._target:
            where = "in this process" if self._session.embedded else "on the cluster"
            self._note(f"starting workers {where}")
        self._any_ready()

    def num_cpus(self) -> int:
        """Return the cores of the machine that the first worker runs on."""
        member = self._any_ready()
        return member.place.num_cpus if member.place else 1

    @property
    def target(self) -> int:
        """How many workers there are to be."""
        self._top_up()
        return self._target

    def close(self) -> None:
        """End the actors, so that something else can have their place; later work starts new ones."""
        for member in self._members:
            ray.kill(member.handle)
        self._members = []

    # -- members

    def _top_up(self) -> None:
        if not self._target:
            self._session.connect()
            self._target = _num_workers(self._config)
        if not self._members:
            self._last_seen_s = time.monotonic()
        while len(self._members) < self._target:
            self._members.append(self._start())

    def _start(self) -> _Member:
        runtime = self._config.runtime
        gpus = gpus_per_worker(self._config)
        resources = {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": runtime.cpus_per_worker}
        actor: Any = ray.remote(Worker)
        handle = actor.options(
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": self._session.worker_environment()},
            **resources,
        ).remote(self._config, self._facts, runtime.cpus_per_worker, gpus > 0)
        return _Member(handle, handle.ready.remote())

    def _bury(self, member: _Member, error: BaseException) -> None:
        self._members.remove(member)
        self._last_death = reason(error)
        if member.place is not None:
            self._note(f"lost the worker on {member.place}; starting another")
            return
        self._failed_starts += 1
        self._note(f"a worker ended while it started: {self._last_death}")
        if self._failed_starts >= MAX_FAILED_STARTS and not any(other.place for other in self._members):
            raise WorkersLostError(
                f"{self._failed_starts} workers in a row ended while they started. The last one: {self._last_death}. "
                "Check that fisher_ray is installed on every machine, and that there is memory, then run again."
            )

    def _any_ready(self) -> _Member:
        while True:
            self._top_up()
            for member in self._members:
                if member.place is not None:
                    return member
            self._await()

    # -- the loop

    def _drive(
        self,
        schedule: Schedule,
        task: Callable[..., Any],
        on_receipt: Callable[[Receipt], None],
        options: Any,
        merge: Merge | None = None,
    ) -> None:
        while not schedule.finished:
            self._top_up()
            for member in self._members:
                if member.place is not None and member.node is None and (work := schedule.take()) is not None:
                    self._send(member, schedule, task, *work, options, merge)
            self._await(schedule, on_receipt)

    def _send(
        self,
        member: _Member,
        schedule: Schedule,
        task: Callable[..., Any],
        node: Node,
        attempt: int,
        options: Any,
        merge: Merge | None,
    ) -> None:
        member.node = node
        if node.level == 0:
            call = member.handle.run.options(num_returns=2)
            member.reply, member.arrays = call.remote(task, schedule.unit(node), attempt, options)
        else:
            call = member.handle.merge.options(num_returns=2)
            member.reply, member.arrays = call.remote(merge, *schedule.inputs(node))

    def _await(self, schedule: Schedule | None = None, on_receipt: Callable[[Receipt], None] | None = None) -> None:
        """Wait until something comes back, and take it in; without a schedule nobody is at work."""
        by_ref = {member.waited_for: member for member in self._members if member.waited_for is not None}
        came, _ = ray.wait(list(by_ref), num_returns=1, timeout=POLL_S)
        for ref in came:
            member = by_ref[ref]
            if member.starting is not None:
                self._welcome(member)
            elif schedule is not None:
                self._take_in(member, schedule, on_receipt)
        self._check_alive()

    def _welcome(self, member: _Member) -> None:
        try:
            place: Any = ray.get(member.starting)
            member.place, member.starting = place, None
            self._failed_starts = 0
        except ray.exceptions.RayTaskError as error:
            _raise_cause(error)
        except ray.exceptions.RayError as error:
            self._bury(member, error)

    def _take_in(self, member: _Member, schedule: Schedule, on_receipt: Callable[[Receipt], None] | None) -> None:
        node, reply, arrays = member.node, member.reply, member.arrays
        member.node = member.reply = member.arrays = None
        if node is None:
            return
        try:
            receipt: Any = ray.get(reply)
        except ray.exceptions.ObjectLostError as error:
            self._again(schedule, node, error)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                self._again(schedule, node, error)
            elif isinstance(error.cause, FisherRayError):
                _raise_cause(error)
            else:
                schedule.failed(node, reason(error))
                self._note(f"a piece of work failed on {member.place} and is tried again: {reason(error)}")
        except ray.exceptions.RayError as error:  # died, killed for memory, its node gone
            self._bury(member, error)
            schedule.died(node, f"on {member.place}, {reason(error)}")
        else:
            schedule.done(node, arrays)
            if receipt is not None and on_receipt is not None:
                on_receipt(receipt)

    def _again(self, schedule: Schedule, node: Node, error: BaseException) -> None:
        if node.level == 0:
            schedule.failed(node, reason(error))
            return
        units = schedule.lost(node)
        self._note(f"sums of {len(units)} units were lost with their machine and are computed again")

    def _check_alive(self) -> None:
        if any(member.place is not None for member in self._members):
            self._last_seen_s, self._waiting_noted = time.monotonic(), False
            return
        waited_s = time.monotonic() - self._last_seen_s
        if waited_s > NOTE_AFTER_S and not self._waiting_noted:
            self._waiting_noted = True
            self._note(f"waiting for workers: {wanted(self._config)}")
        if waited_s > self._config.runtime.wait_s:
            last = f" The last one ended so: {self._last_death}." if self._last_death else ""
            raise WorkersLostError(
                f"no worker could be had for {waited_s:.0f} s (runtime.wait_s); {wanted(self._config)}.{last} "
                "Free or add machines, or ask for less under 'runtime', then run again to resume."
            )

    def _stream(
        self,
        member: _Member,
        task: Callable[..., Any],
        inputs: Sequence[Ref],
        threads: int,
        on_item: Callable[[Any], None] | None,
        options: dict[str, Any],
    ) -> Any:
        call = member.handle.solo.options(num_returns="streaming")
        items = _items(call.remote(task, threads, list(inputs), options))
        last = next(items, None)
        for item in items:
            if on_item is not None:
                on_item(last)
            last = item
        return last


def _items(stream: Iterator[Ref]) -> Iterator[Any]:
    for ref in stream:
        try:
            yield ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            _raise_cause(error)


def _raise_cause(error: ray.exceptions.RayTaskError) -> NoReturn:
    """Raise what the worker raised, without Ray's wrapping; its traceback stays as the cause."""
    if isinstance(error.cause, Exception) and not isinstance(error.cause, ray.exceptions.RayError):
        raise error.cause from error
    raise error


def reason(error: BaseException) -> str:
    """Return an error's kind and first line, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1] if isinstance(cause, ray.exceptions.RayError) else lines[0]}"


def gpus_per_worker(config: Config) -> float:
    """Return the GPUs of one worker: as configured, or one where the cluster has any."""
    asked = config.runtime.gpus_per_worker
    if asked != "auto":
        return float(asked)
    return 1.0 if _resources().get("GPU", 0) >= 1 else 0.0


def _num_workers(config: Config) -> int:
    asked = config.runtime.num_workers
    if asked != "auto":
        return int(asked)
    resources, gpus = _resources(), gpus_per_worker(config)
    fitting = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 0) / config.runtime.cpus_per_worker
    return max(1, math.floor(fitting))


def wanted(config: Config) -> str:
    """Say what each worker needs, and what the cluster has."""
    gpus = gpus_per_worker(config)
    each = f"{gpus:g} GPU" if gpus else f"{config.runtime.cpus_per_worker} CPU"
    has = ", ".join(f"{_resources().get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    return f"each needs {each}, the cluster has {has}"


def _resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
