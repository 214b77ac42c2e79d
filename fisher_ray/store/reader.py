"""Reading a sealed feature store: ranges of rows, with every chunk's checksum, never a value that was not written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fisher_ray.errors import StoreError
from fisher_ray.prefetch import prefetch
from fisher_ray.storage import Storage
from fisher_ray.store.batches import Batches
from fisher_ray.store.bfloat import from_bfloat16
from fisher_ray.store.chunks import is_plain, read_chunk, read_file
from fisher_ray.store.documents import each, read_layouts, read_sealed
from fisher_ray.store.halves import multiply_from_half
from fisher_ray.store.layout import BFLOAT16, SEAL, Layout, unit_rows
from fisher_ray.store.seal import finished_manifests, totals_of


def open_features(url: str, allow_partial: bool = False) -> FeatureStore:
    """Open a feature store for reading.

    ``allow_partial`` takes one without its seal too; which rows are there, :attr:`FeatureStore.finished_rows` says.

    Raises:
        StoreError: if there is none, it is not sealed, or its metadata changed since.
        StorageError: if storage does not answer.
    """
    storage = Storage(url)
    own, attributes, sealed = read_sealed(storage)
    if own["kind"] != "features":
        raise StoreError(f"{url} is a group of {own['kind']}, not a feature store. Check the URL.")
    if sealed is None and not allow_partial:
        raise StoreError(f"{url} has no {SEAL}: its writers did not end. Run the job again; it goes on from there.")
    return FeatureStore(storage, own, attributes, sealed)


class FeatureStore:
    """A feature store, open for reading; travels to other processes.

    Attributes:
        url: where it is.
        attributes: as given to ``create_store``.
        num_rows: rows of every array, those skipped counted.
        chunk_rows: rows of one chunk: reads that start and end on chunks are the quickest.
        arrays: the layouts (shape, dtype, dims, scale) by name.
    """

    def __init__(
        self, storage: Storage, own: dict[str, Any], attributes: dict[str, Any], sealed: dict[str, Any] | None
    ) -> None:
        """Use :func:`open_features`."""
        self._storage, self._sealed = storage, sealed
        self.url, self.attributes = storage.url, attributes
        self.arrays: dict[str, Layout] = read_layouts(own)
        self.num_rows: int = own["num_rows"]
        self._unit_rows: int = own["unit_rows"]
        self.chunk_rows: int = next(iter(self.arrays.values())).chunk_rows

    @cached_property
    def _manifests(self) -> dict[int, dict[str, Any]]:
        return finished_manifests(self._storage)

    @cached_property
    def finished_rows(self) -> list[range]:
        """Consecutive rows that are there: all of a sealed store; without its seal, those of its finished units."""
        if self._sealed is not None:
            return [range(self.num_rows)]
        found: list[range] = []
        for unit in self._manifests:
            rows = unit_rows(unit, self._unit_rows, self.num_rows)
            if found and found[-1].stop == rows.start:
                rows = range(found.pop().start, rows.stop)
            found.append(rows)
        return found

    @cached_property
    def chunks(self) -> np.ndarray:
        """The chunks of :attr:`finished_rows`, int64."""
        size = self.chunk_rows  # a unit has whole chunks
        spans = [np.arange(rows.start // size, -(-rows.stop // size)) for rows in self.finished_rows]
        return np.concatenate(spans) if spans else np.arange(0)

    @cached_property
    def skipped(self) -> dict[int, str]:
        """Why a row is missing, by row; of a store without its seal, as far as its units are finished."""
        if self._sealed is not None:
            return {int(row): str(reason) for row, reason in self._sealed["skipped"].items()}
        skipped = totals_of(self._manifests)["skipped"]
        return {int(row): str(reason) for row, reason in skipped.items()}

    @cached_property
    def _skipped_in(self) -> dict[int, list[int]]:
        """Skipped rows by chunk."""
        found: dict[int, list[int]] = {}
        for row in sorted(self.skipped):
            found.setdefault(row // self.chunk_rows, []).append(row)
        return found

    def layout(self, name: str) -> Layout:
        """Return how an array is stored.

        Raises:
            StoreError: if there is none of this name.
        """
        if name not in self.arrays:
            raise StoreError(f"{self.url} has no array {name!r}, only {', '.join(self.arrays)}")
        return self.arrays[name]

    def read(self, name: str, start: int, stop: int, out_dtype: DTypeLike | None = None) -> np.ndarray:
        """Return rows ``[start, stop)`` in their own unit, shape ``(stop - start, *shape_tail)``.

        float16 and bfloat16 become float32, others stay, unless ``out_dtype`` says otherwise. Skipped rows are NaN, or
        -1.

        Raises:
            StoreError: if there is no such array or row, floating-point numbers are asked for as others, or a chunk is
                missing or corrupt.
            StorageError: if storage does not answer.
        """
        layout = self.layout(name)
        dtype = self._read_dtype(layout) if out_dtype is None else np.dtype(out_dtype)
        if self._read_dtype(layout).kind == "f" and dtype.kind != "f":
            raise StoreError(f"array {name!r} holds {layout.dtype}: read it as a floating-point type, not as {dtype}")
        return self._read(layout, start, stop, dtype, layout.scale)

    def read_raw(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows ``[start, stop)`` as they are stored: not scaled back, bfloat16 as uint16. Errors as above."""
        layout = self.layout(name)
        return self._read(layout, start, stop, layout.stored_dtype, 1.0)

    def iter_chunks(self, names: Sequence[str], rows: range | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield the arrays ``names`` a chunk at a time, in row order, without skipped rows, one chunk read ahead.

        Of a store without its seal, only what is finished comes.

        Errors as :meth:`read`.
        """
        rows = range(self.num_rows) if rows is None else rows
        if rows.step != 1:
            raise StoreError(f"rows {rows} have a step. Give consecutive rows.")
        low, high = np.searchsorted(self.chunks, [rows.start // self.chunk_rows, -(-rows.stop // self.chunk_rows)])
        cuts = (chunk * self.chunk_rows for chunk in self.chunks[low:high].tolist())
        spans = ((max(cut, rows.start), min(cut + self.chunk_rows, rows.stop)) for cut in cuts)
        with closing(prefetch((self.read_kept(names, *span) for span in spans), depth=1)) as blocks:
            yield from (block for block in blocks if all(len(values) for values in block.values()))

    def iter_batches(self, batch_size: int, names: Sequence[str] = ("features", "labels"), **options: Any) -> Batches:
        """Return an iterable of batches, shuffled, for one of several readers, or resumed as ``options`` say.

        They are those of :class:`~fisher_ray.store.batches.Batches`, which says what raises: ``shuffle``, ``seed``,
        ``epoch``, ``buffer_rows``, ``rank``, ``world_size``, ``start``, ``drop_last``, ``only``.
        """
        return Batches(self, batch_size, names, **options)

    def row_bytes(self, name: str) -> int:
        """Return the bytes of one row of an array as :meth:`read` returns it."""
        layout = self.layout(name)
        return math.prod(layout.shape[1:]) * self._read_dtype(layout).itemsize

    @property
    def num_chunks(self) -> int:
        """Chunks of every array."""
        return -(-self.num_rows // self.chunk_rows)

    def rows(self, chunk: int) -> range:
        """Return the rows of a chunk."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.num_rows))

    def num_kept(self, chunk: int) -> int:
        """Return how many rows of a chunk were not skipped."""
        return len(self.rows(chunk)) - len(self._skipped_in.get(chunk, []))

    def kept_rows(self, chunk: int) -> np.ndarray:
        """Return the rows of a chunk that were not skipped, int64."""
        rows = self.rows(chunk)
        return np.setdiff1d(np.arange(rows.start, rows.stop), self._skipped_in.get(chunk, []), assume_unique=True)

    def read_kept(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Return rows ``[start, stop)`` of several arrays without the skipped ones. Errors as :meth:`read`."""
        block = {name: self.read(name, start, stop) for name in names}
        chunks = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
        gone = [row - start for chunk in chunks for row in self._skipped_in.get(chunk, []) if start <= row < stop]
        return {name: np.delete(values, gone, axis=0) for name, values in block.items()} if gone else block

    def _read_dtype(self, layout: Layout) -> np.dtype[Any]:
        return np.dtype(np.float32 if layout.dtype in ("float16", BFLOAT16) else layout.dtype)

    def _read(self, layout: Layout, start: int, stop: int, dtype: np.dtype[Any], scale: float) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_rows:
            raise StoreError(f"{self.url}: rows [{start}, {stop}) are not within the store's {self.num_rows} rows")
        some = layout.num_chunks and start < stop
        chunks = range(start // layout.chunk_rows, -(-stop // layout.chunk_rows)) if some else range(0)
        size = layout.chunks_a_file
        if len(chunks) == 1 and scale == 1.0 and dtype == layout.stored_dtype:
            first = chunks[0] * layout.chunk_rows
            stored = read_file(self._storage, layout, chunks[0] // size, chunks)[0][start - first : stop - first]
            return stored if stored.flags.writeable else stored.copy()  # the quickest way: nothing is moved
        out = np.empty((stop - start, *layout.shape[1:]), dtype)
        files = range(chunks.start // size, -(-chunks.stop // size))
        each(self._storage, partial(_copy_file, self._storage, layout, out, start, scale, chunks), files)
        return out


def _copy_file(
    storage: Storage, layout: Layout, out: np.ndarray, start: int, scale: float, wanted: range, file: int
) -> None:
    held = layout.chunks(file)
    chunks = range(max(held.start, wanted.start), min(held.stop, wanted.stop))
    first, size = file * layout.chunk_rows, layout.chunk_rows
    whole = first >= start and first + size <= start + len(out)
    if whole and is_plain(layout) and scale == 1.0 and out.dtype == layout.stored_dtype.newbyteorder("<"):
        read_chunk(storage, layout, file, out[first - start : first - start + size].reshape(-1).view(np.uint8))
        return
    for chunk, stored in zip(chunks, read_file(storage, layout, file, chunks), strict=True):
        _copy_chunk(layout, out, start, scale, chunk, stored)


def _copy_chunk(layout: Layout, out: np.ndarray, start: int, scale: float, chunk: int, stored: np.ndarray) -> None:
    first = chunk * layout.chunk_rows
    low, high = max(start, first), min(start + len(out), first + len(stored))
    target = out[low - start : high - start]
    part = stored[low - first : high - first]
    if layout.dtype == "float16" and target.dtype == np.float32:
        multiply_from_half(part, scale, target)
        return
    if layout.dtype == BFLOAT16 and target.dtype.kind == "f":
        part = from_bfloat16(part)
    np.copyto(target, part, casting="unsafe")
    if scale != 1.0:
        np.multiply(target, scale, out=target, casting="unsafe")
