"""Arrow files of encoded pictures, as Hugging Face's ``datasets`` saves them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fisher_ray.data.pictures import Columns, PictureSource, reading
from fisher_ray.data.source import Transform, select_rows
from fisher_ray.errors import ConfigError, DataError

NAME = "Arrow"
READ_ROWS = 256
"""Rows turned into Python objects at a time."""
HASHED_END_BYTES = 2**20
"""Of each file, what enters the fingerprint from its beginning and from its end."""


class ArrowSource(PictureSource):
    """Rows ``rows`` of ``paths``, counted over the files in order; the files are mapped into memory."""

    def __init__(
        self,
        paths: Sequence[str],
        columns: Columns,
        rows: tuple[int, int] | None,
        key: str,
        transform: Transform | None,
    ) -> None:
        """Map the files.

        Raises:
            ConfigError: if ``rows`` goes beyond the files.
            DataError: if a file is not Arrow's or lacks a column.
            StorageError: if a file cannot be read.
        """
        super().__init__(key, transform)
        self._paths, self._columns = list(paths), columns
        self._tables = [_table(path, columns, key) for path in self._paths]
        self.classes = columns.class_names(self._tables[0].schema)
        self._starts = [0, *itertools.accumulate(table.num_rows for table in self._tables)]
        what = self._paths[0] if len(self._paths) == 1 else f"{self._paths[0]} … {self._paths[-1]}"
        self._rows = select_rows(rows, self._starts[-1], key, what)

    def __len__(self) -> int:
        """Return the number of rows of the split."""
        return len(self._rows)

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and ends, of the rows taken and of their labels."""
        digest = hashlib.sha256(f"arrow {self._rows.start} {self._rows.stop}".encode())
        for path in self._paths:
            with reading(path, self.key, NAME), open(path, "rb") as file:
                digest.update(file.read(HASHED_END_BYTES))
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - HASHED_END_BYTES))
                digest.update(f"\n{os.path.basename(path)} {size}\n".encode() + file.read())
        digest.update(self.labels().astype(np.float64).tobytes())
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """Return the file and the row in it."""
        position = self._rows.start + row
        file = bisect_right(self._starts, position) - 1
        return f"{self._paths[file]} row {position - self._starts[file]}"

    def raw_rows(self, start: int, stop: int) -> Iterator[tuple[bytes | None, int | None]]:
        """Yield ``(encoded picture, label)``."""
        for table in self._parts(start, stop):
            for batch in table.select([self._columns.image, self._columns.label]).to_batches(READ_ROWS):
                yield from self._columns.rows(batch)

    def labels(self) -> np.ndarray:
        """Return the label column."""
        parts = [table.column(self._columns.label).to_numpy() for table in self._parts(0, len(self))]
        return np.concatenate(parts)

    def _parts(self, start: int, stop: int) -> Iterator[Any]:
        first, last = self._rows.start + start, self._rows.start + stop
        for table, begin in zip(self._tables, self._starts, strict=False):
            low, high = max(first - begin, 0), min(last - begin, table.num_rows)
            if low < high:
                yield table.slice(low, high - low)


def saved_files(place: str, key: str) -> list[str]:
    """Return the files of a dataset that ``datasets`` saved in a folder, in order.

    Raises:
        ConfigError: if none lies there, or one of several splits.
        DataError: if its ``state.json`` is damaged.
        StorageError: if it cannot be read.
    """
    if os.path.exists(os.path.join(place, "dataset_dict.json")):
        found = sorted(os.path.dirname(path) for path in glob.glob(f"{glob.escape(place)}/*/state.json"))
        raise ConfigError(f"{key}.path: {place} holds several splits. Give one: {', '.join(found)}.")
    path = os.path.join(place, "state.json")
    if not os.path.exists(path):
        raise ConfigError(
            f"{key}.path: {place} is a folder without state.json. Give the folder that save_to_disk wrote, or a "
            f"pattern, such as {place}/*.arrow."
        )
    with reading(path, key, "JSON"), open(path, "rb") as file:
        text = file.read()
    try:
        names = [entry["filename"] for entry in json.loads(text)["_data_files"]]
        return [os.path.join(place, os.path.basename(name)) for name in names]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{key}: {path} is damaged: {type(error).__name__}: {error}. Save the dataset again."
        ) from error


def _table(path: str, columns: Columns, key: str) -> Any:
    with reading(path, key, NAME):
        mapped = pa.memory_map(path)
        try:
            table = pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:  # `datasets` writes streams
            mapped.seek(0)
            table = pa.ipc.open_stream(mapped).read_all()
    columns.check(table.schema, path, key)
    return table
