"""Batches of a source: in row order for metric and features, in random order to train a network."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fisher_ray.data.keys import epoch_order, generator_seeds
from fisher_ray.data.samples import Assembler, OnError, Request
from fisher_ray.data.source import Source
from fisher_ray.errors import DataError
from fisher_ray.prefetch import prefetch
from fisher_ray.records import Batch

Made = tuple[Batch | None, dict[int, str]]


def check_source(source: Source, num_classes: int | None, *, on_error: OnError = "stop") -> Tensor:
    """Look at all labels, where that is cheap, and at the first sample, before any work.

    Args:
        source: the split.
        num_classes: labels are in ``[0, num_classes)``; None for any that is not negative.
        on_error: under ``skip`` bad rows are passed over until the first good one.

    Returns:
        The first good sample's input, ``(1, *shape)``: every other one of the split has its shape and type.

    Raises:
        DataError: naming the row and its file, if a label or the first sample is bad; or if no row is good.
        ConfigError: if the transform returns anything but a tensor of floats or of int64.
    """
    if on_error == "stop":
        _check_labels(source, num_classes)
    assembler, reason = Assembler(source, num_classes, None, on_error), ""
    for row, raw in enumerate(source.raw_rows(0, len(source))):
        batch, skipped = assembler.batch([(row, partial(source.decode, raw), None)])
        if batch is not None:
            return batch.inputs
        assembler, reason = Assembler(source, num_classes, None, on_error), reason or skipped[row]
    raise DataError(f"{source.key}: none of its {len(source)} rows can be used. The first: {reason}", row=0)


def _check_labels(source: Source, num_classes: int | None) -> None:
    labels = source.labels()
    if labels is None:
        return
    good = (labels >= 0) & (labels < (np.inf if num_classes is None else num_classes))
    if not good.all():
        row = int(np.argmin(good))
        raw = next(source.raw_rows(row, row + 1))
        Assembler(source, num_classes, None, "stop").batch([(row, partial(source.decode, raw), None)])
        raise DataError(f"{source.where(row)} ({source.key} row {row}): its label changed while it was read", row=row)


def load_batches(
    source: Source,
    rows: range,
    batch_size: int,
    *,
    num_classes: int | None,
    expected_shape: tuple[int, ...] | None = None,
    on_error: OnError = "stop",
    skipped: dict[int, str] | None = None,
    excluded: Mapping[int, str] = MappingProxyType({}),
    pinned: bool = False,
) -> Generator[Batch, None, None]:
    """Yield clean samples in row order, decoded ahead in one thread that ends with this generator.

    Batch ``k`` holds rows from ``rows.start + k · batch_size``: a row left out shortens its own batch only, and a batch
    with nothing left is not yielded.

    Args:
        source: the split.
        rows: which of its rows; step 1.
        batch_size: ``B``.
        num_classes: labels are in ``[0, num_classes)``; None for any that is not negative.
        expected_shape: every input's, from :func:`check_source`; None for that of the first good row of ``rows``.
        on_error: ``stop`` or ``skip``.
        skipped: gets, by row, the reasons for the rows left out of the batches yielded so far.
        excluded: rows that are not even decoded, with the reasons.
        pinned: put inputs and labels where a GPU can fetch them from while it computes.

    Raises:
        DataError: naming the row and its file, at a bad picture, shape, value or label under ``stop``.
        ValueError: if ``rows`` is not within the split or ``batch_size`` is not positive.
    """
    if rows.step != 1 or rows.start < 0 or rows.stop > len(source) or batch_size <= 0:
        raise ValueError(f"{rows} in batches of {batch_size} is not within the {len(source)} rows of {source.key}")
    assembler = Assembler(source, num_classes, expected_shape, on_error)
    made = _in_order(source, rows, batch_size, assembler, excluded, pinned)
    return _deliver(made, {} if skipped is None else skipped)


def _deliver(made: Generator[Made, None, None], skipped: dict[int, str]) -> Generator[Batch, None, None]:
    ahead = prefetch(made)
    try:
        for batch, left_out in ahead:
            skipped.update(left_out)
            if batch is not None:
                yield batch
    finally:
        ahead.close()


def _in_order(
    source: Source, rows: range, batch_size: int, assembler: Assembler, excluded: Mapping[int, str], pinned: bool
) -> Generator[Made, None, None]:
    numbered = zip(rows, source.raw_rows(rows.start, rows.stop), strict=True)
    for start in range(rows.start, rows.stop, batch_size):
        with source.turn:
            part = itertools.islice(numbered, batch_size)
            wanted = ((row, partial(source.decode, raw), None) for row, raw in part if row not in excluded)
            batch, skipped = assembler.batch(wanted)
        if pinned and batch is not None:
            batch = Batch(batch.inputs.pin_memory(), batch.labels.pin_memory(), batch.index)
        left_out = {row: excluded[row] for row in range(start, start + batch_size) if row in excluded}
        yield batch, {**skipped, **left_out}


def training_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_classes: int | None = None,
    expected_shape: tuple[int, ...] | None = None,
    on_error: OnError = "stop",
    skipped: dict[int, str] | None = None,
) -> Generator[Batch, None, None]:
    """Yield batches without end: every row once an epoch, in an order that depends on (seed, epoch) alone.

    The transform's generator is seeded by (seed, epoch, row). Batches run on across epochs, so every one is full; batch
    ``k`` of a generator started at step ``s`` is batch ``s + k`` of one started at 0. The split stays in memory,
    undecoded.

    Args:
        source: the split.
        batch_size: ``B``.
        seed: the run's.
        start_step: how many batches to pass over, for free.
        num_classes: as in :func:`load_batches`.
        expected_shape: as in :func:`load_batches`.
        on_error: ``stop``, or ``skip`` to shorten the batches that a bad row falls in.
        skipped: gets, by row, the reasons for the rows left out.

    Raises:
        DataError: as in :func:`load_batches`; and if ``skip`` leaves nothing of a batch.
        ValueError: if ``batch_size`` is not positive or ``start_step`` is negative.
    """
    if batch_size <= 0 or start_step < 0:
        raise ValueError(f"batch_size {batch_size} must be positive, and start_step {start_step} not negative")
    assembler = Assembler(source, num_classes, expected_shape, on_error)
    made = _shuffled(source, batch_size, seed, start_step, assembler)
    return _deliver(made, {} if skipped is None else skipped)


def _shuffled(
    source: Source, batch_size: int, seed: int, start_step: int, assembler: Assembler
) -> Generator[Made, None, None]:
    requests = _requests(source, seed, start_step * batch_size)
    for step in itertools.count(start_step):
        batch, skipped = assembler.batch(itertools.islice(requests, batch_size))
        if batch is None:  # a step without a batch would shift all that follow
            reason = next(iter(skipped.values()))
            raise DataError(f"{source.key}: no row of training step {step} can be used. The first: {reason}")
        yield batch, skipped


def _requests(source: Source, seed: int, position: int) -> Generator[Request, None, None]:
    read, num_rows, generator = source.random_reader(), len(source), torch.Generator()
    first_epoch, offset = divmod(position, num_rows)
    for epoch in itertools.count(first_epoch):
        seeds = generator_seeds(seed, epoch, num_rows)
        for row in epoch_order(seed, epoch, num_rows)[offset:].tolist():
            yield row, partial(read, row), generator.manual_seed(int(seeds[row]))
        offset = 0
