"""Writing a feature store: the empty store once, then units in any order, by anyone, any number of times."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from fisher_ray.errors import DataError, StoreError
from fisher_ray.records import Unit
from fisher_ray.storage import Bytes, Storage
from fisher_ray.store.bfloat import from_bfloat16, to_bfloat16
from fisher_ray.store.chunks import checksum, entry, new_chunk, seal_chunk, seal_shard
from fisher_ray.store.documents import check_own, each, pack, plain, read_layouts, read_root
from fisher_ray.store.halves import divide_to_half, is_finite
from fisher_ray.store.layout import (
    ATTRIBUTE,
    BFLOAT16,
    ROOT,
    SCHEMA,
    SEAL,
    Layout,
    StoreSpec,
    check_unit,
    layouts_of,
    manifest_name,
)
from fisher_ray.store.schema import MAX_REASON
from fisher_ray.store.zarr_group import metadata_files

NONE: Mapping[int, str] = MappingProxyType({})
"""No skipped rows."""


def create_store(url: str, spec: StoreSpec) -> None:
    """Write the metadata of an empty store, and clear away what killed writers left; nothing if it is there already.

    Call it while no writer is at work.

    Raises:
        StoreError: if the specification breaks a rule, or another store is at ``url``.
        StorageError: if it cannot be written.
    """
    layouts, storage = layouts_of(spec), Storage(url)
    own = {
        "schema": SCHEMA,
        "kind": "features",
        "num_rows": spec.num_rows,
        "unit_rows": spec.unit_rows,
        "arrays": {name: layout.to_json() for name, layout in layouts.items()},
    }
    attributes = plain(spec.attributes)
    check_own(own)
    present = set(storage.list())
    if ROOT in present:
        _refuse_another(storage, own, attributes)
        storage.remove_partials()
    for name, raw in metadata_files(layouts.values(), {**attributes, ATTRIBUTE: own}).items():
        if name not in present:
            storage.write_bytes(name, raw)


class StoreWriter:
    """Writes units of one store, whose metadata it reads once.

    Attributes:
        url: the store's.
        layouts: of its arrays, by name.
    """

    def __init__(self, url: str) -> None:
        """Read a store's metadata.

        Args:
            url: a store from :func:`create_store`.

        Raises:
            StoreError: if there is none, or it is no feature store.
            StorageError: if it cannot be read.
        """
        self.url, self._storage = url, Storage(url)
        own, _, root = read_root(self._storage)
        if own["kind"] != "features":
            raise StoreError(f"{url} is no feature store, so it has no units. Check the URL.")
        self._unit_rows, self._num_rows, self.layouts = own["unit_rows"], own["num_rows"], read_layouts(own)
        self._fingerprint = checksum(root)

    def no_rows(self) -> dict[str, np.ndarray]:
        """Return every array without rows, for a unit whose rows are all skipped."""
        return {name: np.empty((0, *layout.shape[1:]), _given_dtype(layout)) for name, layout in self.layouts.items()}

    def write_unit(
        self, unit: Unit, arrays: dict[str, np.ndarray], *, attempt: int = 1, skipped: Mapping[int, str] = NONE
    ) -> int:
        """Write a unit's chunks, then its manifest; the same input gives the same chunk files.

        Args:
            unit: one of the store's units.
            arrays: every array of the store by name, ``(len(unit), *shape_tail)``, or without the skipped rows.
            attempt: from 1; kept in the manifest.
            skipped: reasons by row; such a row is stored as NaN (-1 for integers) and left out by ``iter_chunks``.

        Returns:
            Bytes written.

        Raises:
            DataError: if a value is not finite, or does not fit the stored type; ``row`` is the row.
            StoreError: if the unit or an array is not the store's, or the store is sealed.
            StorageError: if it cannot be written.
        """
        storage = self._storage
        check_unit(unit, self._unit_rows, self._num_rows)
        if storage.exists(SEAL):
            advice = "Remove the store to write it anew."
            raise StoreError(f"{self.url} is sealed, so unit {unit.index} is not written. {advice}")
        kept, index, span = _kept_rows(unit, skipped), arrays.get("index"), (unit.start, unit.stop)
        _check_arrays(self.layouts, arrays, unit, kept)
        entries: dict[str, list[dict[str, Any]]] = {
            name: each(storage, _FileWriter(storage, layout, arrays[name], unit, kept, index), layout.files(*span))
            for name, layout in self.layouts.items()
        }
        storage.settle(str(item["key"]) for items in entries.values() for item in items)  # before the manifest says so
        reasons = {str(row): _storable(reason) for row, reason in skipped.items()}
        rows = {"unit": unit.index, "start": unit.start, "stop": unit.stop}
        written = {"attempt": attempt, "arrays": entries, "skipped": reasons, "store": self._fingerprint}
        manifest = pack({**rows, **written})
        storage.write_bytes(manifest_name(unit.index), manifest)
        return len(manifest) + sum(int(chunk["size"]) for chunks in entries.values() for chunk in chunks)


class _FileWriter:
    """Writes one file of one array of a unit: ``given`` holds all of the unit's rows, or only those ``kept``."""

    def __init__(
        self,
        storage: Storage,
        layout: Layout,
        given: np.ndarray,
        unit: Unit,
        kept: np.ndarray,
        index: np.ndarray | None,
    ) -> None:
        self.storage, self.layout, self.unit = storage, layout, unit
        self.values = given if len(given) == len(kept) else given[kept]
        self.rows = kept + unit.start
        self.index = self.rows if index is None else index if len(index) == len(kept) else index[kept]

    def __call__(self, file: int) -> dict[str, Any]:
        layout, key = self.layout, self.layout.key(file)
        chunks = [self._chunk(chunk) for chunk in layout.chunks(file)]
        sharded = layout.shard_rows is not None
        data = seal_shard(layout, chunks) if sharded else chunks[0]
        self.storage.write_bytes(key, data, settle=False)
        return entry(key, data, layout.chunks_a_file if sharded else None)

    def _chunk(self, chunk: int) -> Bytes:
        rows = self.layout.rows(chunk)
        first, last = np.searchsorted(self.rows, [rows.start, rows.stop])
        raw, stored = new_chunk(self.storage, self.layout)
        if last - first == len(stored):
            self._store(stored, slice(first, last))
        else:
            stored[...] = self.layout.fill
            placed = np.empty((last - first, *stored.shape[1:]), stored.dtype)
            self._store(placed, slice(first, last))
            stored[self.rows[first:last] - rows.start] = placed
        return seal_chunk(self.layout, raw)

    def _store(self, stored: np.ndarray, part: slice) -> None:
        values = self.values[part].reshape(stored.shape)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # what does not fit is found below
            if self.layout.dtype == BFLOAT16:
                stored[...] = to_bfloat16(values.astype(np.float32, copy=False))
            elif stored.dtype == np.float16 and values.dtype in (np.float16, np.float32):
                divide_to_half(values, self.layout.scale, stored)
            elif self.layout.scale == 1.0:
                np.copyto(stored, values, casting="same_kind")
            else:
                np.divide(values, self.layout.scale, out=stored, casting="same_kind", dtype=_working_dtype(values))
        if self.layout.dtype == BFLOAT16:
            fits = np.isfinite(from_bfloat16(stored))
        elif stored.dtype == np.float16 and is_finite(stored):
            return
        else:
            fits = np.isfinite(stored) if stored.dtype.kind == "f" else stored == values
        if not fits.all():
            wrong = int(np.flatnonzero(~fits.reshape(len(fits), -1).all(axis=1))[0])
            self._refuse(values[wrong], int(self.index[part][wrong]))

    def _refuse(self, values: np.ndarray, row: int) -> None:
        what, dtype = f"array {self.layout.name!r}, row {row}", self.layout.dtype
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DataError(f"{what}: a value is NaN or infinite. Leave the row out (data.on_error: skip).", row=row)
        largest, scale = values.flat[np.argmax(np.abs(values))], self.layout.scale
        advice = " Give store.dtype: float32." if dtype == "float16" else " Give a wider type."
        raise DataError(f"{what}: {largest} does not fit {dtype} (scale {scale}).{advice}", row=row)


