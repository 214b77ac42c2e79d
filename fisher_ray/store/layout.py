"""What a store holds and where: array specifications, chunk grids and the names of the files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fisher_ray.errors import StoreError
from fisher_ray.records import Unit

SCHEMA = 1
ATTRIBUTE = "fisher_ray"
"""The group attribute that holds this program's own layout."""
ROOT, SEAL, MANIFESTS = "zarr.json", "seal.json", "manifest"
MAX_CHUNKS = 2**23
"""Chunks of an array at most: 8 million."""
MAX_CHUNK_BYTES = 2**33
"""Bytes of a chunk at most, decoded."""
CODECS = ("none", "zstd", "blosc")
MAX_SHARD_CHUNKS = 2**16
"""Chunks of a shard at most."""
BFLOAT16 = "bfloat16"
"""Stored as its bits, uint16, since Zarr has no such type; the array's attribute ``stored_as`` says so."""
SMALLEST_SCALE, LARGEST_SCALE = (float(value) for value in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", BFLOAT16),
)


@dataclass(frozen=True)
class ArraySpec:
    """One array of a feature store, of shape ``(num_rows, *shape_tail)``.

    Attributes:
        shape_tail: shape of one row.
        dtype: NumPy name of the stored type.
        dims: one name for each axis, the rows' first.
        scale: stored = value / scale; a power of two loses nothing. 1 for integers.
    """

    shape_tail: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class StoreSpec:
    """A feature store before anything is written.

    Attributes:
        num_rows: rows of every array.
        unit_rows: rows that one writer writes: a whole number of chunks.
        chunk_rows: rows of one chunk.
        codec: ``none``, ``zstd`` or ``blosc``; every chunk ends in its CRC-32C in any case.
        arrays: by name.
        attributes: JSON values kept with the group.
        shard_rows: rows of one file, where it holds several chunks (a Zarr shard): a whole number of chunks, and a
            whole number of them in a unit. None: every chunk is a file.
    """

    num_rows: int
    unit_rows: int
    chunk_rows: int
    codec: str
    arrays: dict[str, ArraySpec]
    attributes: dict[str, Any] = field(default_factory=dict)
    shard_rows: int | None = None


@dataclass(frozen=True)
class Layout:
    """One array as it is stored: chunks of whole rows along the first axis, each a file or several in one.

    Attributes:
        name: of the array and its folder.
        shape: whole shape; ``()`` for a scalar, which is one chunk.
        dtype: NumPy name.
        dims: one name for each axis.
        chunk_rows: rows of one chunk; the last chunk is filled up.
        codec: ``none``, ``zstd`` or ``blosc``.
        scale: value = stored * scale.
        shard_rows: rows of one file, where it holds several chunks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    chunk_rows: int
    codec: str
    scale: float = 1.0
    shard_rows: int | None = None

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of every chunk; Zarr allows no axis of length 0 in it."""
        return (self.chunk_rows, *(max(size, 1) for size in self.shape[1:])) if self.shape else ()

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The type of the stored numbers."""
        return np.dtype(np.uint16 if self.dtype == BFLOAT16 else self.dtype)

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        if 0 in self.shape:
            return 0
        return math.ceil(self.shape[0] / self.chunk_rows) if self.shape else 1

    @property
    def chunks_a_file(self) -> int:
        """Number of chunks in one file; the last file may lack some."""
        return 1 if self.shard_rows is None else self.shard_rows // self.chunk_rows

    @property
    def num_files(self) -> int:
        """Number of files of chunks."""
        return -(-self.num_chunks // self.chunks_a_file)

    def chunks(self, file: int) -> range:
        """Return the chunks in a file."""
        size = self.chunks_a_file
        return range(file * size, min((file + 1) * size, self.num_chunks))

    @property
    def fill(self) -> Any:
        """What stands where there is no value: NaN, -1, or 0 where the type has neither."""
        if self.dtype == BFLOAT16:
            return np.uint16(0x7FC0)
        kind = self.stored_dtype.kind
        return self.stored_dtype.type(np.nan if kind == "f" else -1 if kind == "i" else 0)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, decoded."""
        return math.prod(self.chunk_shape) * self.stored_dtype.itemsize

    def key(self, file: int) -> str:
        """Return the name of a file of chunks, as Zarr v3 has it."""
        return "/".join([self.name, "c", *([str(file)] if self.shape else []), *("0" for _ in self.shape[1:])])

    def files(self, start: int, stop: int) -> range:
        """Return the files of chunks that hold rows ``[start, stop)``."""
        rows = self.shard_rows or self.chunk_rows
        return range(start // rows, -(-stop // rows)) if self.num_chunks else range(0)

    def rows(self, chunk: int) -> range:
        """Return the rows of a chunk (a scalar has one)."""
        stop = self.shape[0] if self.shape else 1
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, stop))

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads, without the name."""
        shape, dims = list(self.shape), list(self.dims)
        how = {"dtype": self.dtype, "chunk_rows": self.chunk_rows, "codec": self.codec, "scale": self.scale}
        sharded = {} if self.shard_rows is None else {"shard_rows": self.shard_rows}
        return {"shape": shape, "dims": dims, **how, **sharded}

    @classmethod
    def from_json(cls, name: str, values: dict[str, Any]) -> Layout:
        """Undo :meth:`to_json`."""
        shape, dims = tuple(map(int, values["shape"])), tuple(map(str, values["dims"]))
        scale, sharded = float(values["scale"]), values.get("shard_rows")
        chunk_rows, shard_rows = int(values["chunk_rows"]), None if sharded is None else int(sharded)
        return cls(name, shape, str(values["dtype"]), dims, chunk_rows, str(values["codec"]), scale, shard_rows)


def manifest_name(unit: int) -> str:
    """Return the file name of a unit's manifest."""
    return f"{MANIFESTS}/unit-{unit:06d}.json"


