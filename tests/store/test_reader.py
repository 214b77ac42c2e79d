import pickle
import shutil

import numpy as np
import pytest

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage
from fisher_ray.store import create_store, open_features, save_arrays, seal, verify
from tests.store.conftest import UNITS, make_rows, make_spec, write, write_store


def test_every_range_of_rows_reads_as_it_was_written(tmp_path, codec):
    write_store(str(tmp_path), codec)
    store, expected = open_features(str(tmp_path)), make_rows()
    for start in range(22):
        for stop in range(start, 22):
            for name, values in expected.items():
                read = store.read(name, start, stop)
                np.testing.assert_array_equal(read, values[start:stop])
                assert read.shape == values[start:stop].shape
                assert read.flags.writeable


def test_a_part_of_a_shard_is_read_without_the_rest(tmp_path, monkeypatch):
    write_store(str(tmp_path), "none sharded")
    store, read = open_features(str(tmp_path)), Storage.read_bytes
    asked = []

    def noted(storage, name, start=None, stop=None):
        asked.append((name, start, stop))
        return read(storage, name, start, stop)

    monkeypatch.setattr(Storage, "read_bytes", noted)
    monkeypatch.setattr(Storage, "read_array", lambda *_: pytest.fail("a whole shard was read"))
    np.testing.assert_array_equal(store.read("labels", 5, 7), make_rows()["labels"][5:7])
    assert asked == [("labels/c/0", -36, None), ("labels/c/0", 36, 72)]


def test_types_come_back_as_promised(store):
    opened = open_features(store.url)
    types = {name: opened.read(name, 1, 9).dtype.name for name in opened.arrays}
    assert types == {"features": "float32", "labels": "int64", "index": "int64", "logits": "float32"}
    assert opened.read("features", 0, 5, out_dtype=np.float64).dtype == np.float64
    raw = opened.read_raw("features", 0, 21)
    assert raw.dtype == np.float16
    np.testing.assert_array_equal(raw, make_rows()["features"] * 4)


def test_the_store_tells_what_it_is(store):
    opened = pickle.loads(pickle.dumps(open_features(store.url)))
    assert (opened.url, opened.num_rows, opened.chunk_rows, opened.skipped) == (store.url, 21, 4, {})
    assert opened.attributes == {"model": "abc", "dims": [1, 2]}
    assert opened.arrays["features"].shape == (21, 3, 5)


@pytest.mark.parametrize("rows", [range(21), range(3, 18), range(4, 8), range(20, 21), range(5, 5)])
def test_chunks_tile_the_rows(store, rows):
    blocks = list(open_features(store.url).iter_chunks(["index", "features"], rows))
    index = np.concatenate([block["index"] for block in blocks]) if blocks else []
    np.testing.assert_array_equal(index, list(rows))
    assert all(len(block["features"]) == len(block["index"]) <= 4 for block in blocks)


def test_a_reader_that_stops_early_leaves_no_thread(store):
    import threading

    blocks = open_features(store.url).iter_chunks(["index"])
    next(blocks)
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fisher-ray-prefetch")]


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("gone", 0, 1), ("labels", -1, 2), ("labels", 0, 22), ("labels", 3, 2)]
)
def test_what_the_store_does_not_have_is_refused(store, name, start, stop):
    with pytest.raises(StoreError):
        open_features(store.url).read(name, start, stop)


def test_a_store_without_its_seal_is_refused(tmp_path):
    url = str(tmp_path)
    create_store(url, make_spec())
    write(url, UNITS[0], skipped={3: "bad"})
    with pytest.raises(StoreError, match=r"no seal\.json.*Run the job again") as caught:
        open_features(url)
    assert url in str(caught.value)
    partial = open_features(url, allow_partial=True)
    assert partial.skipped == {3: "bad"}
    np.testing.assert_array_equal(partial.read("index", 4, 8), [4, 5, 6, 7])
    with pytest.raises(StoreError, match="index/c/2 is missing"):
        partial.read("index", 4, 12)


