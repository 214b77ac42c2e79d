"""Multinomial logistic regression on batches that stream from the feature store, by ranks that go on in step.

The same number of ranks fits the same bits, whatever is interrupted in between: every rank's batches, the order in
which their gradients are added, and the step that all then take alike follow from the configuration.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, ModelError
from fisher_ray.linear import Adam, ColumnSums, StandardColumns, best_penalty, fit_temperature, loss_and_gradient
from fisher_ray.stages import logistic, planning, shallow
from fisher_ray.stages.checkpoint import load_state, save_state
from fisher_ray.stages.exchange import Ranks
from fisher_ray.stages.lockstep import Lockstep, Teller, told_once
from fisher_ray.stages.workbench import Workbench
from fisher_ray.storage import Storage
from fisher_ray.store import Batches, load_arrays

FILE = "linear/checkpoint.safetensors"
PROGRESS_FILE = "linear/progress.json"
"""How far the training is, for whoever shows it."""
_UNRELATED = ("solver", "max_steps", "checkpoint_steps")
"""Keys that a training's state does not depend on."""

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Course:
    """How the training went so far.

    Attributes:
        fits: how many are done.
        number: steps done of the present one.
        epoch: of it.
        step: steps done of that epoch.
        loss: sum of the losses of that epoch's rows so far, each before the step that it was part of.
        num_rows: of these.
        path: of every fit that is done ``penalty``, ``steps`` and ``loss``, the last epoch's.
    """

    fits: int = 0
    number: int = 0
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    num_rows: float = 0.0
    path: tuple[dict[str, Any], ...] = ()

    def stepped(self, loss: float, num_rows: float) -> Course:
        """Return the course after another step."""
        loss, num_rows = self.loss + loss, self.num_rows + num_rows
        return replace(self, number=self.number + 1, step=self.step + 1, loss=loss, num_rows=num_rows)

    def after_epoch(self) -> Course:
        """Return the course at the beginning of the next epoch."""
        return replace(self, epoch=self.epoch + 1, step=0, loss=0.0, num_rows=0.0)

    def after_fit(self, penalty: float, loss: float) -> Course:
        """Return the course at the beginning of the next fit."""
        done = {"penalty": penalty, "steps": self.number, "loss": loss}
        return Course(self.fits + 1, path=(*self.path, done))


def remove_checkpoint(storage: Storage) -> None:
    """Remove what a training kept, and what told of its progress."""
    for name in (FILE, PROGRESS_FILE):
        storage.remove(name)


def fit_minibatch(bench: Workbench, ranks: Ranks) -> dict[str, Any] | None:
    """Choose the penalty on the validation rows, fit all rows with it, and write ``linear/weights.zarr``.

    Every rank calls this, and goes on from the last checkpoint of as many ranks. The penalties are trained one after
    the other, the largest first, each from where the one before ended, for ``linear.epochs`` each.

    Args:
        bench: the process's, with sealed features and the column sums ``linear/sums-fit.zarr`` and
            ``linear/sums-all.zarr``.
        ranks: of the fit.

    Returns:
        On rank 0, plain values; elsewhere None. ``path``: by penalty in the configuration's order ``accuracy`` on the
        validation rows, ``steps``, and ``loss``, the objective as the last epoch's steps met it; ``penalty``: the best
        (of equals, the largest); ``validation``: its accuracy; ``temperature``: of its scores there; ``num_rows``,
        ``num_columns``, ``steps`` and ``loss`` of the last fit, on all rows.

    Raises:
        ModelError: if the loss is not finite.
        DataError: if there are no rows.
        StoreError: if features, sums or checkpoint are missing or corrupt.
        WorkersLostError: if the exchange broke.
    """
    return told_once(ranks, lambda: _Training(bench, ranks).run())


