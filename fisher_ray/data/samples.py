"""From rows to checked batches: a bad row is named, or left out."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fisher_ray.data.source import Source
from fisher_ray.errors import ConfigError, DataError, FisherRayError
from fisher_ray.records import Batch

OnError: TypeAlias = Literal["stop", "skip"]
Request: TypeAlias = tuple[int, Callable[[], tuple[Any, Any]], torch.Generator | None]
"""A row, what decodes it, and the transform's generator."""


class _BadSampleError(Exception):
    def __init__(self, row: int, reason: str) -> None:
        super().__init__(row, reason)
        self.row, self.reason = row, reason


class Assembler:
    """Makes batches of one source's rows, and holds every sample to the same rules.

    Attributes:
        shape: what every input must have; where it was not given, the first input's.
    """

    def __init__(
        self, source: Source, num_classes: int | None, expected_shape: tuple[int, ...] | None, on_error: OnError
    ) -> None:
        """Remember the rules.

        Args:
            source: where the rows come from.
            num_classes: labels are in ``[0, num_classes)``; None for any that is not negative.
            expected_shape: every input's, or None for the first one's.
            on_error: ``stop`` raises at the first bad sample, ``skip`` leaves it out.
        """
        self._source, self._num_classes, self._on_error = source, num_classes, on_error
        self.shape = tuple(expected_shape) if expected_shape is not None else None
        self._dtype: torch.dtype | None = None

    def batch(self, requests: Iterable[Request]) -> tuple[Batch | None, dict[int, str]]:
        """Return the good samples, None if there are none, and the reasons for the rows left out.

        Raises:
            DataError: at a bad sample, under ``stop``.
            ConfigError: if the transform returns anything but a tensor of floats or of int64.
        """
        skipped: dict[int, str] = {}
        good: list[tuple[int, Tensor, int]] = []
        for row, decode, generator in requests:
            with self._leaving_out(skipped):
                good.append((row, *self._sample(row, decode, generator)))
        if not good:
            return None, skipped
        rows, inputs, labels = zip(*good, strict=True)
        batch = Batch(torch.stack(inputs), torch.tensor(labels), torch.tensor(rows))
        return self._finite(batch, skipped), skipped

    @contextlib.contextmanager
    def _leaving_out(self, skipped: dict[int, str]) -> Iterator[None]:
        try:
            yield
        except _BadSampleError as bad:
            if self._on_error != "skip":
                advice = "Correct the row, or leave such rows out with data.on_error: skip."
                raise DataError(f"{bad.reason}. {advice}", row=bad.row) from bad.__cause__
            skipped[bad.row] = bad.reason

    def _sample(
        self, row: int, decode: Callable[[], tuple[Any, Any]], generator: torch.Generator | None
    ) -> tuple[Tensor, int]:
        doing = "cannot be decoded"
        try:
            decoded, label = decode()
            doing = "data.transform failed"
            x = self._tensor(decoded, generator)
            doing = "has a wrong label"
            label = check_label(label, self._num_classes)
        except (FisherRayError, MemoryError):  # says already whose fault it is
            raise
        except Exception as error:
            raise self._bad(row, f"{doing}: {_describe(error)}") from error
        if self.shape is None:
            self.shape = tuple(x.shape)
        if x.shape != self.shape:
            raise self._bad(row, f"has an input of shape {tuple(x.shape)}, the split's is {self.shape}")
        if self._dtype is None:
            self._dtype = x.dtype
        if x.dtype != self._dtype:
            raise self._bad(row, f"has an input of {x.dtype}, others of {self._dtype}")
        return x, label

    def _tensor(self, decoded: Any, generator: torch.Generator | None) -> Tensor:
        transform = self._source.transform
        if transform is None:
            return self._source.plain(decoded)
        x = transform(decoded, generator)
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.int64):
            given = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"data.transform returned {given}. Return a torch.Tensor of floats, or int64 of tokens.")
        return x.detach() if x.dtype == torch.int64 else x.detach().float()

    def _finite(self, batch: Batch, skipped: dict[int, str]) -> Batch | None:
        finite = torch.isfinite(batch.inputs)
        if bool(finite.all()):  # one test a batch: cheaper than one a sample
            return batch
        good = finite.reshape(len(finite), -1).all(dim=1)
        for row in batch.index[~good].tolist():
            with self._leaving_out(skipped):
                raise self._bad(row, "has an input with NaN or infinity")
        return Batch(batch.inputs[good], batch.labels[good], batch.index[good]) if bool(good.any()) else None

    def _bad(self, row: int, what: str) -> _BadSampleError:
        return _BadSampleError(row, f"{self._source.where(row)} ({self._source.key} row {row}) {what}")


def check_label(label: Any, num_classes: int | None) -> int:
    """Return ``label`` as an int.

    Raises:
        ValueError: if it is not an integer, or not in ``[0, num_classes)``.
    """
    if label is None:
        raise ValueError("there is none (null)")
    if isinstance(label, bool) or getattr(label, "dtype", None) == torch.bool:
        raise ValueError(f"{label!r} is not an integer")
    try:
        value = operator.index(label)
    except TypeError:
        raise ValueError(f"{label!r} is not an integer") from None
    if value < 0 or (num_classes is not None and value >= num_classes):
        raise ValueError(f"{value} is not in [0, {'∞' if num_classes is None else num_classes})")
    return value


def _describe(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