def _working_dtype(values: np.ndarray) -> np.dtype[Any]:
    """Divide in float32 at least, so that a float16 input keeps its bits."""
    return np.result_type(values.dtype, np.float32)


def _given_dtype(layout: Layout) -> np.dtype[Any]:
    return np.dtype(np.float32 if layout.dtype == BFLOAT16 else layout.dtype)


def _storable(reason: str) -> str:
    return str(reason)[:MAX_REASON].encode("utf-8", "replace").decode()  # a name may hold bytes that are no text


def _kept_rows(unit: Unit, skipped: Mapping[int, str]) -> np.ndarray:
    if foreign := [row for row in skipped if not unit.start <= row < unit.stop]:
        raise StoreError(f"skipped rows {foreign} are not rows of unit {unit.index} [{unit.start}, {unit.stop})")
    kept = np.ones(len(unit), bool)
    kept[[row - unit.start for row in skipped]] = False
    return np.flatnonzero(kept)


def _check_arrays(layouts: dict[str, Layout], arrays: dict[str, np.ndarray], unit: Unit, kept: np.ndarray) -> None:
    if set(arrays) != set(layouts):
        raise StoreError(
            f"unit {unit.index} has arrays {sorted(arrays)}, the store {sorted(layouts)}. Give exactly these."
        )
    for name, layout in layouts.items():
        given, dtype = arrays[name], _given_dtype(layout)
        if given.shape[1:] != layout.shape[1:] or len(given) not in (len(unit), len(kept)):
            wanted = [len(unit), *layout.shape[1:]]
            raise StoreError(f"unit {unit.index}: array {name!r} has shape {list(given.shape)} instead of {wanted}")
        if not np.can_cast(given.dtype, dtype, "same_kind"):
            raise StoreError(
                f"unit {unit.index}: array {name!r} is {given.dtype}, which does not cast to {layout.dtype}"
            )


def _refuse_another(storage: Storage, own: dict[str, Any], attributes: dict[str, Any]) -> None:
    there, given, _ = read_root(storage)
    before, now = {**given, **there}, {**attributes, **own}
    if before != now:
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        raise StoreError(
            f"{storage.url} holds another store: {', '.join(differing)} differ. Give another place, or remove it."
        )
