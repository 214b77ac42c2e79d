"""The feature store's speed beside plain files of the same bytes, and in S3 beside s3fs' own calls.

``python -m tests.benchmarks.store [--rounds 7] [--units 4] [--folder /tmp] [--no-s3]``: rounds are interleaved in one
process. A store has 13 small objects, and one a unit, beside its chunks; in S3 that counts where units are few.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisher_ray.records import Unit
from fisher_ray.store import ArraySpec, StoreSpec, StoreWriter, create_store, open_features, seal
from tests.s3_server import KEY, SECRET, S3Server, make_bucket, s3_environment

UNIT_ROWS, CHUNK_ROWS, COLUMNS = 2048, 1024, 10240
CONCURRENCY = {"local": 2, "s3": 8}
"""As many threads as the store itself uses."""


def spec(num_units: int) -> StoreSpec:
    """One array of 10,240 columns."""
    arrays = {"features": ArraySpec((COLUMNS,), "float16", ("sample", "rank"))}
    return StoreSpec(num_units * UNIT_ROWS, UNIT_ROWS, CHUNK_ROWS, "none", arrays)


def write_store(url: str, values: list[np.ndarray], *, at_once: int = 1) -> None:
    """Write and seal a store, so many units at once, as workers do; a unit's chunks are written at once anyway."""
    create_store(url, spec(len(values)))
    writer = StoreWriter(url)

    def write(number: int) -> None:
        unit = Unit(number, number * UNIT_ROWS, (number + 1) * UNIT_ROWS)
        writer.write_unit(unit, {"features": values[number]})

    with ThreadPoolExecutor(at_once) as threads:
        list(threads.map(write, range(len(values))))
    seal(url, len(values))


def read_store(url: str, *, raw: bool, where: str = "local") -> None:
    """Read a store a chunk at a time, in as many threads as the files beside it."""
    store = open_features(url)
    read = store.read_raw if raw else store.read
    with ThreadPoolExecutor(CONCURRENCY[where]) as threads:
        spans = range(0, store.num_rows, CHUNK_ROWS)
        list(threads.map(lambda first: len(read("features", first, first + CHUNK_ROWS)), spans))


def write_plain(folder: Path, values: list[np.ndarray]) -> None:
    """Write the same bytes in files of a chunk's size, each on the disk before the next, as the store's are."""
    folder.mkdir()

    def write(part: tuple[int, np.ndarray]) -> None:
        with (folder / str(part[0])).open("wb") as file:
            file.write(part[1].data)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(CONCURRENCY["local"]) as threads:
        list(threads.map(write, enumerate(pieces(values))))


def read_plain(folder: Path) -> None:
    """Read them."""

    def read(path: Path) -> None:
        len(np.fromfile(path, np.uint8))

    with ThreadPoolExecutor(CONCURRENCY["local"]) as threads:
        list(threads.map(read, sorted(folder.iterdir())))


def pieces(values: list[np.ndarray]) -> list[np.ndarray]:
    """Return chunks."""
    return [rows[first : first + CHUNK_ROWS] for rows in values for first in range(0, UNIT_ROWS, CHUNK_ROWS)]


def write_objects(files: Any, url: str, values: list[np.ndarray]) -> None:
    """Write the same bytes by s3fs."""

    def write(part: tuple[int, np.ndarray]) -> None:
        files.pipe_file(f"{url}/{part[0]}", part[1].tobytes())

    with ThreadPoolExecutor(CONCURRENCY["s3"]) as threads:
        list(threads.map(write, enumerate(pieces(values))))


def read_objects(files: Any, url: str) -> None:
    """Read them."""
    with ThreadPoolExecutor(CONCURRENCY["s3"]) as threads:
        names = files.ls(url, detail=False)
        list(threads.map(lambda name: len(files.cat_file(name)), names))


def compare(
    what: str,
    num_bytes: int,
    rounds: int,
    ways: dict[str, Callable[[], Any]],
    before: Callable[[], object] = lambda: None,
) -> None:
    """Print each way's rate, and its share of the first's, medians of interleaved rounds; ``before`` is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            before()
            start = time.perf_counter()
            way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(ways))
    for name, found in seconds.items():
        shares = [a / b for a, b in zip(seconds[first], found, strict=True)]
        rate = num_bytes / statistics.median(found) / 1e6
        print(f"{what:12} {name:24} {rate:7.0f} MB/s  {100 * statistics.median(shares):4.0f} %", flush=True)


@contextmanager
def bucket() -> Iterator[tuple[Any, str]]:
    """Yield s3fs and a bucket of a server on loopback."""
    import s3fs

    server = S3Server()
    os.environ |= s3_environment(server.endpoint)
    try:
        files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=server.endpoint, use_listings_cache=False)
        yield files, make_bucket(server.endpoint, "benchmark")
    finally:
        server.kill()


def measure_local(folder: str, values: list[np.ndarray], num_bytes: int, rounds: int) -> None:
    """Print the rates on a disk."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        plain, store = Path(name, "plain"), Path(name, "store.zarr")

        def clear() -> None:
            for place in (plain, store):
                shutil.rmtree(place, ignore_errors=True)

        write = {
            "plain files, on the disk": lambda: write_plain(plain, values),
            "store": lambda: write_store(str(store), values),
        }
        compare("local write", num_bytes, rounds, write, clear)
        write_plain(plain, values)
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        print(f"bytes on the disk: {size / num_bytes:.4f} of the data's")
        read = {
            "plain files": lambda: read_plain(plain),
            "store, as stored": lambda: read_store(str(store), raw=True),
            "store, as float32": lambda: read_store(str(store), raw=False),
        }
        compare("local read", num_bytes, rounds, read)


def measure_s3(values: list[np.ndarray], num_bytes: int, rounds: int) -> None:
    """Print the rates in a bucket."""
    with bucket() as (files, url):
        plain, store = f"{url}/plain", f"{url}/store"

        def clear() -> None:
            for place in (plain, store):
                if files.exists(place):
                    files.rm(place, recursive=True)

        write = {
            "s3fs": lambda: write_objects(files, plain, values),
            "store": lambda: write_store(store, values, at_once=CONCURRENCY["s3"] // 2),
        }
        compare("S3 write", num_bytes, rounds, write, clear)
        write_objects(files, plain, values)
        read = {
            "s3fs": lambda: read_objects(files, plain),
            "store, as stored": lambda: read_store(store, raw=True, where="s3"),
        }
        compare("S3 read", num_bytes, rounds, read)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="The feature store's speed beside plain files.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--units", type=int, default=4, help=f"of {UNIT_ROWS} rows and 42 MB each")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--no-s3", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as a worker has
    chance = np.random.default_rng(0)
    values = [chance.standard_normal((UNIT_ROWS, COLUMNS), np.float32).astype(np.float16) for _ in range(given.units)]
    num_bytes = sum(rows.nbytes for rows in values)
    measure_local(given.folder, values, num_bytes, given.rounds)
    if not given.no_s3:
        measure_s3(values, num_bytes, given.rounds)


if __name__ == "__main__":
    main()
