"""The actor: keeps a workbench between units, and runs what the driver names."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fisher_ray.config import Config
from fisher_ray.errors import ConfigError
from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime.metrics import WorkerMetrics
from fisher_ray.runtime.slices import Arrays, cut, join

Refs: TypeAlias = Sequence[Any]
"""References to the slices of one sum in Ray's store."""
Task = Callable[..., tuple[Receipt, Arrays | None]]
Merge = Callable[[Any, Arrays, Arrays], Arrays]

LIFE = "life"
"""The concurrency group of :meth:`Worker.live`, and of asking whether the actor answers: no place of a unit's."""
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

        self._threads, self._lacks_gpu = threads, gpus and not torch.cuda.is_available()
        device = "cuda" if gpus and not self._lacks_gpu else "cpu"
        if device == "cuda":
            _always_the_same()
        self._bench = Workbench(config, facts, device)
        name = torch.cuda.get_device_name() if device == "cuda" else device
        self._place = Place(socket.gethostname(), os.getpid(), name, len(os.sched_getaffinity(0)))
        self._metrics = WorkerMetrics(self._place.host)

    def ready(self) -> Place:
        """Say where this actor runs.

        Raises:
            ConfigError: if it was given GPUs that torch does not see.
        """
        if self._lacks_gpu:
            import torch

            raise ConfigError(
                f"a worker on {self._place.host} was given GPUs, but torch {torch.__version__} sees none there. "
                "Install a build of torch for that machine's GPUs, or set runtime.gpus_per_worker: 0."
            )
        return self._place

    def live(self) -> None:
        """Never return: that this call ends tells the driver that the actor has."""
        threading.Event().wait()

    def run(
        self,
        stage: str,
        task: Task,
        unit: Unit,
        attempt: int,
        options: dict[str, Any],
        keep: str | None,
        num_slices: int,
    ) -> Iterator[Arrays | Receipt | None]:
        """Run a unit's task: arrays that stay in the object store, slice by slice, and last a receipt for the driver.

        Args:
            stage: for the metrics.
            task: called as ``task(workbench, unit, attempt, **options)``.
            unit: the rows.
            attempt: from 1.
            options: plain values.
            keep: where the arrays are to be kept on storage too.
            num_slices: to cut the arrays into; 1 where there are none.
        """
        self._use_threads(self._threads)
        receipt, arrays = task(self._bench, unit, attempt, **options)
        _keep(arrays, keep)
        self._metrics.count(stage, receipt)
        yield from [None] if arrays is None else cut(arrays, num_slices)
        yield replace(receipt, worker=str(self._place))

    def merge(self, merge: Merge | None, left: Refs, right: Refs, keep: str | None) -> Iterator[Arrays | None]:
        """Merge two results: as ``merge(workbench, left, right)`` does, or slice by slice by adding their arrays.

        Raises:
            ValueError: if they hold different sums, of which none may be dropped.
        """
        import ray

        kept: list[Arrays] = []
        with self._bench.turn:
            self._use_threads(self._threads)
            for refs in zip(left, right, strict=True):
                mine, theirs = ray.get(list(refs))
                if mine.keys() != theirs.keys():
                    raise ValueError(f"sums of {sorted(mine)} do not merge with sums of {sorted(theirs)}")
                if merge is not None:
                    merged = merge(self._bench, mine, theirs)
                else:
                    merged = {name: value + theirs[name] for name, value in mine.items()}
                if keep is not None:
                    kept.append(merged)
                yield merged
                del mine, theirs, merged
            if keep is not None:
                _keep(join(kept), keep)
        yield None

    def restore(self, url: str, num_slices: int) -> Iterator[Arrays | None]:
        """Read arrays that were kept on storage.

        Raises:
            StoreError: if they are not whole.
        """
        from fisher_ray.store import load_arrays

        yield from cut(load_arrays(url)[0], num_slices)
        yield None

    def solo(
        self, task: Callable[..., Any], threads: int, inputs: list[Refs], options: dict[str, Any]
    ) -> Iterator[Any]:
        """Run a task that is done once, with ``threads``, and yield what it yields, or its one result.

        Args:
            task: called as ``task(workbench, *inputs, **options)``.
            threads: the same on every resume of a run.
            inputs: sums in the object store.
            options: plain values.
        """
        import ray

        with self._bench.turn:
            self._use_threads(threads)
            result = task(self._bench, *(join(ray.get(list(refs))) for refs in inputs), **options)
            for item in result if isinstance(result, Iterator) else [result]:  # noqa: UP028 - Ray sends values in
                yield item

    def _use_threads(self, threads: int) -> None:
        """Set the arithmetic's threads for this thread of the actor, and those it starts."""
        import torch

        torch.set_num_threads(threads)


def _always_the_same() -> None:
    """Have kernels on this process's GPU that give the same bits each time; torch warns of what has none."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it would cost a pass


def _keep(arrays: Arrays | None, url: str | None) -> None:
    if url is not None and arrays is not None:
        from fisher_ray.store import save_arrays

        save_arrays(url, arrays, {"kind": "sum"}, leftovers=True)
