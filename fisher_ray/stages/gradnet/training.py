"""Training of GradNet on the stored entries, by ranks that share its weights: any number gives the same bits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, ModelError
from fisher_ray.linear import (
    Descent,
    GradNet,
    PieceTrainer,
    cut_pieces,
    densify,
    join_state,
    share_pieces,
    state_shapes,
)
from fisher_ray.stages.checkpoint import Tensors
from fisher_ray.stages.exchange import Ranks
from fisher_ray.stages.gradnet.checkpoint import (
    PROGRESS_FILE,
    Checkpoint,
    Course,
    load_checkpoint,
    save_checkpoint,
)
from fisher_ray.stages.gradnet.network import network_shape, save_network
from fisher_ray.stages.gradnet.units import ENTRIES
from fisher_ray.stages.lockstep import Lockstep, Teller, told_once
from fisher_ray.stages.shallow import held_out
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import Batches, FeatureStore, open_features

LOOK_ROWS = 256
"""Gradients of validation rows that are made dense at a time."""
_NAMES = ("values", "coordinates", "labels", "index")
_UNRELATED = ("steps", "checkpoint_steps")
"""Keys that a training's state does not depend on."""

Batch = dict[str, np.ndarray]


def fit_gradnet(bench: Workbench, ranks: Ranks) -> dict[str, Any] | None:
    """Train on the sealed entries, from the last checkpoint on, and write ``gradnet/weights.zarr``.

    Every rank calls this, reads every batch, and holds a part of the weights (:mod:`fisher_ray.linear.pieces`). Rows
    that :func:`~fisher_ray.stages.shallow.held_out` names are not trained on. After every ``evaluate_steps`` their
    labels are predicted from the stored gradients, and the weights that did best are those written.

    Args:
        bench: the process's.
        ranks: of the fit.

    Returns:
        On rank 0, plain values; elsewhere None. ``path``, as in :class:`~fisher_ray.stages.gradnet.checkpoint.Course`;
        ``step``: whose weights were kept; ``stored_validation``: their accuracy on the validation rows' stored
        gradients; ``num_rows`` trained on, ``num_parameters`` and ``widths``.

    Raises:
        ModelError: if the loss is not finite.
        DataError: if no rows are left to train on.
        StoreError: if entries or checkpoint are missing or corrupt.
        WorkersLostError: if the exchange broke.
    """
    return told_once(ranks, lambda: _Training(bench, ranks).run())


