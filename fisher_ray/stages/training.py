"""Brief training of the base network, and training it on for comparison."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Generator, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fisher_ray.config import BaseConfig, Config, TrainedOnConfig
from fisher_ray.data import load_batches, training_batches
from fisher_ray.errors import DataError, ModelError
from fisher_ray.records import Batch
from fisher_ray.stages.networks import build_network, load_checkpoint, network_bytes
from fisher_ray.stages.workbench import BASE_FILE, Workbench

LOSS_EVERY = 50
"""Steps between two looks at the loss."""


def train_base(bench: Workbench) -> Iterator[dict[str, Any]]:
    """Train the base network, or take the checkpoint, and write ``base/model.safetensors`` and the snapshots.

    Yields:
        ``done``, ``total`` and ``text``, every :data:`LOSS_EVERY` steps; at the end ``fingerprint``.

    Raises:
        ModelError: if the loss is not finite.
    """
    config = bench.config
    model = build_network(config.model, config.seed)
    if config.base is None:
        load_checkpoint(model, str(config.model.checkpoint))
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


def _settings(config: Config) -> BaseConfig:
    """Join ``trained_on`` to ``base``; ``steps`` has no meaning here."""
    settings, asked = config.base or BaseConfig(steps=1), config.trained_on or TrainedOnConfig()
    return settings.model_copy(update=asked.model_dump(exclude={"seconds"}, exclude_none=True))


def count_correct(bench: Workbench, model: nn.Module) -> tuple[int, int]:
    """Return how many clean test rows ``model`` gets right with the run's views, and how many there are."""
    correct = total = 0
    with torch.no_grad():
        for batch in clean_batches(bench, "test", range(bench.facts.num_rows["test"]), {}):
            logits: Tensor = model(batch.inputs)
            if bench.config.linear.views == 2:
                logits = (logits + model(batch.inputs.flip(-1))) / 2
            correct += int((logits.argmax(1) == batch.labels).sum())
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
    loss = nn.functional.cross_entropy(model(batch.inputs.to(device)), batch.labels.to(device))
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
