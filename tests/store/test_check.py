import json

import numpy as np
import pytest
import yaml
import zarr

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage
from fisher_ray.store import create_store, describe, save_arrays, verify
from tests.store.conftest import UNITS, Store, make_spec, write, write_store


@pytest.fixture(params=["features", "zstd features", "arrays"])
def whole(request, tmp_path) -> Store:
    url = str(tmp_path / "s")
    if request.param == "arrays":
        save_arrays(url, {"a": np.arange(10.0), "b": np.float32(3)}, {"kind": "metric"})
    else:
        write_store(url, "zstd" if request.param.startswith("zstd") else "none")
    return Store(url)


def test_a_whole_store_has_no_problem(whole):
    assert verify(whole.url) == []


@pytest.mark.parametrize("damage", ["flip first", "flip last", "truncate", "delete"])
def test_damage_to_any_file_is_named(whole, damage):
    for name, raw in whole.files.items():
        path = whole.path(name)
        if damage == "delete":
            path.unlink()
        else:
            place = 0 if damage == "flip first" else len(raw) - 1
            flipped = raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :]
            path.write_bytes(raw[:-1] if damage == "truncate" else flipped)
        problems = verify(whole.url)
        assert len(problems) == 1, problems
        assert problems[0].startswith(f"{name}: ")
        if "/c/" in name:
            assert {"delete": "missing", "truncate": "wrong size"}.get(damage, "wrong checksum") in problems[0]
        path.write_bytes(raw)
    assert verify(whole.url) == []


def test_a_chunk_in_another_s_place_is_named(store):
    store.path("index/c/1").write_bytes(store.path("index/c/0").read_bytes())
    assert verify(store.url) == ["index/c/1: wrong checksum"]


def test_foreign_files_are_named_and_leftovers_are_not(whole):
    (whole.path("notes.txt")).write_text("hello")
    (whole.path(".x.0123.partial")).write_bytes(b"half")
    problems = verify(whole.url)
    assert len(problems) == 1
    assert problems[0].startswith("notes.txt: foreign")


def test_all_problems_are_told_at_once(store):
    store.path("labels/c/0").unlink()
    store.path("index/c/0").write_bytes(b"short")
    store.path("zarr.json").write_bytes(b"{}")
    assert [problem.partition(":")[0] for problem in verify(store.url)] == ["index/c/0", "labels/c/0", "zarr.json"]


def test_a_store_in_the_making_is_told_to_be_unsealed(tmp_path):
    url = str(tmp_path)
    create_store(url, make_spec())
    write(url, UNITS[0])
    write(url, UNITS[1])
    (tmp_path / "manifest" / "unit-000001.json").unlink()  # its chunks are no foreign files
    assert [problem.partition(",")[0] for problem in verify(url)] == ["seal.json: missing"]
    (tmp_path / "labels" / "c" / "0").write_bytes(b"torn")
    (tmp_path / "labels" / "zarr.json").unlink()
    (tmp_path / "manifest" / "unit-000002.json").write_bytes(b"{")
    (tmp_path / "foreign").write_bytes(b"")
    names = [problem.partition(":")[0] for problem in verify(url)]
    assert names == ["seal.json", "labels/zarr.json", "manifest/unit-000002.json", "foreign", "labels/c/0"]


@pytest.mark.parametrize("check", [verify, describe])
def test_what_is_no_store_is_refused(tmp_path, check):
    zarr.create_group(str(tmp_path / "user"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_bytes(b"{")
    (tmp_path / "file").write_bytes(b"")
    for name in ("gone", "user", "broken", "file", ""):
        with pytest.raises(StoreError) as caught:
            check(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


def test_a_description_is_plain_and_complete(whole):
    found = describe(whole.url)
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert found["sealed"] is True
    assert found["num_bytes"] == sum(len(raw) for raw in whole.files.values())


def test_a_description_counts_units_and_rows(tmp_path):
    create_store(str(tmp_path), make_spec())
    write(str(tmp_path), UNITS[2])
    found = describe(str(tmp_path))
    assert (found["sealed"], found["units"], found["num_rows"]) == (False, {"planned": 3, "finished": 1}, 21)
    assert found["arrays"]["features"]["shape"] == [21, 3, 5]
    assert found["arrays"]["features"]["dims"] == ["sample", "class", "rank"]
    assert found["attributes"] == {"model": "abc", "dims": [1, 2]}


def test_manifests_tell_chunks_apart(store):
    manifest = json.loads(store.files["manifest/unit-000000.json"])["content"]
    entries = [item for chunks in manifest["arrays"].values() for item in chunks]
    assert len({item["crc32c"] for item in entries}) == len(entries) == 8


@pytest.mark.s3
def test_damage_in_s3_is_named(s3_url):
    write_store(s3_url)
    storage = Storage(s3_url)
    assert verify(s3_url) == []
    storage.remove("labels/c/0")
    storage.write_bytes("index/c/1", b"x" * storage.size("index/c/1"))
    assert verify(s3_url) == ["index/c/1: wrong checksum", "labels/c/0: missing"]
    assert describe(s3_url)["num_rows"] == 21
    with pytest.raises(StoreError, match="is not a store"):
        verify(f"{s3_url}/gone")
