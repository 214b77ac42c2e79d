"""The actor: keeps a workbench between units, and runs what the driver names."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fisher_ray.config import Config
from fisher_ray.records import Receipt, Unit

Arrays = dict[str, Any]
Merge = Callable[[Any, Arrays, Arrays], Arrays]


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Attributes:
        host: name of the machine.
        pid: process id there.
        device: ``cpu`` or ``cuda``.
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
    """Runs one piece of work at a time.

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
        torch.set_num_threads(threads)

    def ready(self) -> Place:
        """Say where this actor runs."""
        return Place(socket.gethostname(), os.getpid(), str(self._bench.device), len(os.sched_getaffinity(0)))

    def run(
        self, task: Callable[..., tuple[Receipt, Arrays | None]], unit: Unit, attempt: int, options: dict[str, Any]
    ) -> tuple[Receipt, Arrays | None]:
        """Run a unit's task: its receipt for the driver, and arrays that stay in the object store."""
        receipt, arrays = task(self._bench, unit, attempt, **options)
        return replace(receipt, worker=str(self.ready())), arrays

    def merge(self, merge: Merge | None, left: Arrays, right: Arrays) -> tuple[None, Arrays]:
        """Merge two results: as ``merge(workbench, left, right)`` does, or by adding their arrays.

        Raises:
            ValueError: if they hold different sums, of which none may be dropped.
        """
        if left.keys() != right.keys():
            raise ValueError(f"sums of {sorted(left)} do not merge with sums of {sorted(right)}")
        if merge is not None:
            return None, merge(self._bench, left, right)
        return None, {name: value + right[name] for name, value in left.items()}

    def solo(self, task: Callable[..., Any], threads: int, inputs: list[Any], options: dict[str, Any]) -> Iterator[Any]:
        """Run a task that is done once, with ``threads``, and yield what it yields, or its one result.

        Args:
            task: called as ``task(workbench, *inputs, **options)``.
            threads: the same on every resume of a run.
            inputs: references to arrays in the object store.
            options: plain values.
        """
        import ray
        import torch

        torch.set_num_threads(threads)
        try:
            result = task(self._bench, *ray.get(inputs), **options)
            for item in result if isinstance(result, Iterator) else [result]:  # noqa: UP028 - Ray sends values in
                yield item
        finally:
            torch.set_num_threads(self._threads)
