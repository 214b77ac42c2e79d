"""Brief training of the base network, and training it on for comparison."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fisher_ray.config import BaseConfig, Config, ConvergenceConfig, TrainedOnConfig
from fisher_ray.data import load_batches, training_batches
from fisher_ray.errors import DataError, ModelError
from fisher_ray.gradients import main_output
from fisher_ray.records import Batch
from fisher_ray.stages.networks import build_network, load_checkpoint, network_bytes
from fisher_ray.stages.shallow import held_out
from fisher_ray.stages.workbench import BASE_FILE, Workbench

LOSS_EVERY = 50
"""Steps between two looks at the loss."""
CONVERGENCE_FACTOR, MAX_RATES = 0.1, 3
"""What the learning rate is multiplied by where training gains nothing more, and how many rates there are."""
MAX_VALIDATION_ROWS = 4096
"""Validation rows that a training to convergence keeps in memory."""


def train_base(bench: Workbench) -> Iterator[dict[str, Any]]:
    """Train the base network, or take the checkpoint, and write ``base/model.safetensors`` and the snapshots.

    Yields:
        ``done``, ``total`` and ``text``, every :data:`LOSS_EVERY` steps; at the end ``fingerprint``.

    Raises:
        ModelError: if the loss or a pretrained network is not finite.
    """
    config = bench.config
    model = build_network(config.model, config.seed)
    if config.base is None:
        if config.model.checkpoint is not None:
            load_checkpoint(model, config.model.checkpoint)
        elif broken := _not_finite(model):
            raise ModelError(f"model.pretrained: the network's {broken[0]} holds NaN or infinity. Give a sound one.")
        yield _keep_base(bench, model)
        return
    model = model.to(bench.device)
    settings, batches = config.base, _augmented(bench, "train", config.seed, config.base)
    optimiser = _sgd(model, settings)
    try:
        for step, batch in enumerate(itertools.islice(batches, settings.steps), start=1):
            loss = _step(model, optimiser, batch, bench.device)
            if step % LOSS_EVERY == 0 or step == settings.steps:
                yield {"done": step, "total": settings.steps, "text": f"steps, loss {_finite(loss, step):.3f}"}
            if step in settings.snapshots:
                bench.storage.write_bytes(f"base/step-{step}.safetensors", network_bytes(model))
    finally:
        batches.close()
    yield _keep_base(bench, model)


def _keep_base(bench: Workbench, model: nn.Module) -> dict[str, str]:
    if broken := _not_finite(model):
        raise ModelError(f"training diverged: {broken[0]} holds NaN or infinity at the end. Lower base.lr.")
    raw = network_bytes(model)
    bench.storage.write_bytes(BASE_FILE, raw)
    return {"fingerprint": hashlib.sha256(raw).hexdigest()}


def train_on(bench: Workbench, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Train the base network on with the shallow split for ``seconds``, augmented, the learning rate falling to zero.

    The rate falls linearly in time, which suits a fixed budget better than a constant one.

    Yields:
        ``done`` and ``total`` seconds and ``text`` now and then; at the end ``steps``, ``epochs``, ``correct`` and
        ``total`` on the test rows, with the run's views; ``correct`` is None if training diverged.
    """
    model, settings = bench.new_model(), _settings(bench.config)
    optimiser, batches = _sgd(model, settings), _augmented(bench, "shallow", bench.config.seed + 1, settings)
    start, step, diverged, loss = time.monotonic(), 0, False, torch.zeros(())
    try:
        while (spent := time.monotonic() - start) < seconds and not diverged:
            optimiser.param_groups[0]["lr"] = settings.lr * (1 - spent / seconds)
            loss = _step(model, optimiser, next(batches), bench.device)
            step += 1
            if step % LOSS_EVERY == 0:
                diverged = not math.isfinite(float(loss))
                yield {"done": int(spent), "total": math.ceil(seconds), "text": f"s, loss {float(loss):.3f}"}
    finally:
        batches.close()
    epochs = step * settings.batch_size / bench.facts.num_rows["shallow"]
    if diverged or not math.isfinite(float(loss)) or _not_finite(model):
        yield {"steps": step, "epochs": epochs, "correct": None, "total": 0}
        return
    bench.storage.write_bytes("base/trained_on.safetensors", network_bytes(model))
    correct, total = count_correct(bench, model.eval())
    yield {"steps": step, "epochs": epochs, "correct": correct, "total": total}


