import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fisher_ray.errors import DataError, StoreError
from fisher_ray.records import Unit
from fisher_ray.storage import local
from fisher_ray.store import ArraySpec, StoreWriter, create_store, finished_units, open_features, seal, verify
from tests.store.conftest import UNITS, make_rows, make_spec, snapshot, write, write_store


def test_zarr_itself_reads_what_is_written(tmp_path, codec):
    url = str(tmp_path / "s")
    write_store(url, codec)
    group = zarr.open_group(url, mode="r")
    expected = make_rows()
    expected["features"] = expected["features"] / 0.25
    for name, values in expected.items():
        np.testing.assert_array_equal(group[name][:], values.astype(group[name].dtype))
    assert group["features"].metadata.dimension_names == ("sample", "class", "rank")
    assert group["features"].chunks == (4, 3, 5)
    assert group["features"].attrs["scale"] == 0.25
    assert group.attrs["model"] == "abc"
    assert group.attrs["fisher_ray"]["schema"] == 1


def test_xarray_opens_it_with_named_dimensions_and_without_a_warning(tmp_path, codec):
    write_store(str(tmp_path), codec)
    with xarray.open_zarr(str(tmp_path), chunks=None) as found:
        assert dict(found.sizes) == {"sample": 21, "class": 3, "rank": 5}
        assert found["features"].dims == ("sample", "class", "rank")
        scaled = found["features"].values.astype(np.float32) * found["features"].attrs["scale"]
    np.testing.assert_array_equal(scaled, make_rows()["features"])
    group = zarr.open_group(str(tmp_path), mode="r")
    assert sorted(group.array_keys()) == ["features", "index", "labels", "logits"]


def test_chunk_files_are_the_bytes_that_zarr_writes(tmp_path, codec):
    url, other = str(tmp_path / "s"), str(tmp_path / "zarr")
    write_store(url, codec)
    ours = snapshot(url)
    create_store(other, make_spec(codec))
    group = zarr.open_group(other, mode="r+", zarr_format=3)
    rows = make_rows()
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, values in rows.items():
            group[name][:] = values / 0.25 if name == "features" else values
    chunks = {name: raw for name, raw in snapshot(other).items() if "/c/" in name}
    assert len(chunks) == (12 if "sharded" in codec else 24)
    assert {name: ours[name] for name in chunks} == chunks


def test_chunk_files_depend_on_nothing_but_the_rows(tmp_path, codec):
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    write_store(first, codec)
    create_store(second, make_spec(codec))
    for unit in [*reversed(UNITS), UNITS[1]]:
        write(second, unit)
    seal(second, 3)
    assert snapshot(first) == snapshot(second)


def test_the_attempt_changes_the_manifest_alone_and_not_the_seal(tmp_path):
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    write_store(first)
    create_store(second, make_spec())
    for unit in UNITS:
        write(second, unit, attempt=2 if unit.index == 1 else 1)
    seal(second, 3)
    before, after = snapshot(first), snapshot(second)
    assert [name for name in before if before[name] != after[name]] == ["manifest/unit-000001.json"]


def test_bytes_written_are_those_of_the_unit_s_files(tmp_path):
    url = str(tmp_path / "s")
    create_store(url, make_spec())
    empty = snapshot(url)
    num_bytes = write(url, UNITS[0])
    assert num_bytes == sum(len(raw) for name, raw in snapshot(url).items() if name not in empty)


def test_creating_again_changes_nothing_and_clears_what_killed_writers_left(tmp_path):
    url = tmp_path / "s"
    create_store(str(url), make_spec())
    assert finished_units(str(url)) == set()
    write(str(url), UNITS[0])
    before = snapshot(str(url))
    (url / "features" / "c" / "0" / "0" / ".0.123.partial").write_bytes(b"half")
    (url / "labels" / "zarr.json").unlink()
    create_store(str(url), make_spec())
    assert snapshot(str(url)) == before


