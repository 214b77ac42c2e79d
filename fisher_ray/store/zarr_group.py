"""The only place that speaks to Zarr: metadata of new groups, and reading groups of any origin."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from fisher_ray.errors import FisherRayError, StoreError
from fisher_ray.storage import Storage
from fisher_ray.store.chunks import BLOSC, ZSTD_LEVEL
from fisher_ray.store.layout import ATTRIBUTE, BFLOAT16, MANIFESTS, ROOT, SEAL, Layout

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


def metadata_files(layouts: Iterable[Layout], attributes: dict[str, Any]) -> dict[str, bytes]:
    """Return the ``zarr.json`` files of a group, the group's own last, by name."""
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), attributes=attributes, zarr_format=3)
    for layout in layouts:
        packing: list[Any] = []
        if layout.codec == "zstd":
            packing = [ZstdCodec(level=ZSTD_LEVEL, checksum=False)]
        elif layout.codec == "blosc":
            packing = [BloscCodec(**BLOSC, shuffle="shuffle", typesize=layout.stored_dtype.itemsize)]
        group.create_array(
            layout.name,
            shape=layout.shape,
            dtype=layout.stored_dtype.name,
            chunks=layout.chunk_shape,
            shards=None if layout.shard_rows is None else (layout.shard_rows, *layout.chunk_shape[1:]),
            compressors=[*packing, Crc32cCodec()],
            fill_value=layout.fill,
            dimension_names=layout.dims,
            attributes={"scale": layout.scale, **({"stored_as": BFLOAT16} if layout.dtype == BFLOAT16 else {})},
        )
    with warnings.catch_warnings():  # Zarr says that this is not in its specification yet; readers without it list
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(group.store)  # so that nobody takes manifests for arrays, and one read opens all
    names = sorted(files, key=lambda name: ("/" not in name, name))
    return {name: files[name].to_bytes() for name in names}


class ZarrArray:
    """An array of a Zarr group, read where it is indexed."""

    def __init__(self, url: str, array: zarr.Array[Any]) -> None:
        """Wrap ``array`` of the group at ``url``."""
        self._name, self._array = f"{url}: array {array.basename}", array
        self.shape: tuple[int, ...] = array.shape
        self.dtype = np.dtype(array.dtype)
        self.chunks: tuple[int, ...] = array.chunks

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, selection: Any) -> np.ndarray:
        """Return the selected values (basic indexing).

        Raises:
            StoreError: if a chunk is corrupt.
        """
        try:
            return np.asarray(self._array[selection])
        except (FisherRayError, IndexError):
            raise
        except (ValueError, RuntimeError, TypeError) as error:  # a codec's complaint
            raise StoreError(f"{self._name} cannot be read at [{selection}]: {error}") from error


class ZarrGroup(Mapping[str, ZarrArray]):
    """The arrays of a Zarr group, by name."""

    def __init__(self, url: str, group: zarr.Group) -> None:
        """Wrap ``group`` at ``url``."""
        self._url, self._group = url, group
        self.attributes: dict[str, Any] = {k: v for k, v in group.attrs.items() if k != ATTRIBUTE}

    def __getitem__(self, name: str) -> ZarrArray:
        """Return the array ``name``; KeyError if the group has none."""
        member = self._group[name]
        if not isinstance(member, zarr.Array):
            raise KeyError(name)
        return ZarrArray(self._url, member)

    def __iter__(self) -> Iterator[str]:
        """Return the arrays' names, sorted."""
        return iter(sorted(self._group.array_keys()))

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(list(self._group.array_keys()))


def open_arrays(url: str) -> ZarrGroup:
    """Open any Zarr group (format 2 or 3) for reading; nothing but metadata is read here.

    As Zarr has it, a chunk left out is the fill value; in a group of this program it is an error.

    Raises:
        StoreError: if there is no Zarr group at ``url``, or it is this program's and not sealed.
    """
    storage = Storage(url)
    try:
        group = zarr.open_group(StorageStore(storage, strict=False), mode="r")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{url} is not a Zarr group: {type(error).__name__}: {error}. Check the URL.") from None
    if ATTRIBUTE not in group.attrs:
        return ZarrGroup(url, group)
    if not storage.exists(SEAL):
        raise StoreError(f"{url} has no {SEAL}: its writer did not end. Run it again to its end.")
    return ZarrGroup(url, zarr.open_group(StorageStore(storage, strict=True), mode="r"))


class StorageStore(Store):
    """A read-only Zarr store over :class:`Storage`, so that its retries and errors hold here too."""

    supports_writes = supports_deletes = False
    supports_listing = True

    def __init__(self, storage: Storage, *, strict: bool) -> None:
        """Read from ``storage``; ``strict``, for this program's own groups: an absent chunk is a StoreError."""
        super().__init__(read_only=True)
        self._storage, self._strict = storage, strict

    def __eq__(self, other: object) -> bool:
        """Whether both read the same URL."""
        return isinstance(other, StorageStore) and self._storage.url == other._storage.url

    __hash__ = None  # type: ignore[assignment]

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return a file's bytes, or None without the file."""
        try:
            raw = await asyncio.to_thread(self._storage.read_bytes, key, *_bounds(byte_range))
        except FileNotFoundError:
            if self._strict and "/c/" in f"/{key}/" and not key.endswith(ROOT):
                raise StoreError(f"{self._storage.url}: chunk {key} is missing") from None
            return None
        return prototype.buffer.from_bytes(raw)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return several ranges."""
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return await asyncio.to_thread(self._storage.exists, key)

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse: chunks are written by ``writer``."""
        raise StoreError(f"{self._storage.url} is open for reading only")

    async def delete(self, key: str) -> None:
        """Refuse."""
        raise StoreError(f"{self._storage.url} is open for reading only")

    async def list(self) -> AsyncIterator[str]:
        """Yield every name."""
        async for name in self.list_prefix(""):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield every name under ``prefix``."""
        for name in await asyncio.to_thread(self._storage.list, prefix.rstrip("/")):
            yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly under ``prefix``."""
        folder = prefix.rstrip("/")
        names = await asyncio.to_thread(self._storage.list, folder)
        offset = len(folder) + 1 if folder else 0
        found = {name[offset:].partition("/")[0] for name in names}
        for name in sorted(found - {SEAL, MANIFESTS} if self._strict else found):  # Zarr warns of what it does not know
            yield name


def _bounds(byte_range: ByteRequest | None) -> tuple[int | None, int | None]:
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start, byte_range.end
    if isinstance(byte_range, OffsetByteRequest):
        return byte_range.offset, None
    if isinstance(byte_range, SuffixByteRequest):
        return -byte_range.suffix, None
    return None, None