def train_to_convergence(bench: Workbench) -> Iterator[dict[str, Any]]:
    """Train the base network on with the shallow split, augmented, until that gains nothing more on validation rows.

    As ``trained_on.convergence`` says. The weights that did best are written to ``base/converged.safetensors``.

    Yields:
        ``done``, ``total`` steps and ``text`` after each look at the validation rows; at the end ``path``, of every
        look ``step``, ``seconds`` of training alone, ``accuracy`` and ``lr``; ``step``, whose weights were kept;
        ``epochs``, ``correct`` and ``total`` on the test rows, with the run's views; ``correct`` is None if training
        diverged before the first look.
    """
    asked = (bench.config.trained_on or TrainedOnConfig()).convergence or ConvergenceConfig()
    settings, seed = _settings(bench.config), bench.config.seed
    model, validation = bench.new_model(), _validation_batches(bench, asked.validation)
    optimiser, batches = _sgd(model, settings), _augmented(bench, "shallow", seed + 2, settings)
    plateau = ReduceLROnPlateau(optimiser, mode="max", factor=CONVERGENCE_FACTOR, patience=asked.patience - 1)
    lowest = settings.lr * CONVERGENCE_FACTOR ** (MAX_RATES - 0.5)
    path: list[dict[str, Any]] = [{"step": 0, "seconds": 0.0, "accuracy": _share(bench, model, validation)}]
    best: dict[str, Tensor] = {}
    start, spent = time.monotonic(), 0.0
    try:
        for step, batch in enumerate(itertools.islice(batches, asked.max_steps), start=1):
            trained = ~held_out(batch.index.numpy(), seed, asked.validation)
            loss = _step(model, optimiser, _some(batch, torch.from_numpy(trained)), bench.device)
            if step % asked.evaluate_steps and step < asked.max_steps:
                continue
            spent += time.monotonic() - start
            if not math.isfinite(float(loss)) or _not_finite(model):
                break
            accuracy, rate = _share(bench, model, validation), optimiser.param_groups[0]["lr"]
            if not best or accuracy > max(look["accuracy"] for look in path[1:]):
                best = {name: value.clone() for name, value in model.state_dict().items()}
            path.append({"step": step, "seconds": spent, "accuracy": accuracy, "lr": rate})
            text = f"steps at most, {100 * accuracy:.1f} % of the validation rows, learning rate {rate:g}"
            yield {"done": step, "total": asked.max_steps, "text": text}
            plateau.step(accuracy)
            if optimiser.param_groups[0]["lr"] < lowest:
                break
            start = time.monotonic()
    finally:
        batches.close()
    if not best:
        yield {"path": path, "step": 0, "epochs": 0.0, "correct": None, "total": 0}
        return
    model.load_state_dict(best)
    bench.storage.write_bytes("base/converged.safetensors", network_bytes(model))
    correct, total = count_correct(bench, model.eval())
    chosen = max(path[1:], key=lambda look: float(look["accuracy"]))["step"]
    epochs = path[-1]["step"] * settings.batch_size / bench.facts.num_rows["shallow"]
    yield {"path": path, "step": chosen, "epochs": epochs, "correct": correct, "total": total}


def _validation_batches(bench: Workbench, share: float) -> list[Batch]:
    """Return the first :data:`MAX_VALIDATION_ROWS` of the shallow split's rows that are held out, as clean samples."""
    found, num_rows = list[Batch](), 0
    with closing(clean_batches(bench, "shallow", range(bench.facts.num_rows["shallow"]), {})) as batches:
        for batch in batches:
            held = torch.from_numpy(held_out(batch.index.numpy(), bench.config.seed, share))
            if not bool(held.any()):
                continue
            found.append(_some(batch, held))
            num_rows += len(found[-1].index)
            if num_rows >= MAX_VALIDATION_ROWS:
                break
    if not found:
        raise DataError("no row of data.shallow is a validation row. Raise trained_on.convergence.validation.")
    return found


