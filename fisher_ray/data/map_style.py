"""Any torch map-style data set: ``__len__`` and ``__getitem__`` returning ``(input, label)``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fisher_ray.data.source import Source, Transform, select_rows
from fisher_ray.errors import ConfigError, FisherRayError

NUM_HASHED = 5
"""Samples that enter the fingerprint."""


class MapStyleSource(Source):
    """Rows ``rows`` of a data set."""

    def __init__(
        self, name: str, dataset: Any, rows: tuple[int, int] | None, key: str, transform: Transform | None
    ) -> None:
        """Ask for the length.

        Args:
            name: the factory's, for messages.
            dataset: map-style.
            rows: the split's range, or None for all.
            key: the split's name in the configuration.
            transform: see :class:`Source`.

        Raises:
            ConfigError: if it is not map-style, or ``rows`` goes beyond it.
        """
        super().__init__(key, transform)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ConfigError(
                f"{key}.factory: {name!r} returned {type(dataset).__name__}, which has no __len__ and __getitem__. "
                "Return a map-style data set of (input, label)."
            )
        self._name, self._dataset = name, dataset
        self._rows = select_rows(rows, len(dataset), key, f"the data set of {name!r}")

    def __len__(self) -> int:
        """Return the number of rows of the split."""
        return len(self._rows)

    def fingerprint(self) -> str:
        """Return a digest of the factory's name, the length, the rows taken and a few samples."""
        name = f"map-style {self._name} {len(self._dataset)} {self._rows.start} {self._rows.stop}"
        digest = hashlib.sha256(name.encode())
        for i in np.linspace(0, len(self) - 1, num=min(NUM_HASHED, len(self)), dtype=np.int64).tolist():
            digest.update(_sample_bytes(self, i))
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """Return the data set and the item."""
        return f"{self._name} item {self._rows.start + row}"

    def raw_rows(self, start: int, stop: int) -> Iterator[int]:
        """Yield the items' indices: a data set decodes as it reads."""
        return iter(self._rows[start:stop])

    def decode(self, raw: int) -> tuple[Any, Any]:
        """Return an item's input and label."""
        item = self._dataset[raw]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"the item is {type(item).__name__}, not (input, label)")
        return item[0], item[1]

    def plain(self, decoded: Any) -> Tensor:
        """Return a tensor or array as float32, as it is."""
        if not isinstance(decoded, Tensor | np.ndarray):
            raise ValueError(
                f"the input is {type(decoded).__name__}, not a tensor or array; data.transform can make it one"
            )
        return torch.as_tensor(np.array(decoded) if isinstance(decoded, np.ndarray) else decoded).float()

    def labels(self) -> None:
        """Return None: labels come with decoded items only."""

    def random_reader(self) -> Callable[[int], tuple[Any, Any]]:
        """Index the data set."""
        return lambda row: self.decode(self._rows[row])


def _sample_bytes(source: MapStyleSource, row: int) -> bytes:
    try:
        decoded, label = source.decode(next(source.raw_rows(row, row + 1)))
    except FisherRayError:
        raise
    except Exception as error:  # noqa: BLE001 - a bad row is reported where it is loaded; here it only has to be the same
        return f"\n{type(error).__name__}\n".encode()
    if isinstance(decoded, Image.Image):
        decoded = np.asarray(decoded)
    if not isinstance(decoded, Tensor | np.ndarray):
        return f"\n{type(decoded).__name__} {label}\n".encode()
    array = np.ascontiguousarray(decoded.detach().cpu().numpy() if isinstance(decoded, Tensor) else decoded)
    return f"\n{array.shape} {array.dtype.str} {label}\n".encode() + array.tobytes()
