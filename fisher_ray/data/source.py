"""What every source of samples can do, whatever holds its rows."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import ConfigError

Transform: TypeAlias = Callable[[Any, torch.Generator | None], Tensor]
"""``transform(image, generator)``: a float tensor; ``generator`` is None for a clean sample."""


class Source(ABC):
    """One split's rows, read where they lie; opened anew in every process, and cheap to open.

    Attributes:
        key: the configuration's name of the split, such as ``data.shallow``.
        classes: the labels' names, where the source has them.
        transform: what makes a tensor of a decoded input, or None for the format's own way.
        turn: held while a batch is read and decoded, since users' data sets and transforms need not be thread-safe.
    """

    def __init__(self, key: str, transform: Transform | None) -> None:
        """Remember what all sources share."""
        self.key, self.transform, self.turn = key, transform, threading.Lock()
        self.classes: tuple[str, ...] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows of the split."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hex digest of the rows' identity, cheap to make, the same wherever the files lie."""

    @abstractmethod
    def where(self, row: int) -> str:
        """Return the file and the row in it that hold the split's ``row``, for messages."""

    @abstractmethod
    def raw_rows(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the undecoded rows of ``[start, stop)`` in order; only what is needed is read."""

    @abstractmethod
    def decode(self, raw: Any) -> tuple[Any, Any]:
        """Return a raw row's input (picture, array or tensor) and label; any exception means a bad row."""

    @abstractmethod
    def plain(self, decoded: Any) -> Tensor:
        """Return a decoded input as a tensor, without a transform."""

    @abstractmethod
    def labels(self) -> np.ndarray | None:
        """Return all labels ``(N,)``, NaN for one that is missing; None if that would mean decoding every row."""

    def random_reader(self) -> Callable[[int], tuple[Any, Any]]:
        """Return a function from a row to its decoded input and label, fast in any order.

        Here the undecoded rows are kept in memory.
        """
        raws = list(self.raw_rows(0, len(self)))
        return lambda row: self.decode(raws[row])


def select_rows(wanted: tuple[int, int] | None, num_rows: int, key: str, what: str) -> range:
    """Return the rows of ``what``, which has ``num_rows``, that the split ``key`` takes.

    Raises:
        ConfigError: if there are none or ``wanted`` goes beyond the last.
    """
    if num_rows == 0:
        raise ConfigError(f"{key}: {what} has no rows. Give a path with at least one row.")
    start, stop = wanted if wanted is not None else (0, num_rows)
    if stop > num_rows:
        raise ConfigError(
            f"{key}.rows [{start}, {stop}) goes beyond {what}, which has {num_rows} rows. "
            f"Give a range within [0, {num_rows}]."
        )
    return range(start, stop)
