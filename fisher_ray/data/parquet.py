"""Parquet files of encoded pictures: columns ``image`` (bytes, or a struct with ``bytes``) and ``label`` (integer)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from fisher_ray.data.ranges import file_size, open_file
from fisher_ray.data.source import Source, Transform, select_rows
from fisher_ray.errors import DataError, StorageError

READ_ROWS = 256
"""Rows of a row group turned into Python objects at a time."""
DECODED_BYTES = 512 * 2**20
"""Memory that decoded pictures may take while a network is trained."""
_FOOTER_TAIL_BYTES = 8


class ParquetSource(Source):
    """Rows ``rows`` of ``paths``, counted over the files in order."""

    def __init__(
        self, paths: Sequence[str], rows: tuple[int, int] | None, key: str, transform: Transform | None
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
        self._columns = [_columns(footer.schema.to_arrow_schema(), path, key) for path, footer in self._files()]
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
            with _reading(path, self.key):
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
            images = batch.column("image")
            if pa.types.is_struct(images.type):
                images = images.flatten()[0]  # unlike field(): a null struct's bytes are null too
            yield from zip(images.to_pylist(), batch.column("label").to_pylist(), strict=True)

    def _read(self, start: int, stop: int, *, images: bool) -> Iterator[Any]:
        """Yield record batches that hold exactly the split's rows ``[start, stop)``."""
        first, last = self._rows.start + start, self._rows.start + stop
        for i, (path, footer) in enumerate(self._files()):
            begin, end = max(first - self._starts[i], 0), min(last - self._starts[i], int(footer.num_rows))
            if begin >= end:
                continue
            columns = [self._columns[i], "label"] if images else ["label"]
            with _reading(path, self.key), open_file(path) as stored, pq.ParquetFile(stored, metadata=footer) as file:
                yield from _read_file(file, begin, end, columns)

    def decode(self, raw: tuple[bytes | None, int | None]) -> tuple[Image.Image, int | None]:
        """Return the picture, fully decoded, and the label."""
        encoded, label = raw
        if encoded is None:
            raise ValueError("the row has no picture (null bytes)")
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return image, label

    def plain(self, decoded: Image.Image) -> Tensor:
        """Return the picture as RGB in [0, 1], ``(3, H, W)``."""
        pixels = np.asarray(decoded.convert("RGB")).transpose(2, 0, 1).astype(np.float32, order="C")
        return torch.from_numpy(pixels / np.float32(255))

    def labels(self) -> np.ndarray:
        """Read the label column alone."""
        parts = (batch.column("label") for batch in self._read(0, len(self), images=False))
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts])

    def random_reader(self) -> Callable[[int], tuple[Any, Any]]:
        """Keep the encoded pictures, and as many decoded ones as ``DECODED_BYTES`` holds."""
        raws, decoded, room = list(self.raw_rows(0, len(self))), dict[int, Image.Image](), DECODED_BYTES

        def read(row: int) -> tuple[Image.Image, int | None]:
            nonlocal room
            if row in decoded:
                return decoded[row].copy(), raws[row][1]  # a transform may draw on what it gets
            image, label = self.decode(raws[row])
            num_bytes = 4 * image.width * image.height
            if num_bytes <= room:
                room -= num_bytes
                decoded[row] = image.copy()
            return image, label

        return read


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
    with _reading(path, key), open_file(path) as file:
        return pq.read_metadata(file)


def _footer_bytes(path: str, key: str) -> bytes:
    with _reading(path, key), open_file(path) as file:
        file.seek(-_FOOTER_TAIL_BYTES, os.SEEK_END)
        num_bytes = int.from_bytes(file.read(4), "little")
        file.seek(-_FOOTER_TAIL_BYTES - num_bytes, os.SEEK_END)
        return file.read(num_bytes)


@contextlib.contextmanager
def _reading(path: str, key: str) -> Iterator[None]:
    """Tell a file that cannot be reached (try again) from one that is not what it should be."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            message = f"{key}: {path} cannot be read: {os.strerror(error.errno)}. Make it readable, then run again."
            raise StorageError(message) from error
        raise DataError(
            f"{key}: {path} is not a sound Parquet file: {type(error).__name__}: {error}. Write it again."
        ) from error


def _columns(schema: Any, path: str, key: str) -> str:
    """Check the columns, and return the name under which the pictures' bytes are read."""
    if missing := {"image", "label"} - set(schema.names):
        raise DataError(
            f"{key}: {path} has no column {', '.join(map(repr, sorted(missing)))}; its columns are "
            f"{', '.join(map(repr, schema.names))}. Write the pictures as 'image' and the classes as 'label'."
        )
    image, label = schema.field("image").type, schema.field("label").type
    if not pa.types.is_integer(label):
        raise DataError(f"{key}: {path}: column 'label' is {label}. Write integers from 0.")
    if _is_bytes(image):
        return "image"
    if pa.types.is_struct(image) and any(field.name == "bytes" and _is_bytes(field.type) for field in image):
        return "image.bytes"
    raise DataError(
        f"{key}: {path}: column 'image' is {image}. Write encoded pictures (JPEG, PNG) as binary, "
        "or as a struct with a binary field 'bytes'."
    )


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
