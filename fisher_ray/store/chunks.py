"""Chunks and their bytes: little-endian values, optionally compressed, then the CRC-32C of what stands before it.

These are Zarr v3's codecs ``bytes``, ``zstd`` or ``blosc``, and ``crc32c``. They are applied here, not by a Zarr array,
so that each chunk is one atomic write, an absent one is an error and not the fill value, and the stored bytes' checksum
is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc  # type: ignore[import-untyped]
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage
from fisher_ray.store.layout import ROOT, Layout

if TYPE_CHECKING:
    from fisher_ray.storage import Bytes

ZSTD_LEVEL = 1
BLOSC: dict[str, Any] = {"cname": "lz4", "clevel": 5, "blocksize": 0}
"""Of Blosc; bytes are shuffled by the values' size, too."""
CHECKSUM_BYTES = 4


def crc32c(data: Bytes | np.ndarray) -> int:
    """Return the CRC-32C (Castagnoli) of bytes."""
    return int(google_crc32c.value(np.frombuffer(data, np.uint8)))  # which takes arrays, but no memoryview


def new_chunk(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return a chunk's bytes, with room for the checksum, and the values ``layout.chunk_shape`` that lie in them.

    The caller sets every value.
    """
    raw = np.empty(layout.chunk_bytes + CHECKSUM_BYTES, np.uint8)
    return raw, raw[:-CHECKSUM_BYTES].view(_stored_dtype(layout)).reshape(layout.chunk_shape)


def seal_chunk(layout: Layout, raw: np.ndarray) -> Bytes:
    """Return the bytes to store for the values in ``raw`` from :func:`new_chunk`."""
    if layout.codec != "none":
        body = raw[:-CHECKSUM_BYTES]
        if layout.codec == "zstd":
            packed = Zstd(level=ZSTD_LEVEL).encode(body)
        else:
            packed = Blosc(**BLOSC, shuffle=Blosc.SHUFFLE).encode(body.view(_stored_dtype(layout)))
        raw = np.frombuffer(packed + bytes(CHECKSUM_BYTES), np.uint8).copy()
    raw[-CHECKSUM_BYTES:].view("<u4")[:] = crc32c(raw[:-CHECKSUM_BYTES])
    return raw.data


def entry(key: str, data: Bytes) -> dict[str, Any]:
    """Return what a manifest keeps of a stored file: of a chunk, the checksum that it ends in."""
    kept = crc32c(data) if key.endswith(ROOT) else _own_checksum(data)
    return {"key": key, "size": len(data), "crc32c": kept}


def is_intact(item: dict[str, Any], data: Bytes) -> bool:
    """Whether ``data`` is what :func:`entry` made ``item`` of.

    A chunk's checksum is that of its bytes without the last four: over all of them, CRC-32C is the same number for
    every chunk that ends in its own CRC-32C, and so would not tell one from another.
    """
    if item["key"].endswith(ROOT):
        return bool(crc32c(data) == item["crc32c"])
    return bool(crc32c(data[:-CHECKSUM_BYTES]) == _own_checksum(data) == item["crc32c"])


def read_chunk(storage: Storage, layout: Layout, chunk: int) -> np.ndarray:
    """Return a chunk's stored values, ``layout.chunk_shape``.

    Raises:
        StoreError: if the chunk is missing or its bytes changed.
        StorageError: if storage does not answer.
    """
    key = layout.key(chunk)
    try:
        raw = storage.read_array(key)
    except FileNotFoundError:
        raise StoreError(f"{storage.url}: chunk {key} is missing. Restore it, or write the store again.") from None
    return _decode(storage.url, layout, key, raw)


def _decode(url: str, layout: Layout, key: str, raw: np.ndarray) -> np.ndarray:
    body = raw[:-CHECKSUM_BYTES]
    if len(raw) < CHECKSUM_BYTES or crc32c(body) != _own_checksum(raw.data):
        raise StoreError(f"{url}: chunk {key} is corrupt (CRC-32C). Restore it, or write the store again.")
    try:
        unpacked = body if layout.codec == "none" else (Zstd() if layout.codec == "zstd" else Blosc()).decode(body)
    except (RuntimeError, ValueError) as error:
        raise StoreError(f"{url}: chunk {key} cannot be decompressed: {error}. Write the store again.") from None
    if len(unpacked) != layout.chunk_bytes:
        raise StoreError(f"{url}: chunk {key} holds {len(unpacked)} bytes instead of {layout.chunk_bytes}")
    return np.frombuffer(unpacked, _stored_dtype(layout)).reshape(layout.chunk_shape)


def _own_checksum(data: Bytes) -> int:
    return int.from_bytes(data[-CHECKSUM_BYTES:], "little")


def _stored_dtype(layout: Layout) -> np.dtype[Any]:
    return layout.stored_dtype.newbyteorder("<")
