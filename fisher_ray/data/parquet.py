"""Parquet files of encoded pictures."""

from __future__ import annotations

import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fisher_ray.data.pictures import Columns, PictureSource, reading
from fisher_ray.data.ranges import file_size, open_file
from fisher_ray.data.source import Transform, select_rows

NAME = "Parquet"
READ_ROWS = 256
"""Rows of a row group turned into Python objects at a time."""
_FOOTER_TAIL_BYTES = 8


class ParquetSource(PictureSource):
    """Rows ``rows`` of ``paths``, counted over the files in order."""

    def __init__(
        self,
        paths: Sequence[str],
        columns: Columns,
        rows: tuple[int, int] | None,
        key: str,
        transform: Transform | None,
    ) -> None:
        """Read the files' footers.

        Raises:
            ConfigError: if ``rows`` goes beyond the files.
            DataError: if a file is not Parquet or lacks a column.
            StorageError: if a file cannot be read.
        """
        super().__init__(key, transform)
        self._paths = list(paths)
        self._footers = [_footer(path, key) for path in self._paths]
        self._columns = columns
        for path, footer in self._files():
            columns.check(footer.schema.to_arrow_schema(), path, key)
        self.classes = columns.class_names(self._footers[0].schema.to_arrow_schema())
        self._starts = [0, *itertools.accumulate(int(footer.num_rows) for footer in self._footers)]
        what = self._paths[0] if len(self._paths) == 1 else f"{self._paths[0]} … {self._paths[-1]}"
        self._rows = select_rows(rows, self._starts[-1], key, what)

    def _files(self) -> Iterator[tuple[str, Any]]:
        return zip(self._paths, self._footers, strict=True)

    def __len__(self) -> int:
        """Return the number of rows of the split."""
        return len(self._rows)

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and footers, and of the rows taken."""
        digest = hashlib.sha256(f"parquet {self._rows.start} {self._rows.stop}".encode())
        for path in self._paths:
            footer = _footer_bytes(path, self.key)
            with reading(path, self.key, NAME):
                size = file_size(path)
            digest.update(f"\n{os.path.basename(path)} {size} {len(footer)}\n".encode())
            digest.update(footer)
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """Return the file and the row in it."""
        file, offset = self._locate(row)
        return f"{self._paths[file]} row {offset}"

    def _locate(self, row: int) -> tuple[int, int]:
        position = self._rows.start + row
        file = bisect_right(self._starts, position) - 1
        return file, position - self._starts[file]

    def raw_rows(self, start: int, stop: int) -> Iterator[tuple[bytes | None, int | None]]:
        """Yield ``(encoded picture, label)``; only the row groups that hold the rows are read."""
        for batch in self._read(start, stop, images=True):
            yield from self._columns.rows(batch)

    def _read(self, start: int, stop: int, *, images: bool) -> Iterator[Any]:
        """Yield record batches that hold exactly the split's rows ``[start, stop)``."""
        first, last = self._rows.start + start, self._rows.start + stop
        for i, (path, footer) in enumerate(self._files()):
            begin, end = max(first - self._starts[i], 0), min(last - self._starts[i], int(footer.num_rows))
            if begin >= end:
                continue
            columns = [self._columns.label]
            if images:
                nested = self._columns.is_nested(footer.schema.to_arrow_schema())
                columns.append(f"{self._columns.image}.bytes" if nested else self._columns.image)
            with (
                reading(path, self.key, NAME),
                open_file(path) as stored,
                pq.ParquetFile(stored, metadata=footer) as file,
            ):
                yield from _read_file(file, begin, end, columns)

    def labels(self) -> np.ndarray:
        """Read the label column alone."""
        parts = (batch.column(self._columns.label) for batch in self._read(0, len(self), images=False))
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts])


def _read_file(file: Any, begin: int, end: int, columns: list[str]) -> Iterator[Any]:
    position = 0
    for group in range(file.metadata.num_row_groups):
        num_rows = int(file.metadata.row_group(group).num_rows)
        if position + num_rows > begin and position < end:
            yield from _read_group(file, group, range(begin - position, end - position), columns)
        position += num_rows


def _read_group(file: Any, group: int, wanted: range, columns: list[str]) -> Iterator[Any]:
    position = 0
    for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=columns, use_threads=False):
        begin, end = max(wanted.start - position, 0), min(wanted.stop - position, batch.num_rows)
        if begin < end:
            yield batch.slice(begin, end - begin)
        position += batch.num_rows
        if position >= wanted.stop:
            return


def _footer(path: str, key: str) -> Any:
    with reading(path, key, NAME), open_file(path) as file:
        return pq.read_metadata(file)


def _footer_bytes(path: str, key: str) -> bytes:
    with reading(path, key, NAME), open_file(path) as file:
        file.seek(-_FOOTER_TAIL_BYTES, os.SEEK_END)
        num_bytes = int.from_bytes(file.read(4), "little")
        file.seek(-_FOOTER_TAIL_BYTES - num_bytes, os.SEEK_END)
        return file.read(num_bytes)
