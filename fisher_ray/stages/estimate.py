"""How long a run would take, and in how much memory, from a rehearsal of its steps on this machine."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fisher_ray.config import Config
from fisher_ray.errors import FisherRayError, WorkersLostError
from fisher_ray.metric import plan_compression
from fisher_ray.stages import planning
from fisher_ray.stages.facts import Facts
from fisher_ray.stages.rehearsal import Asked, Found, Pace

PROBE_LOOKS = 34
"""Looks at all rows that a logistic fit takes: what the probes of half-trained networks took on CIFAR-10."""
_CHILD = "from fisher_ray.stages.rehearsal import main; main()"


def estimate_run(config: Config, facts: Facts, environment: Mapping[str, str]) -> dict[str, Any]:
    """Rehearse a run here, in processes of their own.

    As many processes rehearse the passes at the same time as workers have room here. With ``runtime.num_workers`` more
    than that, the passes' seconds are shared out over all of them.

    Args:
        config: the run's.
        facts: what the first look found.
        environment: of a worker's process.

    Returns:
        ``seconds`` by stage, of those that can be known before a run; their ``total``; ``workers`` and ``device`` they
        are for. ``worker_peak_bytes``: the most that one worker holds, Python, torch and its share of the object store
        included.

    Raises:
        FisherRayError: as the run would, of what is wrong with the rows, the network or the memory.
        WorkersLostError: if a process of the rehearsal died.
    """
    device = "cuda" if torch.cuda.is_available() and config.runtime.gpus_per_worker != 0 else "cpu"
    cores, cpus = len(os.sched_getaffinity(0)), config.runtime.cpus_per_worker
    room = torch.cuda.device_count() if device == "cuda" else max(1, cores // cpus)
    workers = room if config.runtime.num_workers == "auto" else config.runtime.num_workers
    threads = min(cores, workers * cpus)
    alone = _rehearse(config, facts, "alone", threads, device, environment, 1)[0]
    seconds = {"base": alone.paces["base"].seconds(config.base.steps)} if config.base is not None else {}
    peak = {}
    if config.linear.model != "gradnet":
        rehearsed = _rehearse(config, facts, "passes", cpus, device, environment, min(workers, room))
        seconds |= _Shares(config, facts, workers, alone, rehearsed).stages()
        seconds |= _trained_on(config, facts, seconds, alone.paces)
        linear = planning.describe_run(config, facts)["worker_memory_bytes"]["linear"]
        peak = {"worker_peak_bytes": max(found.peak_bytes for found in rehearsed) + linear}
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    total = round(sum(seconds.values()), 1)
    return {**peak, "seconds": {**rounded, "total": total, "workers": workers, "device": device}}


class _Shares:
    """The stages' seconds, from one pace a process that rehearsed the passes."""

    def __init__(self, config: Config, facts: Facts, workers: int, alone: Found, rehearsed: list[Found]) -> None:
        self._config, self._facts, self._workers = config, facts, workers
        self._alone, self._rehearsed = alone, rehearsed

    def stages(self) -> dict[str, float]:
        """Return the seconds of each stage that a Fisher run has."""
        config, facts = self._config, self._facts
        metric_rows = [len(unit) for unit in planning.metric_units(config, facts)]
        moments = plan_compression(config.compression, facts.block_shapes).with_moments
        found = {"basis": self._passes("basis", metric_rows) + self._mean_once("basis")} if moments else {}
        found["metric"] = self._passes("metric", metric_rows) + self._mean_once("metric")
        for name, split in (("train", "shallow"), ("test", "test")):
            rows = [len(unit) for unit in planning.split_units(config, facts, split)]
            found[f"features/{name}"] = self._passes("features", rows) + self._passes("write", rows)
        found["linear"] = self._linear()
        if "probe" in self._alone.paces:
            fits = len(config.linear.penalties) + 1
            look_s = self._alone.paces["probe"].seconds(facts.num_rows["shallow"])
            found["linear_probe"] = fits * PROBE_LOOKS * look_s
        return found

    def _linear(self) -> float:
        rank = min(self._config.metric.rank, planning.num_coordinates(self._config, self._facts))
        columns = planning.num_columns(self._config, self._facts, rank)
        found = self._alone.once["linear"]
        for part, share in (
            ("fit", 1 - self._config.linear.validation),
            ("validation", self._config.linear.validation),
        ):
            units = planning.linear_units(self._config, self._facts, columns, part)
            found += self._passes("read", [len(unit) for unit in units])
            found += self._passes("gram", [round(share * len(unit)) for unit in units])
        return found

    def _passes(self, name: str, unit_rows: list[int]) -> float:
        """Return what all units take, the workers beginning the next one when they have done one."""
        busy = [0.0] * self._workers
        paces = [found.paces[name] for found in self._rehearsed]
        for number, rows in enumerate(unit_rows):
            first = busy.index(min(busy))
            busy[first] += paces[number % len(paces)].seconds(rows)
        return max(busy)

    def _mean_once(self, name: str) -> float:
        return sum(found.once[name] for found in self._rehearsed) / len(self._rehearsed)


def _trained_on(config: Config, facts: Facts, seconds: dict[str, float], paces: dict[str, Pace]) -> dict[str, float]:
    if config.trained_on is None:
        return {}
    fisher = sum(seconds.get(name, 0.0) for name in ("basis", "metric", "features/train", "linear"))
    trained = fisher if config.trained_on.seconds == "auto" else config.trained_on.seconds
    return {"trained_on": trained + paces["forward"].seconds(facts.num_rows["test"])}


def _rehearse(
    config: Config,
    facts: Facts,
    part: str,
    threads: int,
    device: str,
    environment: Mapping[str, str],
    processes: int,
) -> list[Found]:
    with tempfile.TemporaryDirectory(prefix="fisher-ray-plan-") as folder, ThreadPoolExecutor(processes) as pool:
        own = [config.model_copy(update={"output": f"{folder}/{number}"}) for number in range(processes)]
        return list(pool.map(lambda one: _child(Asked(one, facts, part, threads, device), environment), own))


def _child(asked: Asked, environment: Mapping[str, str]) -> Found:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=pickle.dumps(asked),
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise WorkersLostError(f"the rehearsal of the plan's seconds ended with code {done.returncode}: {last}")
    found: Found | FisherRayError = pickle.loads(done.stdout)
    if isinstance(found, FisherRayError):
        raise found
    return found
