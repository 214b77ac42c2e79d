"""Counts for Ray's dashboard and its Prometheus endpoint; Ray puts ``ray_`` before the names."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from fisher_ray.records import Receipt

PARTS = ("read", "compute", "write")
"""What a unit's seconds are told apart by."""


class WorkerMetrics:
    """What one worker has done.

    Args:
        host: name of its machine.
    """

    def __init__(self, host: str) -> None:
        """See the class."""
        tags = ("stage", "host")
        self._host = host
        self._samples = Counter("fisher_ray_samples", "Samples that were computed.", tags)
        self._units = Counter("fisher_ray_units", "Units that were computed.", tags)
        self._bytes = Counter("fisher_ray_written_bytes", "Bytes that were written.", tags)
        self._seconds = Counter("fisher_ray_seconds", "Seconds in reading, computing, writing.", (*tags, "part"))

    def count(self, stage: str, receipt: Receipt) -> None:
        """Count a unit of ``stage``."""
        tags = {"stage": stage, "host": self._host}
        for counter, value in (
            (self._samples, len(receipt.unit)),
            (self._units, 1),
            (self._bytes, receipt.num_bytes),
        ):
            if value:
                counter.inc(value, tags)
        for part, seconds in receipt.seconds.items():
            if seconds > 0:
                self._seconds.inc(seconds, {**tags, "part": part})


class DriverMetrics:
    """How a run goes on."""

    def __init__(self) -> None:
        """See the class."""
        self._waiting = Gauge(
            "fisher_ray_waiting_units", "Pieces of work that may start and have no worker.", ("stage",)
        )
        self._workers = Gauge("fisher_ray_workers", "Workers that are there.")
        self._retries = Counter("fisher_ray_retries", "Pieces of work that are done again.", ("stage",))

    def show(self, stage: str, num_waiting: int, num_workers: int) -> None:
        """Show how much of ``stage`` waits, and for whom."""
        self._waiting.set(num_waiting, {"stage": stage})
        self._workers.set(num_workers)

    def retry(self, stage: str) -> None:
        """Count a piece of work of ``stage`` that is done again."""
        self._retries.inc(1, {"stage": stage})