def unit_rows(index: int, rows: int, num_rows: int) -> range:
    """Return the rows of unit ``index`` in a store of ``num_rows`` rows and units of ``rows``."""
    return range(index * rows, min((index + 1) * rows, num_rows))


def layouts_of(spec: StoreSpec) -> dict[str, Layout]:
    """Check ``spec`` and return the layout of every array.

    Raises:
        StoreError: naming what breaks a rule.
    """
    _check_rows(spec)
    made = {}
    for name, array in spec.arrays.items():
        shape = (spec.num_rows, *array.shape_tail)
        how = (spec.chunk_rows, spec.codec, float(array.scale), spec.shard_rows)
        layout = Layout(name, shape, array.dtype, array.dims, *how)
        check_layout(layout)
        made[name] = layout
    return made


def check_layout(layout: Layout) -> None:
    """Refuse what cannot be stored.

    Raises:
        StoreError: naming the array and the rule.
    """
    what = f"array {layout.name!r}"
    if not layout.name or {"/", "\\"} & set(layout.name) or layout.name.startswith((".", "__")):
        raise StoreError(f"{what}: a name is one folder's, without '/', and does not start with '.' or '__'")
    if not layout.name.isprintable():
        raise StoreError(f"{what}: a name is made of printable characters")
    if layout.name in (MANIFESTS, ROOT, SEAL):
        raise StoreError(f"{what}: the name is taken by the store itself. Give another name.")
    if layout.dtype not in DTYPES:
        raise StoreError(f"{what}: dtype {layout.dtype!r} is not one of {', '.join(DTYPES)}")
    if len(layout.dims) != len(layout.shape):
        raise StoreError(f"{what}: dims {list(layout.dims)} do not name each axis of shape {list(layout.shape)}")
    if layout.codec not in CODECS:
        raise StoreError(f"{what}: codec {layout.codec!r} is not one of {', '.join(CODECS)}")
    if not (0 < layout.scale < math.inf) or (layout.scale != 1.0 and not layout.dtype.startswith("float")):
        raise StoreError(f"{what}: scale {layout.scale} of {layout.dtype} is not positive and finite (1 for integers)")
    if layout.dtype != "float64" and not SMALLEST_SCALE <= layout.scale <= LARGEST_SCALE:
        raise StoreError(f"{what}: scale {layout.scale} of {layout.dtype} is beyond float32, which it is applied in")


def check_unit(unit: Unit, rows: int, num_rows: int) -> None:
    """Refuse a unit that is not this store's, since two writers could then share a chunk.

    Raises:
        StoreError: naming the rows and the rule.
    """
    planned = unit_rows(unit.index, rows, num_rows)
    if unit.index < 0 or not planned or (unit.start, unit.stop) != (planned.start, planned.stop):
        raise StoreError(
            f"unit {unit.index} with rows [{unit.start}, {unit.stop}) is not one of this store's units of {rows} rows "
            f"out of {num_rows}. Plan units with plan_units({num_rows}, {rows})."
        )


def _check_rows(spec: StoreSpec) -> None:
    rows, chunk = spec.unit_rows, spec.chunk_rows
    if min(spec.num_rows, rows, chunk) <= 0:
        raise StoreError(f"num_rows {spec.num_rows}, unit_rows {rows} and chunk_rows {chunk} are not all positive")
    if rows % chunk:
        raise StoreError(
            f"unit_rows {rows} is not a multiple of chunk_rows {chunk}, so two writers would share a chunk"
        )
    if (shard := spec.shard_rows) is not None and (shard <= 0 or shard % chunk or rows % shard):
        raise StoreError(
            f"shard_rows {shard} is not a multiple of chunk_rows {chunk} that divides unit_rows {rows}, so two writers "
            "would share a shard"
        )
    if not spec.arrays:
        raise StoreError("a store without arrays. Give at least one.")
