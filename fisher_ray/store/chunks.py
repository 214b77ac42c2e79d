"""Chunks and their bytes: little-endian values, optionally compressed, then the CRC-32C of what stands before it.

These are Zarr v3's codecs ``bytes``, ``zstd`` or ``blosc``, and ``crc32c``. They are applied here, not by a Zarr array,
so that each chunk is one atomic write, an absent one is an error and not the fill value, and the stored bytes' checksum
is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import crc32c
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
ABSENT = 2**64 - 1
"""What a shard's index says of a chunk that is not there."""


def checksum(data: Bytes | np.ndarray, before: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of bytes, or of those with the checksum ``before`` and these behind them."""
    given: Any = data  # any buffer
    return int(crc32c.crc32c(given, before))  # other threads go on meanwhile


def new_chunk(storage: Storage, layout: Layout) -> tuple[Bytes, np.ndarray]:
    """Return a chunk's bytes, with room for the checksum, and the values ``layout.chunk_shape`` that lie in them.

    The caller sets every value.
    """
    data = storage.allocate(layout.chunk_bytes + CHECKSUM_BYTES)
    values = np.frombuffer(data, np.uint8)[:-CHECKSUM_BYTES]
    return data, values.view(_stored_dtype(layout)).reshape(layout.chunk_shape)


def seal_chunk(layout: Layout, data: Bytes) -> Bytes:
    """Return the bytes to store for the values in ``data`` from :func:`new_chunk`."""
    raw = np.frombuffer(data, np.uint8)
    if layout.codec != "none":
        body = raw[:-CHECKSUM_BYTES]
        if layout.codec == "zstd":
            packed = Zstd(level=ZSTD_LEVEL).encode(body)
        else:
            packed = Blosc(**BLOSC, shuffle=Blosc.SHUFFLE).encode(body.view(_stored_dtype(layout)))
        data = bytearray(packed + bytes(CHECKSUM_BYTES))
        raw = np.frombuffer(data, np.uint8)
    raw[-CHECKSUM_BYTES:].view("<u4")[:] = checksum(raw[:-CHECKSUM_BYTES])
    return data


def entry(key: str, data: Bytes, chunks: int | None = None) -> dict[str, Any]:
    """Return what a manifest keeps of a stored file: of a chunk, the checksum that it ends in.

    Of a shard of so many ``chunks``, it is the checksum of all that its chunks end in, and of its index.
    """
    size = {"key": key, "size": len(data)}
    if chunks is not None:
        return {**size, "crc32c": _shard_checksum(data, chunks), "chunks": chunks}
    return {**size, "crc32c": checksum(data) if key.endswith(ROOT) else _own_checksum(data)}


def is_intact(item: dict[str, Any], data: Bytes) -> bool:
    """Whether ``data`` is what :func:`entry` made ``item`` of.

    A chunk's checksum is that of its bytes without the last four: over all of them, CRC-32C is the same number for
    every chunk that ends in its own CRC-32C, and so would not tell one from another.
    """
    if item["key"].endswith(ROOT):
        return bool(checksum(data) == item["crc32c"])
    if item.get("chunks") is not None:
        return _is_intact_shard(item, data)
    return bool(checksum(data[:-CHECKSUM_BYTES]) == _own_checksum(data) == item["crc32c"])


def seal_shard(layout: Layout, chunks: list[Bytes]) -> bytes:
    """Return a shard's bytes, as Zarr has them: chunks from :func:`seal_chunk`, and the index of where each begins."""
    index = np.full((layout.chunks_a_file, 2), ABSENT, "<u8")
    sizes = np.array([len(chunk) for chunk in chunks], "<u8")
    index[: len(chunks), 1] = sizes
    index[: len(chunks), 0] = np.cumsum(sizes) - sizes
    raw = index.tobytes()
    return b"".join([*chunks, raw, checksum(raw).to_bytes(CHECKSUM_BYTES, "little")])


def read_file(storage: Storage, layout: Layout, file: int, chunks: range) -> list[np.ndarray]:
    """Return the stored values of some consecutive ``chunks`` of a file, each ``layout.chunk_shape``.

    Raises:
        StoreError: if a chunk is missing or its bytes changed.
        StorageError: if storage does not answer.
    """
    key = layout.key(file)
    if is_plain(layout):
        body = np.empty(layout.chunk_bytes, np.uint8)
        read_chunk(storage, layout, file, body)
        return [body.view(_stored_dtype(layout)).reshape(layout.chunk_shape)]
    try:
        if layout.shard_rows is None:
            return [_decode(storage.url, layout, key, storage.read_array(key))]
        return _read_shard(storage, layout, file, chunks)
    except FileNotFoundError:
        raise _missing(storage, key) from None


def is_plain(layout: Layout) -> bool:
    """Whether each chunk is a file of its own that begins with the values as they are."""
    return layout.shard_rows is None and layout.codec == "none"


def read_chunk(storage: Storage, layout: Layout, chunk: int, target: np.ndarray) -> None:
    """Read the values of a chunk that :func:`is_plain` into ``target``, uint8 ``(layout.chunk_bytes,)``.

    Raises:
        StoreError: if the chunk is missing or its bytes changed.
        StorageError: if storage does not answer.
    """
    key = layout.key(chunk)
    try:
        found, rest = storage.read_into(key, target, lambda before, block: checksum(block, before))
    except FileNotFoundError:
        raise _missing(storage, key) from None
    if rest != found.to_bytes(CHECKSUM_BYTES, "little"):
        raise _corrupt(storage.url, key)


def _missing(storage: Storage, key: str) -> StoreError:
    return StoreError(f"{storage.url}: chunk {key} is missing. Restore it, or write the store again.")


def _corrupt(url: str, key: str) -> StoreError:
    return StoreError(f"{url}: chunk {key} is corrupt (CRC-32C). Restore it, or write the store again.")


def _read_shard(storage: Storage, layout: Layout, file: int, chunks: range) -> list[np.ndarray]:
    key, held = layout.key(file), layout.chunks(file)
    if chunks == held:  # all of it at once
        raw = storage.read_array(key)
        index, first = _index(raw[-_index_bytes(layout.chunks_a_file) :].data, layout.chunks_a_file, len(held)), 0
    else:
        tail = storage.read_bytes(key, start=-_index_bytes(layout.chunks_a_file))
        index = _index(tail, layout.chunks_a_file, len(held))
    if index is None:
        raise StoreError(f"{storage.url}: the index of shard {key} is corrupt. Restore it, or write the store again.")
    wanted = index[chunks.start - held.start : chunks.stop - held.start]
    if chunks != held:
        first = int(wanted[0, 0])
        raw = np.frombuffer(storage.read_bytes(key, first, int(wanted[-1].sum())), np.uint8)
    spans = [(int(offset) - first, int(offset + size) - first) for offset, size in wanted]
    return [_decode(storage.url, layout, key, raw[start:stop]) for start, stop in spans]


def _index_bytes(chunks: int) -> int:
    return 16 * chunks + CHECKSUM_BYTES


def _index(raw: Bytes, chunks: int, present: int) -> np.ndarray | None:
    """Return a shard's index, ``(present, 2)``: offsets and sizes, one after the other; None if it is not whole."""
    if len(raw) != _index_bytes(chunks) or checksum(raw[:-CHECKSUM_BYTES]) != _own_checksum(raw):
        return None
    index = np.frombuffer(raw[:-CHECKSUM_BYTES], "<u8").reshape(chunks, 2)
    used, rest = index[:present], index[present:]
    ends = np.cumsum(used[:, 1])
    whole = (rest == ABSENT).all() and (used[:, 0] == ends - used[:, 1]).all() and (used < 2**48).all()
    return used if whole else None


def _shard_parts(data: Bytes, chunks: int) -> tuple[np.ndarray, Bytes] | None:
    """Return a shard's index of all its chunks that are there, and its bytes; None if it is not whole."""
    tail = data[max(len(data) - _index_bytes(chunks), 0) :]
    if len(tail) != _index_bytes(chunks):
        return None
    present = int((np.frombuffer(tail[:-CHECKSUM_BYTES], "<u8")[::2] != ABSENT).sum())
    index = _index(tail, chunks, present)
    if index is None or int(index[:, 1].sum()) + len(tail) != len(data):
        return None
    return index, tail


def _shard_checksum(data: Bytes, chunks: int) -> int:
    found = _shard_parts(data, chunks)
    if found is None:
        return -1  # of nothing that is stored
    index, tail = found
    own = b"".join(bytes(data[int(offset + size) - CHECKSUM_BYTES : int(offset + size)]) for offset, size in index)
    return checksum(own + bytes(tail))


def _is_intact_shard(item: dict[str, Any], data: Bytes) -> bool:
    found = _shard_parts(data, item["chunks"])
    if found is None or _shard_checksum(data, item["chunks"]) != item["crc32c"]:
        return False
    parts = [data[int(offset) : int(offset + size)] for offset, size in found[0]]
    return all(checksum(part[:-CHECKSUM_BYTES]) == _own_checksum(part) for part in parts)


def _decode(url: str, layout: Layout, key: str, raw: np.ndarray) -> np.ndarray:
    body = raw[:-CHECKSUM_BYTES]
    if len(raw) < CHECKSUM_BYTES or checksum(body) != _own_checksum(raw.data):
        raise _corrupt(url, key)
    try:
        if layout.codec == "zstd" and _zstd_bytes(body[:18].tobytes()) != layout.chunk_bytes:
            raise ValueError("its frame is of another size")
        unpacked = body if layout.codec == "none" else (Zstd() if layout.codec == "zstd" else Blosc()).decode(body)
    except (RuntimeError, ValueError) as error:
        raise StoreError(f"{url}: chunk {key} cannot be decompressed: {error}. Write the store again.") from None
    if len(unpacked) != layout.chunk_bytes:
        raise StoreError(f"{url}: chunk {key} holds {len(unpacked)} bytes instead of {layout.chunk_bytes}")
    return np.frombuffer(unpacked, _stored_dtype(layout)).reshape(layout.chunk_shape)


def _zstd_bytes(head: bytes) -> int | None:
    """Return how many bytes a Zstandard frame promises (RFC 8878, 3.1.1), from its first 18, or None."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    single = bool(head[4] & 0x20)
    size = (int(single), 2, 4, 8)[head[4] >> 6]
    start = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3]
    field = head[start : start + size]
    return int.from_bytes(field, "little") + (256 if size == 2 else 0) if size and len(field) == size else None


def _own_checksum(data: Bytes) -> int:
    return int.from_bytes(data[-CHECKSUM_BYTES:], "little")


def _stored_dtype(layout: Layout) -> np.dtype[Any]:
    return layout.stored_dtype.newbyteorder("<")
