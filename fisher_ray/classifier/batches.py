"""Data given in this process, as micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fisher_ray.data import Source, load_batches
from fisher_ray.errors import RequestError
from fisher_ray.records import Batch

Data = Tensor | Source | Iterable[Any]
MICRO_BATCH = 64


def batches(data: Data, labels: str, like: Tensor, likelihood: object) -> Iterator[Batch]:
    """Yield the micro-batches of ``data``, rows numbered from 0."""
    if isinstance(data, Source):
        for batch in load_batches(data, range(len(data)), MICRO_BATCH, num_classes=None):
            yield Batch(to_like(batch.inputs, like), batch.labels.to(like.device), batch.index)
        return
    start = 0
    for item in [data] if isinstance(data, Tensor) else data:
        inputs, targets = _inputs_and_labels(item)
        if targets is not None and likelihood == "softmax":
            check_integers(targets)
        if targets is None and likelihood == "next_token":
            targets = inputs
        if targets is None and labels == "true":
            raise RequestError("labels 'true' needs batches of (inputs, labels); these are inputs alone")
        for place in range(0, len(inputs), MICRO_BATCH):
            part = slice(place, place + MICRO_BATCH)
            yield as_batch(inputs[part], None if targets is None else targets[part], like, start)
            start += len(inputs[part])


def _inputs_and_labels(item: Any) -> tuple[Tensor, Tensor | None]:
    parts = [item] if isinstance(item, Tensor) else list(item) if isinstance(item, tuple | list) else []
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
        given = f"{type(item).__name__} of {', '.join(type(part).__name__ for part in parts)}" if parts else type(item)
        raise RequestError(
            f"a batch of data is {given}. Give a tensor of inputs, or a pair of tensors (inputs, labels)."
        )
    return parts[0], parts[1] if len(parts) == 2 else None


def check_integers(labels: Tensor) -> None:
    """Refuse labels that are no integers.

    Raises:
        RequestError: if they are not.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RequestError(f"labels are {labels.dtype}. Give integers.")


def check_data(data: Any) -> None:
    """Refuse what cannot be read twice as batches.

    Raises:
        RequestError: if it cannot.
    """
    if isinstance(data, Iterator):
        raise RequestError("data can be read only once, and is needed twice. Give a tensor, a list or a data loader.")
    if not isinstance(data, Source | Iterable):
        raise RequestError(f"data is {type(data).__name__}. Give a tensor, an iterable of batches or a source.")


def as_batch(inputs: Tensor, labels: Tensor | None, like: Tensor, start: int = 0) -> Batch:
    """Return a batch of rows numbered from ``start``, on the device of ``like`` and, unless integers, in its dtype.

    Labels that are no integers are float32 at least.
    """
    index = torch.arange(start, start + len(inputs))
    labels = torch.zeros(len(inputs), dtype=torch.int64) if labels is None else labels
    labels = labels if labels.is_floating_point() else labels.long()
    targets = to_like(labels, like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32)))
    return Batch(to_like(inputs, like), targets, index)


def to_like(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` on the device of ``like``, and in its dtype if it is of floating-point numbers."""
    return value.to(like) if value.is_floating_point() else value.to(like.device)
