"""What a store's own documents may say: checked before anything that they say is used."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fisher_ray.errors import StoreError
from fisher_ray.store.layout import MAX_CHUNK_BYTES, MAX_CHUNKS, MAX_SHARD_CHUNKS, Layout, check_layout

Count = Annotated[int, Field(ge=0, le=2**48)]
Crc = Annotated[int, Field(ge=0, lt=2**32)]
Key = Annotated[str, Field(pattern=r"^(zarr\.json|[^/\\.][^/\\]*/(zarr\.json|c(/[0-9]{1,15})*))$", max_length=1000)]
MAX_REASON = 100_000
Reason = Annotated[str, Field(max_length=MAX_REASON)]
Row = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Array(_Document):
    """An array's layout, but for its name."""

    shape: Annotated[list[Count], Field(max_length=8)]
    dims: Annotated[list[str], Field(max_length=8)]
    dtype: str
    chunk_rows: Annotated[int, Field(ge=1, le=2**48)]
    codec: str
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    shard_rows: Annotated[int, Field(ge=1, le=2**48)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Array:
        if self.shard_rows is not None and (self.shard_rows % self.chunk_rows or not self.shape):
            raise ValueError("shard_rows is not a multiple of chunk_rows")
        if self.shard_rows is not None and self.shard_rows // self.chunk_rows > MAX_SHARD_CHUNKS:
            raise ValueError(f"more than {MAX_SHARD_CHUNKS} chunks in a shard")
        return self


class Entry(_Document):
    """A stored file."""

    key: Key
    size: Count
    crc32c: Crc
    chunks: Annotated[int, Field(ge=1, le=MAX_SHARD_CHUNKS)] | None = None


class Own(_Document):
    """This program's part of a group's attributes."""

    schema_: Annotated[int, Field(alias="schema")]
    kind: Literal["features", "arrays"]
    arrays: dict[str, Array]
    num_rows: Annotated[int, Field(ge=1, le=2**48)] | None = None
    unit_rows: Annotated[int, Field(ge=1, le=2**48)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Own:
        for name, values in self.arrays.items():
            layout = Layout.from_json(name, values.model_dump())
            try:
                check_layout(layout)
            except StoreError as error:
                raise ValueError(str(error)) from None
            if layout.num_chunks > MAX_CHUNKS or layout.chunk_bytes > MAX_CHUNK_BYTES:
                size = f"{layout.num_chunks} chunks of {layout.chunk_bytes} bytes"
                raise ValueError(f"array {name!r} has {size}; at most {MAX_CHUNKS} of {MAX_CHUNK_BYTES} are read")
        if self.kind == "features":
            self._check_rows()
        return self

    def _check_rows(self) -> None:
        if self.num_rows is None or self.unit_rows is None or not self.arrays:
            raise ValueError("a feature store without num_rows, unit_rows or arrays")
        sizes = {(values.chunk_rows, values.shard_rows) for values in self.arrays.values()}
        for name, values in self.arrays.items():
            file_rows = values.shard_rows or values.chunk_rows
            if values.shape[:1] != [self.num_rows] or self.unit_rows % file_rows or len(sizes) != 1:
                raise ValueError(f"array {name!r} does not have the store's rows, or its chunks are not whole units'")


class Manifest(_Document):
    """What was written of a unit; ``store`` is the CRC-32C of the store's metadata that its writer had read."""

    unit: Count
    start: Count
    stop: Count
    attempt: Count
    arrays: dict[str, list[Entry]]
    skipped: dict[Row, Reason]
    store: Crc | None = None


class Seal(_Document):
    """What a whole store consists of."""

    schema_: Annotated[int, Field(alias="schema")]
    kind: Literal["features", "arrays"]
    files: list[Entry]
    num_rows: Count | None = None
    num_units: Annotated[int, Field(ge=0, le=MAX_CHUNKS)] = 0
    num_bytes: Count = 0
    units: list[Crc] = Field(default_factory=list)
    skipped: dict[Row, Reason] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Seal:
        if len(self.units) != self.num_units:
            raise ValueError("as many units' checksums as units are needed")
        return self


Kind = TypeVar("Kind", bound=_Document)


def fault_of(kind: type[Kind], content: Any) -> str | None:
    """Return what is wrong with a document; None if nothing is."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"])
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return None
