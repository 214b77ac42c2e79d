"""Micro-batches in halves, where memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from fisher_ray.errors import MemoryExhaustedError
from fisher_ray.gradients import is_out_of_memory
from fisher_ray.records import Batch

Made = TypeVar("Made")
_LOG = logging.getLogger(__name__)


class Halvings:
    """Makes something of batches, and of a batch's halves where memory runs out, and theirs, down to one sample.

    Attributes:
        count: how often a batch was cut.
    """

    def __init__(self) -> None:
        """See the class."""
        self.count = 0

    def each(self, batch: Batch, make: Callable[[Batch], Made], use: Callable[[Made], object]) -> None:
        """Make something of a batch and use it; or of its parts, one after the other, in the rows' order.

        Args:
            batch: one sample or more.
            make: tried again on fewer samples where memory runs out, so it must add to nothing.
            use: called once with what is made of each part, and never tried again.

        Raises:
            MemoryExhaustedError: if there is not enough memory for one sample by itself.
        """
        found: list[Made] = []
        try:
            found.append(make(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.inputs) == 1:
                raise _exhausted(batch, error) from error
        if found:
            use(found.pop())
            return
        # Behind the except clause, where the error holds on to none of the tensors any more.
        self.count += 1
        halves = _halves(batch)
        first, last, sizes = int(batch.index[0]), int(batch.index[-1]), [len(half.inputs) for half in halves]
        _LOG.warning("rows %d to %d: out of memory for %d samples; tried as %d and %d", first, last, sum(sizes), *sizes)
        gc.collect()
        if batch.inputs.is_cuda:
            torch.cuda.empty_cache()
        for half in halves:
            self.each(half, make, use)


def _halves(batch: Batch) -> list[Batch]:
    size = len(batch.inputs)
    parts = (slice(0, size // 2), slice(size // 2, size))
    return [Batch(batch.inputs[part], batch.labels[part], batch.index[part]) for part in parts]


def _exhausted(batch: Batch, error: BaseException) -> MemoryExhaustedError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return MemoryExhaustedError(
        f"row {int(batch.index[0])}: there is not enough memory for the scores of one sample ({lines[0]}). Have more, "
        "or fewer workers on a machine, and run again: a run resumes. Or start anew with fewer parameters "
        "(scores.parameters), one label (scores.labels) or buckets of classes (scores.class_buckets)."
    )
