"""What nobody should do to a store, and what becomes of it: an error that says so, or no harm."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage
from fisher_ray.store import (
    ArraySpec,
    StoreWriter,
    create_store,
    describe,
    finished_units,
    load_arrays,
    open_features,
    save_arrays,
    seal,
    verify,
)
from fisher_ray.store.chunks import _zstd_bytes, checksum
from fisher_ray.store.documents import pack
from tests.store.conftest import UNITS, make_rows, make_spec, write, write_store


def rows_of(unit):
    return make_rows(unit.start, unit.stop)


@pytest.mark.s3
def test_names_that_look_like_patterns_remove_nothing_else(s3_url):
    for name in ("m1", "m[1]", "m?", "m*"):
        Storage(f"{s3_url}/{name}").write_bytes("a/b", b"x")
    Storage(f"{s3_url}/m[1]").remove("a")
    Storage(f"{s3_url}/m*").remove("")
    assert Storage(s3_url).list() == ["m1/a/b", "m?/a/b"]


@pytest.mark.s3
def test_a_group_beside_one_whose_name_looks_like_its_pattern_stays(s3_url):
    save_arrays(f"{s3_url}/m1", {"a": np.arange(2)}, {})
    for count in (3, 4):
        save_arrays(f"{s3_url}/m[1]", {"a": np.arange(count)}, {})
    assert [len(load_arrays(f"{s3_url}/{name}")[0]["a"]) for name in ("m1", "m[1]")] == [2, 4]


FORKING = """
import os, sys
from fisher_ray.store import open_features

store = open_features(sys.argv[1])
assert store.read("index", 0, 1).tolist() == [0]
child = os.fork()
if child == 0:
    os._exit(store.read("index", 1, 2).tolist() == [1])
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.s3
def test_a_store_that_was_opened_before_a_fork_is_read_behind_it(s3_url):
    write_store(f"{s3_url}/s")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, f"{s3_url}/s"]  # one without Ray
    assert subprocess.run(command, timeout=120, check=False).returncode == 1


def test_units_of_a_store_that_was_made_anew_meanwhile_are_not_taken(tmp_path):
    url = str(tmp_path / "s")
    create_store(url, make_spec(scale=1.0))
    late = StoreWriter(url)
    shutil.rmtree(url)
    create_store(url, make_spec(scale=0.25))
    late.write_unit(UNITS[0], rows_of(UNITS[0]))
    for unit in UNITS[1:]:
        write(url, unit)
    assert finished_units(url) == {1, 2}
    with pytest.raises(StoreError, match=r"unit-000000\.json is not of this store"):
        seal(url, 3)
    write(url, UNITS[0])
    seal(url, 3)
    np.testing.assert_array_equal(open_features(url).read("features", 0, 21), make_rows()["features"])


def test_what_a_late_writer_left_in_a_removed_store_is_no_unit_of_the_next(tmp_path):
    url = str(tmp_path / "s")
    create_store(url, make_spec())
    late = StoreWriter(url)
    shutil.rmtree(url)
    late.write_unit(UNITS[0], rows_of(UNITS[0]))
    assert finished_units(url) == set()
    create_store(url, make_spec(attributes={"model": "another"}))
    assert finished_units(url) == set()


def test_other_peoples_files_are_not_swept(tmp_path):
    (tmp_path / "thesis.partial").write_bytes(b"mine")
    write_store(str(tmp_path))
    assert (tmp_path / "thesis.partial").read_bytes() == b"mine"
    assert verify(str(tmp_path)) == ["thesis.partial: foreign, no manifest names it"]


def test_an_arrays_damaged_metadata_is_mended_and_not_sealed(tmp_path):
    create_store(str(tmp_path), make_spec())
    place = tmp_path / "labels" / "zarr.json"
    whole = place.read_bytes()
    place.write_bytes(whole.replace(b'"int64"', b'"uint64"'))
    for unit in UNITS:
        write(str(tmp_path), unit)
    seal(str(tmp_path), 3)
    assert place.read_bytes() == whole
    assert verify(str(tmp_path)) == []
    group = zarr.open_group(str(tmp_path), mode="r", use_consolidated=False)
    np.testing.assert_array_equal(group["labels"][:], make_rows()["labels"])