class _Training:
    """One rank's part in the training."""

    def __init__(self, bench: Workbench, ranks: Ranks) -> None:
        self._bench, self._ranks, self._section = bench, ranks, bench.config.gradnet_section
        self._shape = network_shape(self._section, bench.facts.gradnet_shapes, bench.facts.num_classes)
        self._shares = share_pieces(cut_pieces(self._shape), self._shape, ranks.size)
        descent = Descent(self._section.lr, self._section.momentum, self._section.weight_decay)
        self._part = PieceTrainer(self._shape, self._shares[ranks.rank], descent, bench.device)
        self._course, self._best = Course(), Tensors()
        self._lockstep = Lockstep(ranks, bench.device)
        self._teller = Teller(bench.storage, PROGRESS_FILE)

    def run(self) -> dict[str, Any] | None:
        self._together(self._begin, 1)
        while self._course.step < self._section.steps:
            epoch, start = divmod(self._course.step, self._batches_a_pass)
            with closing(iter(self._batches(epoch, start))) as read:
                self._go_through(read, epoch)
        return self._finish()

    def _begin(self) -> None:
        """Open what is read, and take up the last checkpoint."""
        self._store: FeatureStore = open_features(self._bench.url(ENTRIES))
        self._num_draws = self._store.layout("values").shape[1]
        rows = np.arange(self._store.num_rows)
        held = held_out(rows, self._bench.config.seed, self._section.validation)
        self._trained = ~held
        self._batches_a_pass = len(self._batches(0, 0))
        if not self._batches_a_pass:
            raise DataError("no rows are left to train GradNet on: all were skipped, or are validation rows")
        self._num_rows = int((~held).sum()) - len([row for row in self._store.skipped if not held[row]])
        self._held = list(self._store.iter_batches(LOOK_ROWS, _NAMES, only=held)) if held.any() else []
        kept = load_checkpoint(self._bench.storage, self._fingerprint)
        if kept is None:
            network = GradNet(self._shape, self._section.init_std, self._bench.config.seed)
            self._part.begin(network)
            return
        self._part.load(kept.state, kept.momentum)
        self._course, self._best = kept.course, self._mine(kept.best)

    def _batches(self, epoch: int, start: int) -> Batches:
        section, seed = self._section, self._bench.config.seed
        how = {"epoch": epoch, "start": start, "shuffle": True, "seed": seed, "buffer_rows": section.buffer_rows}
        return self._store.iter_batches(section.batch_size, _NAMES, only=self._trained, **how)

    @property
    def _fingerprint(self) -> str:
        section = self._section.model_dump(mode="json", exclude=set(_UNRELATED))
        entries = self._store.attributes["fingerprints"]
        text = json.dumps([section, entries, self._bench.config.seed, self._shape.to_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _mine(self, state: Tensors) -> Tensors:
        return {name: state[name].to(self._bench.device, copy=True) for name in self._part.state if name in state}

    # -- one step after the other

    def _go_through(self, batches: Iterator[Batch], epoch: int) -> None:
        for _ in range(self._course.step % self._batches_a_pass, self._batches_a_pass):
            self._step(batches, epoch)
            step, section = self._course.step, self._section
            if step % section.evaluate_steps == 0 or step == section.steps:
                self._look()
            if step % section.checkpoint_steps == 0 or step == section.steps:
                self._keep()
            if step == section.steps:
                return

    def _step(self, batches: Iterator[Batch], epoch: int) -> None:
        taken: list[tuple[Tensor, Tensor]] = []

        def products() -> Tensor:
            batch = next(batches)
            draws = (batch["index"] + epoch) % self._num_draws  # each of a sample's gradients in turn
            every = np.arange(len(draws))
            rows = self._dense(batch["values"][every, draws], batch["coordinates"][every, draws])
            taken.append((rows, torch.from_numpy(batch["labels"]).to(rows.device)))
            return self._part.products(rows)

        units = self._exchanged(products, self._section.batch_size)
        ((rows, labels),) = taken
        loss = float(self._part.step(rows, units[: len(rows)], labels))
        self._course = self._course.stepped(loss)
        if not math.isfinite(loss):
            raise ModelError(
                f"training of GradNet diverged: the loss is {loss} at step {self._course.step}. Lower gradnet.lr."
            )
        self._tell(loss)

    def _look(self) -> None:
        """Predict the validation rows' labels, and keep the weights if none were better."""
        right = total = 0
        for batch in self._held:
            outputs = self._outputs(batch)
            predicted = outputs.view(len(batch["labels"]), self._num_draws, -1).sum(1).argmax(1)
            right += int((predicted.cpu() == torch.from_numpy(batch["labels"])).sum())
            total += len(batch["labels"])
        self._course = self._course.looked(right / total if total else None)
        if self._course.best_step == self._course.step:
            self._best = {name: value.clone() for name, value in self._part.state.items()}

    def _outputs(self, batch: Batch) -> Tensor:
        """Return the outputs ``(B · S, C)`` for all stored gradients of some rows."""
        values, coordinates = (batch[name].reshape(-1, batch[name].shape[2]) for name in ("values", "coordinates"))
        outputs = []
        for start in range(0, len(values), LOOK_ROWS):
            part = slice(start, start + LOOK_ROWS)
            rows = self._dense(values[part], coordinates[part])
            units = self._exchanged(partial(self._part.products, rows), LOOK_ROWS)
            outputs.append(self._part.outputs(units[: len(rows)]))
        return torch.cat(outputs)

    def _dense(self, values: np.ndarray, coordinates: np.ndarray) -> Tensor:
        device = self._bench.device
        return densify(torch.from_numpy(values).to(device), torch.from_numpy(coordinates).to(device), self._shape.dim)

    # -- between the ranks

    def _exchanged(self, make: Callable[[], Tensor], num_rows: int) -> Tensor:
        """Return the units before the ReLU ``(num_rows, units)``: what every rank's ``make`` gives, put together.

        Args:
            make: returns this rank's products for at most ``num_rows`` rows.
            num_rows: the same on all ranks.
        """
        widths = [self._part.num_units(share) for share in self._shares]
        parts = self._together(make, max(widths), num_rows)
        return self._part.join([part[:, :width] for part, width in zip(parts, widths, strict=True)], self._shares)

    def _together(self, make: Callable[[], Tensor | None], width: int, num_rows: int = 0) -> list[Tensor]:
        return self._lockstep.gather(make, width, num_rows, place=f"step {self._course.step}")

    def _gathered(self, *parts: Tensors) -> list[Tensors]:
        """Return on rank 0 the pieces of all ranks, and its own of what is small; elsewhere nothing."""
        pieces = {name: value for name, value in self._part.state.items() if name.startswith("piece.")}
        held = [[part[name].reshape(-1).double().cpu() for name in pieces if name in part] for part in parts]
        replies = self._lockstep.collect(
            torch.cat([torch.zeros(0, dtype=torch.float64), *(v for row in held for v in row)])
        )
        return [] if self._ranks.rank else self._unpacked(replies, parts)

    def _unpacked(self, replies: list[Tensor], parts: tuple[Tensors, ...]) -> list[Tensors]:
        shapes = state_shapes(self._shape)
        made = [{name: value.cpu() for name, value in part.items() if not name.startswith("piece.")} for part in parts]
        for reply, share in zip(replies, self._shares, strict=True):
            place = 0
            for part, mine in zip(made, parts, strict=True):
                for name in (f"piece.{position}" for position in share) if mine else ():
                    size = math.prod(shapes[name])
                    part[name] = reply[place : place + size].float().view(shapes[name])
                    place += size
        return made

    # -- what is kept

    def _keep(self) -> None:
        """Write a checkpoint; if that fails, the ranks learn of it when they next exchange something."""
        if gathered := self._gathered(self._part.state, self._part.momentum, self._best):
            checkpoint = Checkpoint(self._course, *gathered)
            self._lockstep.attempt(lambda: save_checkpoint(self._bench.storage, checkpoint, self._fingerprint))

    def _finish(self) -> dict[str, Any] | None:
        gathered = self._gathered(self._best)
        if not gathered:
            return None
        save_network(self._bench.url("gradnet/weights.zarr"), self._shape, join_state(self._shape, gathered[0]))
        return {
            "path": list(self._course.path),
            "step": self._course.best_step,
            "stored_validation": self._course.best,
            "num_rows": self._num_rows,
            "num_parameters": self._shape.num_parameters,
            "widths": list(self._shape.widths),
        }

    def _tell(self, loss: float) -> None:
        accuracy = self._course.path[-1]["accuracy"] if self._course.path else None
        told = {"done": self._course.step, "total": self._section.steps, "loss": loss, "validation": accuracy}
        if self._ranks.rank == 0:
            self._lockstep.attempt(lambda: self._teller.tell(**told))
