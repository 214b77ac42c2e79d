"""What a crew of workers is asked for: passes over units, and steps that are done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from fisher_ray.config import Config
from fisher_ray.errors import WorkersLostError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.checkpoints import Checkpoints
from fisher_ray.runtime.crew import Crew, Note
from fisher_ray.runtime.drive import POLL_S, Drive
from fisher_ray.runtime.failures import raise_cause, reason
from fisher_ray.runtime.member import Member, Ref
from fisher_ray.runtime.metrics import DriverMetrics
from fisher_ray.runtime.passing import Pass
from fisher_ray.runtime.schedule import Schedule
from fisher_ray.runtime.watch import SilentError, Watch
from fisher_ray.runtime.worker import Merge, Task


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
            except SilentError as error:
                self._note(f"{task.__name__}: {member.place} does not answer any more; another worker starts it anew")
                self._crew.bury(member, error)
                failure = WorkersLostError(f"{task.__name__} lost its worker {attempt} times: {error}")
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

    def _drive(self, given: Pass) -> None:
        self._metrics = self._metrics or DriverMetrics()
        try:
            Drive(self._crew, given, self._note, self._check, self._metrics, skip=self._on_error == "skip").run()
        finally:
            failures = [] if given.checkpoints is None else given.checkpoints.settle()
            if failures:
                self._note(f"{len(failures)} sums that are part of larger ones by now stay a while: {failures[0]}")

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
        items = self._items(call.remote(task, threads, list(inputs), options), Watch(member.handle))
        last = next(items, None)
        for item in items:
            if on_item is not None:
                on_item(last)
            last = item
        return last

    def _items(self, stream: Any, watch: Watch) -> Iterator[Any]:
        while True:
            self._check()
            came, _ = ray.wait([stream], timeout=POLL_S)
            if not came:
                watch.look()
                continue
            try:
                yield ray.get(next(stream))
            except StopIteration:
                return
            except ray.exceptions.RayTaskError as error:
                raise_cause(error)
