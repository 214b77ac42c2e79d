import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fisher_ray.records import Unit
from fisher_ray.store import ArraySpec, StoreSpec, StoreWriter, create_store, seal
from tests.s3_server import s3_server, s3_url

__all__ = ["s3_server", "s3_url"]

NUM_ROWS, UNIT_ROWS, CHUNK_ROWS = 21, 8, 4
UNITS = [Unit(0, 0, 8), Unit(1, 8, 16), Unit(2, 16, 21)]


def make_spec(codec: str = "none", dtype: str = "float16", scale: float = 0.25, **changes) -> StoreSpec:
    arrays = {
        "features": ArraySpec((3, 5), dtype, ("sample", "class", "rank"), scale),
        "labels": ArraySpec((), "int64", ("sample",)),
        "index": ArraySpec((), "int64", ("sample",)),
        "logits": ArraySpec((3,), "float32", ("sample", "class")),
    }
    codec, _, sharded = codec.partition(" ")
    values = {"num_rows": NUM_ROWS, "unit_rows": UNIT_ROWS, "chunk_rows": CHUNK_ROWS, "codec": codec}
    values["shard_rows"] = UNIT_ROWS if sharded else None
    return StoreSpec(**{**values, "arrays": arrays, "attributes": {"model": "abc", "dims": [1, 2]}, **changes})


def make_rows(start: int = 0, stop: int = NUM_ROWS) -> dict[str, np.ndarray]:
    """Rows that depend on nothing but their position; features are exact in float16 at scale 1/4."""
    rows = np.arange(start, stop)
    whole = rows[:, None, None] * 15 + np.arange(15).reshape(3, 5)
    labels = np.array([zlib.crc32(bytes([row])) % 3 for row in rows])
    logits = np.sin(whole[..., 0]).astype(np.float32)
    return {"features": whole.astype(np.float32) / 8, "labels": labels, "index": rows, "logits": logits}


def write(url: str, unit: Unit, *, attempt: int = 1, skipped: dict[int, str] | None = None) -> int:
    rows = make_rows(unit.start, unit.stop)
    return StoreWriter(url).write_unit(unit, rows, attempt=attempt, skipped=skipped or {})


def write_store(url: str, codec: str = "none") -> None:
    create_store(url, make_spec(codec))
    for unit in UNITS:
        write(url, unit)
    seal(url, len(UNITS))


def snapshot(url: str) -> dict[str, bytes]:
    files = sorted(path for path in Path(url).rglob("*") if path.is_file())
    return {path.relative_to(url).as_posix(): path.read_bytes() for path in files}


@dataclass
class Store:
    url: str

    @property
    def files(self) -> dict[str, bytes]:
        return snapshot(self.url)

    def path(self, name: str) -> Path:
        return Path(self.url, name)


@pytest.fixture(params=["none", "zstd", "blosc", "none sharded", "zstd sharded"])
def codec(request) -> str:
    return request.param


@pytest.fixture
def store(tmp_path) -> Store:
    write_store(str(tmp_path / "store.zarr"))
    return Store(str(tmp_path / "store.zarr"))