def _some(batch: Batch, chosen: Tensor) -> Batch:
    here = chosen.to(batch.inputs.device)
    return Batch(batch.inputs[here], batch.labels[here], batch.index[chosen])


def _share(bench: Workbench, model: nn.Module, batches: list[Batch]) -> float:
    """Return the share of clean samples that a network gets right with the run's views."""
    model.eval()
    with torch.no_grad():
        right = sum(int((_predicted(bench, model, batch) == batch.labels).sum()) for batch in batches)
    return right / sum(len(batch.labels) for batch in batches)


def _predicted(bench: Workbench, model: nn.Module, batch: Batch) -> Tensor:
    logits = main_output(model(batch.inputs))
    if bench.config.linear.views == 2:
        logits = (logits + main_output(model(batch.inputs.flip(-1)))) / 2
    return logits.argmax(1)


def _settings(config: Config) -> BaseConfig:
    """Join ``trained_on`` to ``base``; ``steps`` has no meaning here."""
    settings, asked = config.base or BaseConfig(steps=1), config.trained_on or TrainedOnConfig()
    return settings.model_copy(update=asked.model_dump(exclude={"seconds", "convergence"}, exclude_none=True))


def count_correct(bench: Workbench, model: nn.Module) -> tuple[int, int]:
    """Return how many clean test rows ``model`` gets right with the run's views, and how many there are."""
    correct = total = 0
    with torch.no_grad():
        for batch in clean_batches(bench, "test", range(bench.facts.num_rows["test"]), {}):
            correct += int((_predicted(bench, model, batch) == batch.labels).sum())
            total += len(batch.labels)
    return correct, total


def clean_batches(
    bench: Workbench,
    split: str,
    rows: range,
    skipped: dict[int, str],
    excluded: Mapping[int, str] = MappingProxyType({}),
) -> Generator[Batch, None, None]:
    """Yield clean samples of ``split`` in row order in micro-batches, inputs and labels on the bench's device.

    Arguments as of :func:`fisher_ray.data.load_batches`.
    """
    facts, config = bench.facts, bench.config
    batches = load_batches(
        bench.source(split),
        rows,
        bench.micro_batch,
        num_classes=facts.num_classes,
        expected_shape=facts.input_shape,
        on_error=config.data.on_error,
        skipped=skipped,
        excluded=excluded,
        pinned=bench.device.type == "cuda",
    )
    try:
        for batch in batches:
            inputs, labels = (part.to(bench.device, non_blocking=True) for part in (batch.inputs, batch.labels))
            yield Batch(inputs, labels, batch.index)
    finally:
        batches.close()


def drop_row(bench: Workbench, split: str, skipped: dict[int, str], row: int) -> None:
    """Leave a row out that the network makes no finite numbers of, under ``data.on_error: skip``.

    Raises:
        DataError: under ``stop``, naming the row.
    """
    source = bench.source(split)
    reason = f"{source.where(row)} ({source.key} row {row}): the network makes NaN or infinity of it"
    if bench.config.data.on_error == "stop":
        raise DataError(f"{reason}. Correct the row, or leave such rows out with data.on_error: skip.", row=row)
    skipped[row] = reason


def _augmented(bench: Workbench, split: str, seed: int, settings: BaseConfig) -> Generator[Batch, None, None]:
    return training_batches(
        bench.source(split),
        batch_size=settings.batch_size,
        seed=seed,
        num_classes=bench.facts.num_classes,
        expected_shape=bench.facts.input_shape,
        on_error=bench.config.data.on_error,
    )


def _sgd(model: nn.Module, settings: BaseConfig) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch, device: torch.device) -> Tensor:
    model.train()
    optimiser.zero_grad()
    logits = main_output(model(batch.inputs.to(device)))
    loss = nn.functional.cross_entropy(logits, batch.labels.to(device))
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.detach()


def _not_finite(model: nn.Module) -> list[str]:
    """Return the names of what holds NaN or infinity: the last step may diverge after its loss was finite."""
    return [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise ModelError(f"training diverged: the loss is {value} at step {step}. Lower base.lr.")
    return value
