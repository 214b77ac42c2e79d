"""The actor: keeps a workbench between units, and runs what the driver names."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fisher_ray.config import Config
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.metrics import WorkerMetrics

Arrays = dict[str, Any]
Task = Callable[..., tuple[Receipt, Arrays | None]]
Merge = Callable[[Any, Arrays, Arrays], Arrays]

IN_FLIGHT = 2
"""Units that a worker has at a time: one is read, or written, while the other is computed."""


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Attributes:
        host: name of the machine.
        pid: process id there.
        device: ``cpu``, or the GPU's name.
        num_cpus: cores that the process may use.
    """

    host: str
    pid: int
    device: str
    num_cpus: int

    def __str__(self) -> str:
        """Return host, process and device."""
        return f"{self.host} (pid {self.pid}, {self.device})"


class Worker:
    """Runs pieces of work; up to :data:`IN_FLIGHT` at a time, of which one computes.

    Args:
        config: the run's.
        facts: what the first look at the request found.
        threads: for a unit's arithmetic; fixed by the configuration, since it can change a sum's order.
        gpus: whether GPUs were given to this actor.
    """

    def __init__(self, config: Config, facts: Any, threads: int, gpus: bool) -> None:
        """See the class."""
        import torch

        from fisher_ray.stages import Workbench

        self._threads = threads
        device = "cuda" if gpus and torch.cuda.is_available() else "cpu"
        self._bench = Workbench(config, facts, device)
        name = torch.cuda.get_device_name() if device == "cuda" else device
        self._place = Place(socket.gethostname(), os.getpid(), name, len(os.sched_getaffinity(0)))
        self._metrics = WorkerMetrics(self._place.host)

    def ready(self) -> Place:
        """Say where this actor runs."""
        return self._place

    def run(
        self, stage: str, task: Task, unit: Unit, attempt: int, options: dict[str, Any], keep: str | None
    ) -> tuple[Receipt, Arrays | None]:
        """Run a unit's task: its receipt for the driver, and arrays that stay in the object store.

        Args:
            stage: for the metrics.
            task: called as ``task(workbench, unit, attempt, **options)``.
            unit: the rows.
            attempt: from 1.
            options: plain values.
            keep: where the arrays are to be kept on storage too.
        """
        self._use_threads(self._threads)
        receipt, arrays = task(self._bench, unit, attempt, **options)
        _keep(arrays, keep)
        self._metrics.count(stage, receipt)
        return replace(receipt, worker=str(self._place)), arrays

    def merge(self, merge: Merge | None, left: Arrays, right: Arrays, keep: str | None) -> tuple[None, Arrays]:
        """Merge two results: as ``merge(workbench, left, right)`` does, or by adding their arrays.

        Raises:
            ValueError: if they hold different sums, of which none may be dropped.
        """
        if left.keys() != right.keys():
            raise ValueError(f"sums of {sorted(left)} do not merge with sums of {sorted(right)}")
        with self._bench.turn:
            self._use_threads(self._threads)
            if merge is not None:
                merged = merge(self._bench, left, right)
            else:
                merged = {name: value + right[name] for name, value in left.items()}
            _keep(merged, keep)
        return None, merged

    def restore(self, url: str) -> tuple[None, Arrays]:
        """Read arrays that were kept on storage.

        Raises:
            StoreError: if they are not whole.
        """
        from fisher_ray.store import load_arrays

        return None, load_arrays(url)[0]

    def solo(self, task: Callable[..., Any], threads: int, inputs: list[Any], options: dict[str, Any]) -> Iterator[Any]:
        """Run a task that is done once, with ``threads``, and yield what it yields, or its one result.

        Args:
            task: called as ``task(workbench, *inputs, **options)``.
            threads: the same on every resume of a run.
            inputs: references to arrays in the object store.
            options: plain values.
        """
        import ray

        with self._bench.turn:
            self._use_threads(threads)
            result = task(self._bench, *ray.get(inputs), **options)
            for item in result if isinstance(result, Iterator) else [result]:  # noqa: UP028 - Ray sends values in
                yield item

    def _use_threads(self, threads: int) -> None:
        """Set the arithmetic's threads for this thread of the actor, and those it starts."""
        import torch

        torch.set_num_threads(threads)


def _keep(arrays: Arrays | None, url: str | None) -> None:
    if url is not None and arrays is not None:
        from fisher_ray.store import save_arrays

        save_arrays(url, arrays, {"kind": "sum"})
