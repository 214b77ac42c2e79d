"""A run in miniature: the real tasks on a few rows, timed. A process of its own runs it, and asks nothing of Ray.

:func:`main` reads a pickled :class:`Asked` from ``NAME.asked``, and writes a :class:`Found`, or the error that ended
it, to ``NAME.found``.
"""

from __future__ import annotations

import os
import pickle
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fisher_ray.config import BaseConfig, Config
from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, FisherRayError
from fisher_ray.linear import GramSum, grid, preconditioner, ridge_path, sum_gradients
from fisher_ray.records import Unit
from fisher_ray.stages import compression, planning, shallow, tasks, training
from fisher_ray.stages.facts import Facts
from fisher_ray.stages.passes import feature_spec
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import create_store, open_features, seal

WARM_STEPS, TIMED_STEPS = 3, 15
"""Of training."""
BATCHES = 3
"""Micro-batches of the larger of the two units that a pass is timed on."""
PLACES = 8
"""Places of a split that rows are taken from, one after the other, until enough are good."""
MOST_COLUMNS = 2048
"""Columns of the linear model that its solution is timed on, and half of them; of more it is extrapolated."""
SUMMED_COLUMNS = 8192
"""Columns that a Gram sum is timed on at most."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Asked:
    """What is to be timed.

    Attributes:
        config: the run's, its output an empty folder.
        facts: what the first look found.
        part: ``alone``, of the steps that one worker does with all threads, or ``passes``, of what all do.
        threads: of the arithmetic.
        device: to compute on.
    """

    config: Config
    facts: Facts
    part: str
    threads: int
    device: str


@dataclass(frozen=True)
class Pace:
    """Seconds that a pass takes for each unit, whatever its rows, and for each row."""

    unit_s: float
    row_s: float

    def seconds(self, rows: int) -> float:
        """Return what a unit of so many rows takes."""
        return self.unit_s + rows * self.row_s


class Rehearsal:
    """A run's workbench with a few rows of each split, and what its steps took.

    Attributes:
        bench: of the run in miniature.
        once: seconds of what is done once, by name.
        paces: of what is done for each unit, by name.
        peak_bytes: of this process's memory, after what is done without the linear model's sums.
    """

    def __init__(self, asked: Asked) -> None:
        """See the class."""
        self._config, self._facts = asked.config, asked.facts
        num_rows = asked.facts.num_rows
        probe = Workbench(asked.config, asked.facts, asked.device)
        self._few, self._more = (
            min(batches * probe.micro_batch, num_rows["shallow"], asked.config.runtime.unit_rows)
            for batches in (1, BATCHES)
        )
        runtime = asked.config.runtime.model_copy(update={"unit_rows": self._more})
        base = asked.config.base and self._trained(WARM_STEPS)
        store = asked.config.store.model_copy(update={"chunk_rows": self._more, "shard_rows": None})
        self._small = asked.config.model_copy(update={"runtime": runtime, "base": base, "store": store})
        rows = {"shallow": self._more, "test": min(self._more, num_rows["test"])}
        facts = replace(asked.facts, num_rows={**num_rows, **rows})
        self.bench = Workbench(self._small, facts, asked.device)
        self.once: dict[str, float] = {}
        self.paces: dict[str, Pace] = {}
        self.peak_bytes = 0

    def alone(self) -> None:
        """Time what one worker does with all threads: training, evaluation and the linear model's solution."""
        self._train()
        with self._timing("forward"):
            training.count_correct(self.bench, self.bench.model)
        self.paces["forward"] = Pace(0.0, self.once.pop("forward") / self.bench.facts.num_rows["test"])
        if self._config.linear.model == "ridge":  # how often the others look at the rows is for the run to find out
            self._solve()
        if self._facts.hidden is not None:
            self._probe(self._facts.hidden)

    def passes(self) -> None:
        """Time what every worker does: the passes over the samples, and the linear model's sums.

        Where bad rows are left out, and too few of the first ones remain, those further on are taken.
        """
        places = PLACES if self._config.data.on_error == "skip" else 1
        failed: DataError | None = None
        for place in range(places):
            try:
                self._move(place)
                return self._passes()
            except DataError as error:
                failed = failed or error
        assert failed is not None
        raise failed

    def _move(self, place: int) -> None:
        """Begin anew with rows further on."""
        if place == 0:
            return
        num_rows, section = self._facts.num_rows["shallow"], self._small.data.shallow
        first = (section.rows or (0, num_rows))[0]
        start = min(place * num_rows // PLACES, num_rows - self._more)
        shallow = section.model_copy(update={"rows": (first + start, first + num_rows)})
        data = self._small.data.model_copy(update={"shallow": shallow})
        output = f"{self._small.output}/{place}"
        config = self._small.model_copy(update={"data": data, "output": output})
        self.bench = Workbench(config, self.bench.facts, str(self.bench.device))

    def _passes(self) -> None:
        list(training.train_base(self.bench))
        plans = compression.plan(self._config.compression, self._config.metric, self._facts.block_shapes)
        sums = [self._pace("basis", partial(tasks.sum_kronecker, self.bench))[1]] if plans.with_moments else []
        with self._timing("basis"):
            tasks.choose_basis(self.bench, *sums)
        _, summed = self._pace("metric", partial(tasks.sum_fisher, self.bench))
        with self._timing("metric"):
            tasks.fit_metric(self.bench, summed, fingerprints={})
        self._pace("features", partial(tasks.try_features, self.bench, split="shallow", name="features/train.zarr"))
        self._store()
        self.peak_bytes = _peak_bytes()
        self._sum()

    def _train(self) -> None:
        config, settings = self.bench.config, self._config.base
        list(training.train_base(self.bench))
        if settings is None:
            return
        found = []
        few, more = (self._trained(steps) for steps in (WARM_STEPS, WARM_STEPS + TIMED_STEPS))
        for base in (few, more):
            bench = Workbench(config.model_copy(update={"base": base}), self.bench.facts, str(self.bench.device))
            start = time.perf_counter()
            list(training.train_base(bench))
            found.append(time.perf_counter() - start)
        self.paces["base"] = _pace(found, (few.steps, more.steps))

    def _trained(self, steps: int) -> BaseConfig:
        settings = self._config.base
        assert settings is not None
        return settings.model_copy(update={"steps": min(steps, settings.steps), "snapshots": ()})

    def _pace(self, name: str, task: Callable[[Unit, int], Made]) -> Made:
        """Run a pass on both units, the smaller one twice, the first time for what is made once."""
        (few,), (more,) = plan_units(self._few, self._few), plan_units(self._more, self._more)
        task(few, 1)
        found = []
        for unit in (few, more):
            start = time.perf_counter()
            made = task(unit, 1)
            found.append(time.perf_counter() - start)
        self.paces[name] = _pace(found, (self._few, self._more))
        return made

    def _store(self) -> None:
        """Write the features of the larger unit, and read them back."""
        bench, (unit,) = self.bench, plan_units(self._more, self._more)
        spec = feature_spec(bench.config, bench.facts, "shallow", bench.metric.rank, bench.metric.feature_rms, {})
        create_store(bench.url("features/train.zarr"), spec)
        receipt, _ = tasks.write_features(bench, unit, 1, split="shallow", name="features/train.zarr")
        seal(bench.url("features/train.zarr"), 1)
        store = open_features(bench.url("features/train.zarr"))
        with self._timing("read"):
            list(shallow.linear_rows(bench, store, "all"))
        self.paces["write"] = Pace(0.0, receipt.seconds["write"] / self._more)
        self.paces["read"] = Pace(0.0, self.once.pop("read") / self._more)

    def _sum(self) -> None:
        """Sum a block of rows as the linear model does."""
        columns = planning.num_columns(self._config, self._facts, self.bench.metric.rank)
        some = min(columns, SUMMED_COLUMNS)
        x, labels = self._random(shallow.BLOCK_ROWS, some)
        with self._timing("first"):
            sums = GramSum.zeros(some, self._facts.num_classes)
            sums.add(x, labels)  # which makes its pages, too
        with self._timing("more"):
            sums.add(x, labels)
        with self._timing("merge"):  # with a copy, as those that come from other processes are
            sums.merge(GramSum(sums.gram.copy(), sums.cross, sums.counts))
        first, more, merge = (self.once.pop(name) for name in ("first", "more", "merge"))
        scale, views = (columns / some) ** 2, self._config.linear.num_stacked or 1
        self.paces["gram"] = Pace(scale * (max(0.0, first - more) + merge), scale * views * more / shallow.BLOCK_ROWS)

    def _solve(self) -> None:
        """Solve for the grid and the chosen penalty on fewer columns, and extrapolate."""
        linear = self._config.linear
        rank = min(self._config.metric.rank, planning.num_coordinates(self._config, self._facts))
        columns = planning.num_columns(self._config, self._facts, rank)
        sizes = [columns] if columns <= MOST_COLUMNS else [MOST_COLUMNS // 2, MOST_COLUMNS]
        paths: list[float] = []
        fits: list[float] = []
        for size in sizes:
            sums = GramSum.zeros(size, self._facts.num_classes)
            sums.add(*self._random(2 * size, size))
            for penalties, found in ((linear.penalties, paths), (linear.penalties[:1], fits)):
                start = time.perf_counter()
                ridge_path(sums, penalties)
                found.append(time.perf_counter() - start)
        tried = len(grid(linear.ranks, linear.dampings))
        self.once["linear"] = tried * _extrapolated(paths, sizes, columns) + _extrapolated(fits, sizes, columns)

    def _probe(self, hidden: int) -> None:
        """Time one look of the logistic probe at a block of rows."""
        sums = GramSum.zeros(hidden, self._facts.num_classes)
        x, labels = self._random(shallow.BLOCK_ROWS, hidden)
        sums.add(x, labels)
        coordinates = preconditioner(sums, self._config.linear.penalties[0])
        start = coordinates.start()
        for _ in range(2):
            with self._timing("probe"):
                sum_gradients([(x, labels)], *coordinates.raw(start), None)
        self.paces["probe"] = Pace(0.0, self.once.pop("probe") / shallow.BLOCK_ROWS)

    def _random(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, columns, generator=generator)
        return x, torch.randint(self._facts.num_classes, (rows,), generator=generator)

    @contextmanager
    def _timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.once[name] = time.perf_counter() - start


def _pace(seconds: list[float], rows: tuple[int, int]) -> Pace:
    """Return the pace of two units; where they are the same, or the larger was not slower, all counts by the row."""
    few, more = rows
    if more == few or seconds[1] <= seconds[0]:
        return Pace(0.0, seconds[1] / more)
    row_s = min((seconds[1] - seconds[0]) / (more - few), seconds[1] / more)
    return Pace(seconds[1] - more * row_s, row_s)


def _extrapolated(seconds: list[float], sizes: list[int], size: int) -> float:
    """Continue a power law through the seconds of two sizes, of an exponent between a product's and a solution's."""
    if len(sizes) == 1:
        return seconds[0]
    exponent = torch.tensor(seconds[1] / max(seconds[0], 1e-9)).log2().clamp(2.0, 3.0)
    return seconds[1] * float((size / sizes[1]) ** exponent)


@dataclass(frozen=True)
class Found:
    """What a rehearsal found: see :class:`Rehearsal`."""

    once: dict[str, float]
    paces: dict[str, Pace]
    peak_bytes: int = 0


def rehearse(asked: Asked) -> Found:
    """Time a part of the run.

    Raises:
        FisherRayError: as the run would.
    """
    torch.set_num_threads(asked.threads)
    rehearsal: Any = Rehearsal(asked)
    getattr(rehearsal, asked.part)()
    return Found(rehearsal.once, rehearsal.paces, rehearsal.peak_bytes)


def main(name: str) -> None:
    """Answer one request; see the module. Ends with whoever holds the other end of the standard input."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    found: Found | FisherRayError
    with open(f"{name}.asked", "rb") as file:
        asked = pickle.load(file)
    try:
        found = rehearse(asked)
    except FisherRayError as error:
        found = error
    with open(f"{name}.found", "wb") as file:
        pickle.dump(found, file)


def _end_with_input() -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock would be held when the process ends
        pass
    os._exit(1)


def _peak_bytes() -> int:
    """Return the most that this process has held; ``ru_maxrss`` would count what the one that started it held."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes where there is no /proc
