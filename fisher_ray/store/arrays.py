"""Groups of arrays written by one process in one go: a metric, sums, a linear model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fisher_ray.errors import StoreError
from fisher_ray.storage import Bytes, Storage
from fisher_ray.store.chunks import entry, new_chunk, read_file, seal_chunk
from fisher_ray.store.documents import check_own, each, pack, plain, read_layouts, read_root, read_sealed
from fisher_ray.store.layout import ATTRIBUTE, ROOT, SCHEMA, SEAL, Layout, check_layout
from fisher_ray.store.zarr_group import metadata_files

CHUNK_BYTES = 64 * 2**20


def save_arrays(
    url: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any], *, leftovers: bool = False
) -> None:
    """Write a sealed group; the same input gives the same files. A group of this program at ``url`` is replaced.

    One that is sealed with the same content stays sealed, and only what has changed of it is written, so that a second
    writer who comes late does no harm.

    Args:
        url: a local path or ``s3://``.
        arrays: by name, any shape, of booleans, integers or floats; stored in their own type, uncompressed.
        attributes: JSON values.
        leftovers: whether files without a group are written over: where nobody else ever writes, they are left from a
            writer who came late to a group that was being removed.

    Raises:
        StoreError: if an array or attribute cannot be stored, or ``url`` holds something else.
        StorageError: if it cannot be written.
    """
    storage, layouts = Storage(url), {name: _layout(name, np.asarray(value)) for name, value in arrays.items()}
    own = {"schema": SCHEMA, "kind": "arrays", "arrays": {name: item.to_json() for name, item in layouts.items()}}
    check_own(own)
    files = metadata_files(layouts.values(), {**plain(attributes), ATTRIBUTE: own})
    sealed, root = _content(storage, SEAL), _content(storage, ROOT)
    if sealed is not None and sealed == _seal(storage, layouts, arrays, files, _pass):
        _seal(storage, layouts, arrays, files, _mend)
        return
    if sealed is not None or root != files[ROOT]:
        _clear(storage, leftovers)
    storage.write_bytes(SEAL, _seal(storage, layouts, arrays, files, Storage.write_bytes))


def load_arrays(url: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return all arrays of a group from :func:`save_arrays`, and its attributes.

    Raises:
        StoreError: if there is none, it is not sealed, or a chunk is missing or corrupt.
        StorageError: if storage does not answer.
    """
    storage = Storage(url)
    own, attributes, sealed = read_sealed(storage)
    if own["kind"] != "arrays":
        raise StoreError(f"{url} is a store of {own['kind']}, not a group of arrays. Use open_features.")
    if sealed is None:
        raise StoreError(f"{url} has no {SEAL}: its writer did not end. Run the job again.")
    return {name: _read(storage, layout) for name, layout in read_layouts(own).items()}, attributes


def _seal(
    storage: Storage,
    layouts: dict[str, Layout],
    arrays: dict[str, np.ndarray],
    files: dict[str, bytes],
    put: Callable[[Storage, str, Bytes], None],
) -> bytes:
    """Put every file of a group, and return what it is sealed with."""
    entries = [entry(name, raw) for name, raw in files.items()]
    for name, raw in files.items():
        put(storage, name, raw)
    for name, layout in layouts.items():
        value = np.asarray(arrays[name])

        def chunk_entry(chunk: int, layout: Layout = layout, value: np.ndarray = value) -> dict[str, Any]:
            data, key = _chunk(storage, layout, value, chunk), layout.key(chunk)
            put(storage, key, data)
            return entry(key, data)

        entries += each(storage, chunk_entry, range(layout.num_chunks))
    entries.sort(key=lambda item: str(item["key"]))
    return pack({"schema": SCHEMA, "kind": "arrays", "files": entries})


def _pass(storage: Storage, key: str, data: Bytes) -> None:
    """Put nothing: the seal alone is wanted."""


def _mend(storage: Storage, key: str, data: Bytes) -> None:
    if _content(storage, key) != data:
        storage.write_bytes(key, data)


def _content(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read_bytes(name)
    except FileNotFoundError:
        return None


def _layout(name: str, value: np.ndarray) -> Layout:
    row_bytes = max(value.itemsize * math.prod(value.shape[1:]), 1)
    chunk_rows = max(1, min(CHUNK_BYTES // row_bytes, value.shape[0] if value.shape else 1))
    dims = tuple(f"{name}_{axis}" for axis in range(value.ndim))
    layout = Layout(name, value.shape, value.dtype.name, dims, chunk_rows, "none")
    check_layout(layout)
    return layout


def _clear(storage: Storage, leftovers: bool) -> None:
    """Remove the group of this program that is there: its seal first, so that no half of it is ever believed."""
    if not storage.exists(ROOT):
        return None if leftovers else _clear_beginnings(storage)
    own, _, _ = read_root(storage)
    if own["kind"] != "arrays":
        raise StoreError(f"{storage.url} is a feature store, which is not overwritten. Give another place.")
    storage.remove(SEAL)
    for name in own["arrays"]:
        storage.remove(name)
    storage.remove_partials()
    storage.remove(ROOT)


def _clear_beginnings(storage: Storage) -> None:
    """Before the group's own metadata a killed writer leaves only arrays' metadata; anything else is not ours."""
    names = storage.list()
    if foreign := [name for name in names if name.partition("/")[2] != ROOT]:
        raise StoreError(f"{storage.url} is not empty: it holds {foreign[0]}. Give an empty or a new place.")
    for name in names:
        storage.remove(name)


def _chunk(storage: Storage, layout: Layout, value: np.ndarray, chunk: int) -> Bytes:
    raw, stored = new_chunk(storage, layout)
    if layout.shape:
        rows = layout.rows(chunk)
        stored[: len(rows)] = value[rows.start : rows.stop]
        stored[len(rows) :] = layout.fill
    else:
        stored[...] = value
    return seal_chunk(layout, raw)


def _read(storage: Storage, layout: Layout) -> np.ndarray:
    out = np.empty(layout.shape, layout.stored_dtype)

    def copy(chunk: int) -> None:
        (stored,), rows = read_file(storage, layout, chunk, range(chunk, chunk + 1)), layout.rows(chunk)
        if layout.shape:
            out[rows.start : rows.stop] = stored[: len(rows)]
        else:
            out[...] = stored

    each(storage, copy, range(layout.num_chunks))
    return out