@pytest.mark.parametrize("change", [{"skipped": {"3": "gone"}}, {"num_rows": 7}, {"num_bytes": 1}, {"schema": 9}])
def test_a_seal_with_other_totals_than_the_manifests_is_found(tmp_path, change):
    write_store(str(tmp_path))
    content = json.loads((tmp_path / "seal.json").read_bytes())["content"]
    (tmp_path / "seal.json").write_bytes(pack({**content, **change}))
    assert verify(str(tmp_path)) == ["seal.json: its totals are not those of the manifests"]


def test_a_seal_of_another_kind_is_refused(tmp_path):
    write_store(str(tmp_path))
    content = json.loads((tmp_path / "seal.json").read_bytes())["content"]
    (tmp_path / "seal.json").write_bytes(pack({"schema": 1, "kind": "arrays", "files": content["files"]}))
    for look in (describe, open_features):
        with pytest.raises(StoreError, match="of arrays, not features"):
            look(str(tmp_path))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "[" * 2000 + "]" * 2000])
@pytest.mark.parametrize("name", ["seal.json", "manifest/unit-000001.json"])
def test_documents_that_are_no_json_of_ours_are_damaged_ones(tmp_path, name, value):
    write_store(str(tmp_path))
    (tmp_path / name).write_text(f'{{"content": {{"num_bytes": {value}}}, "crc32c": 0}}\n')
    assert any(line.startswith(name) for line in verify(str(tmp_path)))
    assert finished_units(str(tmp_path)) == ({0, 1, 2} if name == "seal.json" else {0, 2})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floating_point_numbers_are_not_read_as_others(tmp_path, dtype):
    create_store(str(tmp_path), make_spec(dtype=dtype, scale=1.0))
    for unit in UNITS:
        write(str(tmp_path), unit)
    seal(str(tmp_path), 3)
    with pytest.raises(StoreError, match="floating-point"):
        open_features(str(tmp_path)).read("features", 0, 4, out_dtype=np.int32)


@pytest.mark.parametrize("scale", [1e39, 1e-40])
def test_a_scale_beyond_float32_is_refused(tmp_path, scale):
    with pytest.raises(StoreError, match="beyond float32"):
        create_store(str(tmp_path), make_spec(scale=scale))


def test_what_no_reader_would_take_is_not_written(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        save_arrays(str(tmp_path / "a"), {"a": np.zeros([1] * 9)}, {})
    arrays = {"x": ArraySpec((1,), "float32", ("sample", "rank"))}
    with pytest.raises(StoreError, match="cannot be written"):
        create_store(str(tmp_path / "s"), make_spec(num_rows=2**26, unit_rows=2, chunk_rows=1, arrays=arrays))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="printable"):
        save_arrays(str(tmp_path / "a"), {"a\0b": np.zeros(1)}, {})


@pytest.mark.parametrize("reason", ["x" * 200_000, "cannot open '\udcff.png'"])
def test_any_reason_can_be_kept(tmp_path, reason):
    create_store(str(tmp_path), make_spec())
    for unit in UNITS:
        write(str(tmp_path), unit, skipped={9: reason} if unit.index == 1 else None)
    assert finished_units(str(tmp_path)) == {0, 1, 2}
    seal(str(tmp_path), 3)
    assert verify(str(tmp_path)) == []
    assert open_features(str(tmp_path)).skipped[9][:20] == reason[:20].replace("\udcff", "?")


def test_a_frame_that_promises_more_than_a_chunk_is_not_unpacked(tmp_path):
    write_store(str(tmp_path), "zstd")
    place = tmp_path / "features" / "c" / "0" / "0" / "0"
    packed = Zstd(level=1).encode(bytes(400 * 2**20))
    place.write_bytes(packed + checksum(packed).to_bytes(4, "little"))
    with pytest.raises(StoreError, match="cannot be decompressed"):
        open_features(str(tmp_path)).read("features", 0, 4)


@pytest.mark.parametrize("size", [1, 100, 255, 256, 70_000, 10**6])
def test_the_size_in_a_frame_is_that_of_its_content(size):
    assert _zstd_bytes(bytes(Zstd(level=1).encode(np.random.default_rng(0).bytes(size)))[:18]) == size


def test_a_pipe_in_a_manifests_place_is_not_waited_for(tmp_path):
    write_store(str(tmp_path))
    place = tmp_path / "manifest" / "unit-000001.json"
    place.unlink()
    os.mkfifo(place)
    assert "manifest/unit-000001.json: wrong checksum" in verify(str(tmp_path))[0]