@pytest.mark.parametrize("name", ["chunk_rows", "attributes", "codec", "arrays"])
def test_another_store_at_the_same_place_is_refused(tmp_path, name):
    url = str(tmp_path / "s")
    create_store(url, make_spec())
    arrays = {"features": ArraySpec((3, 6), "float16", ("sample", "class", "rank"))}
    change = {"chunk_rows": 2, "attributes": {"model": "def"}, "codec": "zstd", "arrays": arrays}[name]
    with pytest.raises(StoreError, match="holds another store"):
        create_store(url, replace(make_spec(), **{name: change}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit_rows": 6}, "multiple of chunk_rows"),
        ({"num_rows": 0}, "not all positive"),
        ({"shard_rows": 6}, "two writers would share a shard"),
        ({"shard_rows": 16}, "two writers would share a shard"),
        ({"codec": "lz4"}, "'lz4' is not one of none, zstd, blosc"),
        ({"arrays": {}}, "without arrays"),
        ({"arrays": {"a": ArraySpec((2,), "float16", ("sample",))}}, "do not name each axis"),
        ({"arrays": {"a": ArraySpec((), "object", ("sample",))}}, "dtype 'object'"),
        ({"arrays": {"a": ArraySpec((), "int64", ("sample",), 0.5)}}, "scale"),
        ({"arrays": {"a/b": ArraySpec((), "int64", ("sample",))}}, "without '/'"),
        ({"arrays": {"manifest": ArraySpec((), "int64", ("sample",))}}, "taken"),
        ({"attributes": {"x": float("nan")}}, "not JSON"),
        ({"attributes": {"fisher_ray": 1}}, "this program's own"),
    ],
)
def test_specifications_that_break_a_rule_are_refused(tmp_path, changes, message):
    with pytest.raises(StoreError, match=message):
        create_store(str(tmp_path / "s"), make_spec(**changes))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("unit", [Unit(0, 0, 4), Unit(1, 0, 8), Unit(0, 2, 10), Unit(2, 16, 24), Unit(3, 24, 32)])
def test_units_that_are_not_the_store_s_are_refused(tmp_path, unit):
    url = str(tmp_path / "s")
    create_store(url, make_spec())
    with pytest.raises(StoreError, match="not one of this store's units"):
        write(url, unit)
    assert finished_units(url) == set()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", np.zeros((8, 3, 4), np.float32), "shape"),
        ("features", np.zeros((7, 3, 5), np.float32), "shape"),
        ("labels", np.zeros(8, np.float32), "does not cast"),
        ("other", np.zeros(8), "Give exactly these"),
    ],
)
def test_arrays_that_are_not_the_store_s_are_refused(tmp_path, name, value, message):
    url = str(tmp_path / "s")
    create_store(url, make_spec())
    with pytest.raises(StoreError, match=message):
        StoreWriter(url).write_unit(UNITS[0], {**make_rows(0, 8), name: value})


@pytest.mark.parametrize(
    ("bad", "message"),
    [(np.nan, "NaN"), (np.inf, "infinite"), (1e5, r"100000\.0 does not fit float16.*store.dtype: float32")],
)
def test_a_value_that_cannot_be_stored_is_told_with_its_array_and_row(tmp_path, bad, message):
    url = str(tmp_path / "s")
    create_store(url, make_spec())
    rows = make_rows(8, 16)
    rows["features"][5, 1, 2] = bad
    with pytest.raises(DataError, match=f"'features', row 13: .*{message}") as caught:
        StoreWriter(url).write_unit(UNITS[1], rows)
    assert caught.value.row == 13
    assert finished_units(url) == set()
    rows["index"] += 100
    with pytest.raises(DataError) as caught:
        StoreWriter(url).write_unit(UNITS[1], rows)
    assert caught.value.row == 113


def test_an_integer_that_does_not_fit_is_refused(tmp_path):
    url = str(tmp_path / "s")
    create_store(url, make_spec(num_rows=2, arrays={"labels": ArraySpec((), "int8", ("sample",))}))
    with pytest.raises(DataError, match="300 does not fit int8") as caught:
        StoreWriter(url).write_unit(Unit(0, 0, 2), {"labels": np.array([1, 300])})
    assert caught.value.row == 1


@given(scale_exponent=st.integers(-20, 20), seed=st.integers(0, 2**31))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_scale_that_is_a_power_of_two_costs_nothing_but_the_cast(tmp_path_factory, scale_exponent, seed):
    url, scale = str(tmp_path_factory.mktemp("s")), 2.0**scale_exponent
    arrays = {"features": ArraySpec((7,), "float16", ("sample", "rank"), scale)}
    create_store(url, make_spec(num_rows=6, arrays=arrays))
    values = np.random.default_rng(seed).standard_normal((6, 7)).astype(np.float32)
    StoreWriter(url).write_unit(Unit(0, 0, 6), {"features": values * np.float32(scale)})
    expected = values.astype(np.float16).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(open_features(url, allow_partial=True).read("features", 0, 6), expected)