class _Training:
    """One rank's part in the training; all ranks hold the same parameters."""

    def __init__(self, bench: Workbench, ranks: Ranks) -> None:
        self._bench, self._ranks, self._section = bench, ranks, bench.config.linear
        self._lockstep, self._teller = Lockstep(ranks, bench.device), Teller(bench.storage, PROGRESS_FILE)
        self._penalties = sorted(self._section.penalties, reverse=True)
        self._course, self._fitted = Course(), list[tuple[Tensor, Tensor]]()
        self._adam = Adam(self._section.lr)

    def run(self) -> dict[str, Any] | None:
        self._lockstep.gather(self._begin, 1, place="the start")
        for penalty in self._penalties[self._course.fits :]:
            self._fit("fit", penalty, self._fitted[-1] if self._fitted else None)
        chosen = self._choose()
        if self._course.fits == len(self._penalties):
            best = self._penalties.index(chosen["penalty"])
            self._fit("all", chosen["penalty"], self._fitted[best])
        model = self._columns("all", chosen["penalty"])
        weights = model.model(model.params(*self._fitted[-1]))
        if self._ranks.rank:
            return None
        shallow.save_weights(self._bench, "weights", replace(weights, temperature=chosen["temperature"]))
        last = {name: self._course.path[-1][name] for name in ("steps", "loss")}
        sums = self._sums["all"]
        return {**chosen, "num_rows": sums.num_rows, "num_columns": len(sums.total), **last}

    def _begin(self) -> None:
        """Open what is read, and take up the last checkpoint."""
        self._store = self._bench.train_store
        self._views = shallow.num_views(self._store)
        self._samples = -(-self._section.batch_size // (self._ranks.size * self._views))  # of this rank's batches
        kept = [("features", True), ("hidden", self._section.hidden), ("labels", True)]
        self._names = [name for name, wanted in kept if wanted and name in self._store.arrays]
        self._sums = {
            part: ColumnSums.from_arrays(load_arrays(self._bench.url(f"linear/sums-{part}.zarr"))[0])
            for part in ("fit", "all")
        }
        rows = np.arange(self._store.num_rows)
        held = shallow.held_out(rows, self._bench.config.seed, self._section.validation)
        self._only = {"fit": ~held, "all": np.ones_like(held)}
        found = load_state(self._bench.storage, FILE, self._fingerprint, _to_course)
        self._state: dict[str, Tensor] = {}
        if found is not None:
            self._course, parts = found
            self._state, ended = parts.get("state", {}), parts.get("fitted", {})
            self._fitted = [(ended[f"weight-{n}"], ended[f"bias-{n}"]) for n in range(self._course.fits)]

    @property
    def _fingerprint(self) -> str:
        section = self._section.model_dump(mode="json", exclude=set(_UNRELATED))
        store = [self._store.attributes.get("fingerprints"), self._store.num_rows, self._store.chunk_rows]
        rows = [sums.counts.tolist() for sums in self._sums.values()]
        text = json.dumps([section, store, rows, self._bench.config.seed, self._ranks.size], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _columns(self, part: str, penalty: float) -> StandardColumns:
        return StandardColumns.of(self._sums[part], penalty, self._bench.facts.num_classes)

    # -- one step after the other

    def _fit(self, part: logistic.Part, penalty: float, near: tuple[Tensor, Tensor] | None) -> None:
        """Train with one penalty, from where the present fit was left, or from a raw model, or from zero."""
        columns = self._columns(part, penalty)
        if not self._state:
            params = columns.start() if near is None else columns.params(*near)
            self._state = {"params": params, "mean": torch.zeros_like(params), "square": torch.zeros_like(params)}
        loss = math.nan
        while self._course.epoch < self._section.epochs:
            self._go_through(part, columns)
            logistic.check_num_rows(part, self._course.num_rows, self._sums[part].num_rows)
            loss = columns.loss(self._state["params"], self._course.loss, self._course.num_rows)
            self._course = self._course.after_epoch()
            self._tell(loss)
        self._fitted.append(columns.raw(self._state["params"]))
        self._course, self._state = self._course.after_fit(penalty, loss), {}
        self._keep()

    def _go_through(self, part: str, columns: StandardColumns) -> None:
        """Take an epoch's steps, from the one that is next."""
        course = self._course
        every = [len(self._batches(part, rank)) for rank in range(self._ranks.size)]
        total = max(every)
        if not total:
            raise DataError("no rows are left to fit a linear model on: all were skipped, or are validation rows")
        with closing(iter(self._batches(part, self._ranks.rank, course.step))) as read:
            for step in range(course.step, total):
                self._step(read, columns, (self._course.epoch + step / total) / self._section.epochs)
                if self._course.number % self._section.checkpoint_steps == 0:
                    self._keep()

    def _batches(self, part: str, rank: int, start: int = 0) -> Batches:
        return self._store.iter_batches(
            self._samples,
            self._names,
            shuffle=True,
            seed=self._bench.config.seed,
            epoch=self._course.epoch,
            buffer_rows=planning.STREAMED_ROWS,
            rank=rank,
            world_size=self._ranks.size,
            start=start,
            only=self._only[part],
        )

    def _step(self, batches: Iterator[Batch], columns: StandardColumns, progress: float) -> None:
        state, width = self._state, len(columns.mean) + 1
        make = partial(self._sum_batch, batches, columns.raw(state["params"]))
        parts = self._lockstep.gather(make, width, 1 + columns.num_classes, place=f"step {self._course.number}")
        total = torch.stack([part.double().cpu() for part in parts]).cumsum(0)[-1]  # in the ranks' order
        num_rows, loss = total[0, :2].tolist()
        if not math.isfinite(loss) or not bool(total.isfinite().all()):
            raise ModelError(
                f"the logistic fit diverged: the loss is {loss} at step {self._course.number}. Lower linear.lr."
            )
        whole = self._samples * self._views * self._ranks.size
        gradient = columns.gradient(state["params"], total[1:], num_rows, whole)
        self._adam.step(
            state["params"], state["mean"], state["square"], gradient, number=self._course.number, progress=progress
        )
        self._course = self._course.stepped(loss, num_rows)

    def _sum_batch(self, batches: Iterator[Batch], raw: tuple[Tensor, Tensor]) -> Tensor | None:
        """Return the rows and the loss of this rank's next batch, and below them its gradient ``(C, F + 1)``."""
        batch = next(batches, None)
        if batch is None:  # this rank had fewer rows than others
            return None
        stored = shallow.columns_of(batch, self._names[:-1], shallow.is_stacked(self._store))
        x, labels = shallow.fit_rows({"x": stored, "labels": torch.from_numpy(batch["labels"])})
        device, weights = self._bench.device, self._bench.class_weights
        loss, by_weight, by_bias = loss_and_gradient(x.to(device), labels, *raw, weights)
        head = torch.zeros(1, by_weight.shape[1] + 1, dtype=torch.float64)
        head[0, 0], head[0, 1] = len(labels), loss
        return torch.cat([head, torch.cat([by_weight, by_bias[:, None]], 1)])

    # -- between the fits

    def _choose(self) -> dict[str, Any]:
        """Score the validation rows; every rank learns the penalty, rank 0 the rest too."""
        models = []
        for penalty, raw in zip(self._penalties, self._fitted, strict=False):
            columns = self._columns("fit", penalty)
            models.append(columns.model(columns.params(*raw)))
        replies: list[Tensor] = []
        failure = logistic.Leaves(self._bench, self._ranks).go_through(logistic.score_order(models), replies.append)
        if failure is not None:
            raise failure
        chosen: dict[str, Any] = {}

        def choose() -> Tensor | None:
            if self._ranks.rank:
                return None
            scores, labels = logistic.split_scores(replies, len(models))
            best, accuracies = best_penalty(self._penalties, scores, labels)
            facts = {
                penalty: {**course, "accuracy": accuracy}
                for penalty, course, accuracy in zip(self._penalties, self._course.path, accuracies, strict=False)
            }
            chosen["path"] = [facts[penalty] for penalty in self._section.penalties]
            chosen["validation"] = accuracies[best]
            chosen["temperature"] = fit_temperature(scores[best], labels)
            return torch.tensor([[float(best)]])

        best = self._lockstep.gather(choose, 1, 1, place="the choice of the penalty")[0]
        return {**chosen, "penalty": self._penalties[int(best[0, 0])]}

    # -- what is kept

    def _keep(self) -> None:
        if self._ranks.rank:
            return
        fitted = {f"weight-{number}": weight for number, (weight, _) in enumerate(self._fitted)}
        fitted |= {f"bias-{number}": bias for number, (_, bias) in enumerate(self._fitted)}
        parts, course = {"state": self._state, "fitted": fitted}, asdict(self._course)
        self._lockstep.attempt(lambda: save_state(self._bench.storage, FILE, parts, course, self._fingerprint))

    def _tell(self, loss: float) -> None:
        if self._ranks.rank == 0:
            epochs = self._section.epochs
            done, total = self._course.fits * epochs + self._course.epoch, (len(self._penalties) + 1) * epochs
            self._lockstep.attempt(lambda: self._teller.tell(done=done, total=total, loss=loss, validation=None))


def _to_course(kept: dict[str, Any]) -> Course:
    return Course(**{**kept, "path": tuple(kept["path"])})
