"""Arrays ``inputs (N, …)`` and ``labels (N,)``: a NumPy archive or folder, or a Zarr group."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fisher_ray.data.source import Source, Transform, select_rows
from fisher_ray.errors import ConfigError, DataError, StorageError

HASHED_WHOLE_BYTES = 64 * 2**20
"""Arrays up to this size enter the fingerprint whole, larger ones by their ends."""
HASHED_END_BYTES = 2**20
READ_BYTES = 64 * 2**20


class Array(Protocol):
    """What is asked of an array: NumPy's, or one read from storage where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length along each axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""

    def __getitem__(self, selection: Any) -> Any:
        """Return the selected values."""


class ArraySource(Source):
    """Rows ``rows`` of two arrays."""

    def __init__(
        self,
        path: str,
        arrays: Mapping[str, Array],
        rows: tuple[int, int] | None,
        key: str,
        transform: Transform | None,
    ) -> None:
        """Check the arrays' shapes and types.

        Args:
            path: where they come from, for messages.
            arrays: has ``inputs`` and ``labels``.
            rows: the split's range, or None for all.
            key: the split's name in the configuration.
            transform: see :class:`Source`.

        Raises:
            ConfigError: if ``rows`` goes beyond the arrays.
            DataError: if an array is missing, or they do not fit together.
        """
        super().__init__(key, transform)
        self._path = path
        self._inputs, self._labels = _checked(arrays, f"{key}: {path}")
        self._rows = select_rows(rows, self._inputs.shape[0], key, path)

    def __len__(self) -> int:
        """Return the number of rows of the split."""
        return len(self._rows)

    def fingerprint(self) -> str:
        """Return a digest of the name, the arrays' shapes, types and values (of large ones: the ends), and the rows."""
        name = os.path.basename(self._path.rstrip("/"))
        digest = hashlib.sha256(f"arrays {name} {self._rows.start} {self._rows.stop}".encode())
        for array in (self._inputs, self._labels):
            digest.update(f"\n{list(array.shape)} {array.dtype.str}\n".encode())
            for part in _identifying_parts(array):
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """Return the place and the row in it."""
        return f"{self._path} row {self._rows.start + row}"

    def raw_rows(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield ``(input, label)``, reading whole chunks where the array has them."""
        step = _block_rows(self._inputs)
        position, last = self._rows.start + start, self._rows.start + stop
        while position < last:
            end = min((position // step + 1) * step, last)
            inputs, labels = self._inputs[position:end], self._labels[position:end]
            yield from zip(inputs, labels, strict=True)
            position = end

    def decode(self, raw: tuple[np.ndarray, Any]) -> tuple[np.ndarray, Any]:
        """Return a copy of the input that may be written to, and the label."""
        return np.array(raw[0]), raw[1]

    def plain(self, decoded: np.ndarray) -> Tensor:
        """Return the values as float32, as they are."""
        return torch.from_numpy(np.asarray(decoded, dtype=np.float32))

    def labels(self) -> np.ndarray:
        """Read the labels."""
        return np.asarray(self._labels[self._rows.start : self._rows.stop])

    def random_reader(self) -> Callable[[int], tuple[Any, Any]]:
        """Index NumPy's arrays where they lie; others are read into memory."""
        inputs, labels, first = self._inputs, self._labels, self._rows.start
        if not isinstance(inputs, np.ndarray):
            return super().random_reader()
        return lambda row: self.decode((inputs[first + row], labels[first + row]))


def load_numpy(path: str, key: str) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` file, or of a folder's ``inputs.npy`` and ``labels.npy``, mapped into memory.

    Raises:
        ConfigError: if there is no such file.
        DataError: if it is not what its name says.
        StorageError: if it cannot be read.
    """
    if os.path.isdir(path):
        files = {name: os.path.join(path, f"{name}.npy") for name in ("inputs", "labels")}
        return {name: _map_array(file, key) for name, file in files.items()}
    with _reading(path, key), open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ConfigError(
                f"{key}.path: {path} is one array. Give an .npz file with the arrays 'inputs' and 'labels', "
                "or a folder with inputs.npy and labels.npy."
            )
        with archive:
            return {name: np.asarray(archive[name]) for name in ("inputs", "labels") if name in archive}


def _map_array(path: str, key: str) -> np.ndarray:
    with _reading(path, key):
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))


@contextlib.contextmanager
def _reading(path: str, key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{key}.path: there is no file {path}. Correct the path, or data.root.") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{key}: {path} is not NumPy's format without pickles: {error}. Write it again.") from error
    except OSError as error:
        raise StorageError(f"{key}: {path} cannot be read: {error}. Make it readable, then run again.") from error


def _checked(arrays: Mapping[str, Array], what: str) -> tuple[Array, Array]:
    if missing := [name for name in ("inputs", "labels") if name not in arrays]:
        raise DataError(f"{what} has no array {' or '.join(map(repr, missing))}. Write 'inputs' and 'labels'.")
    inputs, labels = arrays["inputs"], arrays["labels"]
    if labels.dtype.kind not in "iu" or len(labels.shape) != 1:
        raise DataError(f"{what}: 'labels' is {labels.dtype} of shape {labels.shape}. Write integers of shape (N,).")
    if inputs.dtype.kind not in "biuf" or not inputs.shape or inputs.shape[0] != labels.shape[0]:
        raise DataError(
            f"{what}: 'inputs' is {inputs.dtype} of shape {inputs.shape}, 'labels' has shape {labels.shape}. "
            "Write numbers of shape (N, …), one row for each label."
        )
    return inputs, labels


def _row_bytes(array: Array) -> int:
    return max(1, array.dtype.itemsize * math.prod(array.shape[1:]))


def _block_rows(array: Array) -> int:
    chunks = getattr(array, "chunks", None)
    return int(chunks[0]) if chunks else max(1, READ_BYTES // _row_bytes(array))


def _identifying_parts(array: Array) -> Iterator[Any]:
    rows = max(1, HASHED_END_BYTES // _row_bytes(array))
    if _row_bytes(array) * array.shape[0] <= HASHED_WHOLE_BYTES:
        yield array[:]
    else:
        yield array[:rows]
        yield array[-rows:]