@pytest.mark.parametrize(
    ("units", "spans"),
    [
        ([], []),
        ([1], [range(8, 16)]),
        ([0, 1], [range(16)]),
        ([0, 2], [range(8), range(16, 21)]),
        ([0, 1, 2], [range(21)]),
    ],
)
def test_a_store_without_its_seal_says_which_rows_are_there_and_has_them_read(tmp_path, units, spans):
    url, wanted = str(tmp_path), [row for span in spans for row in span if row != 9]
    create_store(url, make_spec())
    for unit in units:
        write(url, UNITS[unit], skipped={9: "bad"} if unit == 1 else None)
    partial = open_features(url, allow_partial=True)
    assert partial.finished_rows == spans
    found = [row for block in partial.iter_chunks(["index"]) for row in block["index"]]
    assert found == wanted
    for options in ({}, {"shuffle": True}):
        batches = partial.iter_batches(5, ["index"], **options)
        rows = [row for batch in batches for row in batch["index"]]
        assert sorted(rows) == wanted
        assert len(batches) == -(-len(wanted) // 5)


def test_a_missing_chunk_is_an_error_and_never_a_value(store):
    store.path("features/c/2/0/0").unlink()
    opened = open_features(store.url)
    opened.read("features", 0, 8)
    with pytest.raises(StoreError, match="features/c/2/0/0 is missing"):
        opened.read("features", 0, 21)
    with pytest.raises(StoreError, match="features/c/2/0/0 is missing"):
        list(opened.iter_chunks(["features"]))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "append"])
def test_a_damaged_chunk_is_an_error_that_names_it(tmp_path, codec, damage):
    write_store(str(tmp_path), codec)
    chunk = tmp_path / "features" / "c" / "1" / "0" / "0"
    raw = chunk.read_bytes()
    flipped = raw[:7] + bytes([raw[7] ^ 4]) + raw[8:]
    chunk.write_bytes({"flip": flipped, "truncate": raw[:-10], "empty": b"", "append": raw + b"x"}[damage])
    with pytest.raises(StoreError, match="features/c/1/0/0 is corrupt"):
        open_features(str(tmp_path)).read("features", 0, 21)


def test_every_flipped_bit_of_a_chunk_is_noticed(store):
    chunk = store.path("labels/c/0")
    raw = chunk.read_bytes()
    opened = open_features(store.url)
    for position in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        chunk.write_bytes(flipped)
        with pytest.raises(StoreError, match="labels/c/0"):
            opened.read("labels", 0, 1)


def test_changed_group_attributes_and_seals_are_refused(store):
    for name in ("zarr.json", "seal.json"):
        raw = store.path(name).read_bytes()
        for position in range(0, len(raw), 7):
            store.path(name).write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
            with pytest.raises(StoreError):
                open_features(store.url)
        store.path(name).write_bytes(raw)


def test_what_is_no_feature_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is not a store"):
        open_features(str(tmp_path / "gone"))
    save_arrays(str(tmp_path / "a"), {"x": np.ones(2)}, {})
    with pytest.raises(StoreError, match="group of arrays, not a feature store"):
        open_features(str(tmp_path / "a"))


@pytest.mark.s3
def test_a_feature_store_in_s3_goes_there_and_back(s3_url, codec):
    url = f"{s3_url}/train.zarr"
    create_store(url, make_spec(codec))
    for unit in UNITS:
        write(url, unit)
    with pytest.raises(StoreError, match=r"seal\.json"):
        open_features(url)
    seal(url, 3)
    store = open_features(url)
    for name, values in make_rows().items():
        np.testing.assert_array_equal(store.read(name, 0, 21), values)
        np.testing.assert_array_equal(np.concatenate([b[name] for b in store.iter_chunks([name])]), values)
        assert store.read_raw(name, 0, 4).flags.writeable
    assert verify(url) == []


@pytest.mark.parametrize("above", [False, True])
def test_a_folder_or_a_file_in_the_place_of_a_chunk_is_a_chunk_that_is_missing(tmp_path, above):
    write_store(str(tmp_path), "none")
    chunk = tmp_path / "index" / "c" / "2"
    if above:
        chunk = tmp_path / "features" / "c" / "2"
        shutil.rmtree(chunk)
        chunk.write_bytes(b"no folder")
    else:
        chunk.unlink()
        chunk.mkdir()
    name = "features" if above else "index"
    with pytest.raises(StoreError, match=rf"{name}/c/2.* is missing"):
        open_features(str(tmp_path)).read(name, 0, 21)


@pytest.mark.parametrize("size", [-1, 1, 200])
def test_a_chunk_that_is_too_long_or_too_short_is_corrupt(tmp_path, size):
    write_store(str(tmp_path), "none")
    path = tmp_path / "features" / "c" / "1" / "0" / "0"
    data = path.read_bytes()
    path.write_bytes(data[:size] if size < 0 else data + bytes(size))
    for read in (lambda store: store.read("features", 0, 21), lambda store: store.read_raw("features", 4, 8)):
        with pytest.raises(StoreError, match=r"features/c/1/0/0 is corrupt"):
            read(open_features(str(tmp_path)))
    path.write_bytes(b"")
    with pytest.raises(StoreError, match=r"features/c/1/0/0 is corrupt"):
        open_features(str(tmp_path)).read("features", 0, 21)
