"""How long a run would take, and in how much memory, from a rehearsal of its steps on this machine."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
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
_CHILD = "import sys; from fisher_ray.stages.rehearsal import main; main(sys.argv[1])"


def estimate_run(config: Config, facts: Facts, environment: Mapping[str, str]) -> dict[str, Any]:
    """Rehearse a run here, in processes of their own.

    As many processes rehearse the passes at the same time as workers have room here. With ``runtime.num_workers`` more
    than that, the passes' seconds are shared out over all of them.

    Args:
        config: the run's.
        facts: what the first look found.
        environment: of a worker's process.

    Returns:
        ``seconds`` by stage, and their ``total``; ``workers`` and ``device`` they are for; ``not_estimated``: stages
        that the run has and the total lacks. ``worker_peak_bytes``: the most that one worker holds, Python, torch and
        its share of the object store included.

    Raises:
        FisherRayError: as the run would, of what is wrong with the rows, the network or the memory.
        WorkersLostError: if a process of the rehearsal was killed.
        RuntimeError: if one ended by an error that a run would not foresee either; its traceback is in the notes.
    """
    places = worker_places(config)
    workers = len(places) if config.runtime.num_workers == "auto" else config.runtime.num_workers
    cores = len(os.sched_getaffinity(0))  # what is done once has all of the machine that it is done on
    alone = _rehearse(config, facts, "alone", cores, places[:1], environment)[0]
    seconds = {"base": alone.paces["base"].seconds(config.base.steps)} if config.base is not None else {}
    peak = {}
    if config.linear.model != "gradnet":
        cpus = config.runtime.cpus_per_worker
        rehearsed = _rehearse(config, facts, "passes", cpus, places[:workers], environment)
        seconds |= _Shares(config, facts, workers, alone, rehearsed).stages()
        seconds |= _trained_on(config, facts, seconds, alone.paces)
        arrays = planning.describe_run(config, facts)["worker_memory_bytes"]
        most = max(arrays["features"], arrays["linear"])  # which a rehearsal has a part of, or none
        peak = {"worker_peak_bytes": max(found.peak_bytes for found in rehearsed) + most}
    told = {name: round(value, 1) for name, value in seconds.items()}
    told |= {"total": round(sum(seconds.values()), 1)}
    device = "cpu" if places[0] is None else "cuda"
    missing = [name for name in _stages(config, facts) if name not in seconds]
    return {**peak, "seconds": {**told, "workers": workers, "device": device, "not_estimated": missing}}


def worker_places(config: Config) -> list[int | None]:
    """Return for each worker that there is room for on this machine its GPU, or None for the CPU; one at least."""
    asked = config.runtime.gpus_per_worker
    share = 1.0 if asked == "auto" else float(asked)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() and share > 0 else 0
    if num_gpus >= share > 0:
        return [int(number * share + 1e-9) for number in range(int(num_gpus / share + 1e-9))]
    return [None] * max(1, len(os.sched_getaffinity(0)) // config.runtime.cpus_per_worker)


def _stages(config: Config, facts: Facts) -> list[str]:
    """Return the stages that a run has, but for the report."""
    found = ["base"] if config.base is not None else []
    if config.linear.model != "gradnet":
        found += ["metric", "features/train", "features/test", "linear"]
        found += ["linear_probe"] if facts.hidden is not None else []
    found += ["gradnet"] if config.gradnet is not None or config.linear.model == "gradnet" else []
    if config.trained_on is not None:
        found += ["trained_on"] + (["converged"] if config.trained_on.convergence is not None else [])
    return found


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
        if "linear" in self._alone.once:
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
    if config.trained_on is None or (config.trained_on.seconds == "auto" and "linear" not in seconds):
        return {}
    fisher = sum(seconds.get(name, 0.0) for name in ("basis", "metric", "features/train", "linear"))
    trained = fisher if config.trained_on.seconds == "auto" else config.trained_on.seconds
    return {"trained_on": trained + paces["forward"].seconds(facts.num_rows["test"])}


def _rehearse(
    config: Config,
    facts: Facts,
    part: str,
    threads: int,
    places: Sequence[int | None],
    environment: Mapping[str, str],
) -> list[Found]:
    """Rehearse a part in one process a place, all at once; whatever happens, none is left behind."""
    with tempfile.TemporaryDirectory(prefix="fisher-ray-plan-") as folder:
        children: list[_Child] = []
        try:
            for number, place in enumerate(places):
                own = config.model_copy(update={"output": f"{folder}/{number}"})
                asked = Asked(own, facts, part, threads, "cpu" if place is None else "cuda")
                children.append(_Child(f"{folder}/{number}", asked, place, environment))
            return [child.result() for child in children]
        finally:
            for child in children:
                child.end()


class _Child:
    """A process that rehearses. Question and answer are files: what it prints is a user's own affair."""

    def __init__(self, name: str, asked: Asked, place: int | None, environment: Mapping[str, str]) -> None:
        self._name = name
        with open(f"{name}.asked", "wb") as file:
            pickle.dump(asked, file)
        own = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
        if place is not None:
            own["CUDA_VISIBLE_DEVICES"] = _visible(place)
        with open(f"{name}.said", "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, name], stdin=subprocess.PIPE, stdout=said, stderr=said, env=own
            )

    def result(self) -> Found:
        code = self._process.wait()
        if code:
            said = Path(f"{self._name}.said").read_text(errors="replace").strip()
            last = said.rpartition("\n")[2]
            text = f"a process that tried the run's stages on a few rows ended with code {code}: {last}"
            killed = WorkersLostError(f"{text}. It was killed, or there was no memory for it.")
            error = killed if code < 0 else RuntimeError(text)
            error.add_note(said)
            raise error
        with open(f"{self._name}.found", "rb") as file:
            found: Found | FisherRayError = pickle.load(file)
        if isinstance(found, FisherRayError):
            raise found
        return found

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def _visible(place: int) -> str:
    """Return what the GPU is called that torch has the number ``place`` for."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[place] if names else str(place)