@pytest.mark.parametrize("given_rows", ["all", "kept"])
def test_skipped_rows_are_marked_and_told(tmp_path, given_rows):
    url, skipped = str(tmp_path / "s"), {9: "not a picture", 15: "label 12"}
    create_store(url, make_spec())
    rows = make_rows(8, 16)
    rows["features"][1] = np.nan  # of a skipped row, so no matter
    if given_rows == "kept":
        rows = {name: np.delete(values, [1, 7], axis=0) for name, values in rows.items()}
    StoreWriter(url).write_unit(UNITS[1], rows, attempt=1, skipped=skipped)
    for unit in (UNITS[0], UNITS[2]):
        write(url, unit)
    seal(url, 3)
    store = open_features(url)
    assert store.skipped == open_features(url, allow_partial=True).skipped == skipped
    assert np.isnan(store.read("features", 9, 10)).all()
    np.testing.assert_array_equal(store.read("index", 8, 16), [8, -1, 10, 11, 12, 13, 14, -1])
    kept = np.delete(np.arange(21), [9, 15])
    blocks = list(store.iter_chunks(["features", "index"]))
    np.testing.assert_array_equal(np.concatenate([block["index"] for block in blocks]), kept)
    np.testing.assert_array_equal(np.concatenate([b["features"] for b in blocks]), make_rows()["features"][kept])
    assert verify(url) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_unit_without_any_row_left_can_be_written(tmp_path, dtype):
    url = str(tmp_path / "s")
    create_store(url, make_spec(dtype=dtype, scale=1.0))
    writer = StoreWriter(url)
    writer.write_unit(UNITS[1], writer.no_rows(), attempt=3, skipped=dict.fromkeys(range(8, 16), "worker died"))
    for unit in (UNITS[0], UNITS[2]):
        write(url, unit)
    seal(url, 3)
    index = [block["index"] for block in open_features(url).iter_chunks(["index"])]
    np.testing.assert_array_equal(np.concatenate(index), [*range(8), *range(16, 21)])


def test_skipped_rows_of_another_unit_are_refused(tmp_path):
    create_store(str(tmp_path), make_spec())
    with pytest.raises(StoreError, match=r"\[20\] are not rows of unit 0"):
        write(str(tmp_path), UNITS[0], skipped={20: "x"})


def test_a_unit_is_finished_by_its_whole_manifest_and_chunks(tmp_path):
    url = tmp_path / "s"
    assert finished_units(str(url)) == set()
    create_store(str(url), make_spec())
    for unit in UNITS:
        write(str(url), unit)
    assert finished_units(str(url)) == {0, 1, 2}
    manifest = url / "manifest" / "unit-000001.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    (url / "labels" / "c" / "0").unlink()
    assert finished_units(str(url)) == {2}
    with pytest.raises(StoreError, match="units 1 are not finished"):
        seal(str(url), 3)
    write(str(url), UNITS[1])
    with pytest.raises(StoreError, match=r"chunks labels/c/0 are missing\. Write unit 0 again"):
        seal(str(url), 3)
    write(str(url), UNITS[0])
    seal(str(url), 3)
    assert verify(str(url)) == []


def test_another_number_of_units_is_not_sealed(tmp_path):
    create_store(str(tmp_path), make_spec())
    with pytest.raises(StoreError, match="3 units of 8 rows, not 2"):
        seal(str(tmp_path), 2)


def test_a_sealed_store_is_not_written_to(store):
    before = store.files
    with pytest.raises(StoreError, match="is sealed"):
        write(store.url, UNITS[0], attempt=2)
    create_store(store.url, make_spec())
    seal(store.url, 3)
    assert store.files == before


def test_a_manifest_comes_after_its_chunks_are_there_for_good(tmp_path, monkeypatch):
    """Contents, names and new folders: after the power is lost no manifest tells of what is not there."""
    url, done, rename, sync = tmp_path / "s", [], os.replace, local._sync_folder
    create_store(str(url), make_spec())

    def noting(what, act):
        return lambda *paths: (act(*paths), done.append((what, str(paths[-1]))))

    monkeypatch.setattr(os, "replace", noting("named", rename))
    monkeypatch.setattr(local, "_sync_folder", noting("kept", sync))
    write(str(url), Unit(0, 0, 8))
    place = next(number for number, (what, name) in enumerate(done) if name.startswith(f"{url}/manifest"))
    before = done[:place]
    chunks = [name for what, name in before if what == "named"]
    assert len(chunks) >= 3
    for chunk in chunks:
        inside = [folder for folder in Path(chunk).parents if folder == url or url in folder.parents]
        kept = [name for what, name in before[before.index(("named", chunk)) :] if what == "kept"]
        assert {str(folder) for folder in inside} <= set(kept)
    assert ("kept", str(url / "manifest")) in done[place:]
    assert ("kept", str(url)) in done[place:]  # where the manifests' folder was made


def test_a_new_store_s_own_place_is_kept_too(tmp_path, monkeypatch):
    kept, sync = [], local._sync_folder
    monkeypatch.setattr(local, "_sync_folder", lambda folder: (sync(folder), kept.append(folder)))
    create_store(str(tmp_path / "run" / "features" / "s"), make_spec())
    assert {tmp_path, tmp_path / "run", tmp_path / "run" / "features"} <= set(kept)
