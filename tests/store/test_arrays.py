import subprocess
import sys

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fisher_ray.errors import StorageError, StoreError
from fisher_ray.storage import Storage
from fisher_ray.store import arrays as arrays_module
from fisher_ray.store import load_arrays, open_arrays, save_arrays, verify
from tests.store.conftest import make_rows, snapshot

DTYPES = [np.bool_, np.int8, np.int64, np.uint16, np.float16, np.float32, np.float64]
ANY_ARRAY = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))
SOME = {"eigvals": np.linspace(1, 0, 7), "pairs": np.arange(12).reshape(6, 2), "bias": np.float32(0.1)}


@given(values=st.dictionaries(st.sampled_from(["a", "b", "c"]), ANY_ARRAY, min_size=1))
@settings(max_examples=40)
def test_any_arrays_go_there_and_back_bit_for_bit(tmp_path_factory, values):
    url = str(tmp_path_factory.mktemp("g"))
    save_arrays(url, values, {"n": 1, "text": "é", "list": [1.5, None]})
    loaded, attributes = load_arrays(url)
    assert attributes == {"n": 1, "text": "é", "list": [1.5, None]}
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert loaded[name].tobytes() == value.tobytes()
    assert verify(url) == []


def test_arrays_are_cut_into_chunks_of_bounded_size_that_zarr_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_module, "CHUNK_BYTES", 1000)
    values = {"wide": np.arange(700.0).reshape(7, 100), "long": np.arange(999), "odd": np.arange(30.0)[::-2]}
    save_arrays(str(tmp_path), values, {})
    group = zarr.open_group(str(tmp_path), mode="r")
    assert (group["wide"].chunks, group["long"].chunks) == ((1, 100), (125,))
    loaded, _ = load_arrays(str(tmp_path))
    for name, value in values.items():
        np.testing.assert_array_equal(group[name][:], value)
        np.testing.assert_array_equal(loaded[name], value)


def test_the_same_arrays_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        save_arrays(str(tmp_path / name), SOME, {"x": 1})
    assert snapshot(str(tmp_path / "a")) == snapshot(str(tmp_path / "b"))


def test_a_group_is_replaced_whole(tmp_path):
    save_arrays(str(tmp_path), {"old": np.ones(9), "eigvals": np.ones(99)}, {"old": 1})
    save_arrays(str(tmp_path), SOME, {"new": 1})
    loaded, attributes = load_arrays(str(tmp_path))
    assert loaded.keys() == SOME.keys()
    assert attributes == {"new": 1}
    assert verify(str(tmp_path)) == []


def test_the_same_content_again_leaves_the_seal_and_mends_what_has_changed(tmp_path, monkeypatch):
    save_arrays(str(tmp_path), SOME, {"x": 1})
    good = snapshot(str(tmp_path))
    changed, missing = tmp_path / "eigvals/c/0", tmp_path / "pairs/c/0/0"
    changed.write_bytes(bytes(len(changed.read_bytes())))
    missing.unlink()
    touched, write = [], Storage.write_bytes

    def noted(storage, name, data):
        touched.append(name)
        write(storage, name, data)

    monkeypatch.setattr(Storage, "remove", lambda *_: pytest.fail("something was removed"))
    monkeypatch.setattr(Storage, "write_bytes", noted)
    save_arrays(str(tmp_path), SOME, {"x": 1})
    assert sorted(touched) == sorted(path.relative_to(tmp_path).as_posix() for path in (changed, missing))
    assert snapshot(str(tmp_path)) == good


def test_two_who_write_the_same_at_once_leave_it_whole(tmp_path, monkeypatch):
    write, begun = Storage.write_bytes, []

    def joined(storage, name, data):
        if name == "pairs/c/0/0" and not begun:  # the other comes in the middle, and is killed
            begun.append(name)
            with pytest.raises(StorageError):
                save_arrays(str(tmp_path), SOME, {})
        elif name == "pairs/c/0/0" and len(begun) == 1:
            begun.append(name)
            raise StorageError("killed")
        write(storage, name, data)

    monkeypatch.setattr(Storage, "write_bytes", joined)
    save_arrays(str(tmp_path), SOME, {})
    assert len(begun) == 2
    assert verify(str(tmp_path)) == []


@pytest.mark.parametrize("num_calls", range(16))
def test_a_replacement_that_fails_anywhere_is_refused_and_can_be_repeated(tmp_path, monkeypatch, num_calls):
    save_arrays(str(tmp_path), {"old": np.ones(9)}, {})
    old, calls = snapshot(str(tmp_path)), []

    def failing(act):
        def call(*args):
            calls.append(args)
            if len(calls) > num_calls:
                raise StorageError("gone")
            return act(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_bytes", failing(Storage.write_bytes))
        patch.setattr(Storage, "remove", failing(Storage.remove))
        try:
            save_arrays(str(tmp_path), SOME, {"new": 1})
        except StorageError:
            if snapshot(str(tmp_path)) != old:
                with pytest.raises(StoreError):
                    load_arrays(str(tmp_path))
        else:
            assert num_calls >= 11
    save_arrays(str(tmp_path), SOME, {"new": 1})
    assert verify(str(tmp_path)) == []


def test_a_place_that_holds_something_else_is_refused_untouched(tmp_path, store):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for url in (str(tmp_path / "mine"), store.url):
        before = snapshot(url)
        with pytest.raises(StoreError, match=r"not empty|not overwritten"):
            save_arrays(url, SOME, {})
        assert snapshot(url) == before


@pytest.mark.parametrize("left", ["eigvals/c/0", "older/c/0/0", ".zarr.json.0123.partial", "notes.txt"])
def test_what_a_late_writer_left_is_written_over_only_where_nobody_else_writes(tmp_path, left):
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_bytes(b"late")
    if not left.endswith(".partial"):
        with pytest.raises(StoreError, match="not empty"):
            save_arrays(str(tmp_path), SOME, {})
        assert (tmp_path / left).read_bytes() == b"late"
    save_arrays(str(tmp_path), SOME, {}, leftovers=True)
    loaded, _ = load_arrays(str(tmp_path))
    assert {name: value.tobytes() for name, value in loaded.items()} == {
        name: np.asarray(value).tobytes() for name, value in SOME.items()
    }


def test_a_feature_store_is_not_written_over_as_leftovers(store):
    with pytest.raises(StoreError, match="not overwritten"):
        save_arrays(store.url, SOME, {}, leftovers=True)


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([object()]), np.array([1j])])
def test_arrays_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(StoreError, match="dtype"):
        save_arrays(str(tmp_path / "g"), {"a": value}, {})
    assert not (tmp_path / "g").exists()


def test_a_group_that_is_not_whole_is_refused(tmp_path):
    save_arrays(str(tmp_path), SOME, {})
    before = snapshot(str(tmp_path))
    for name, message in [("eigvals/c/0", "missing"), ("seal.json", "no seal"), ("zarr.json", "is not a store")]:
        (tmp_path / name).unlink()
        with pytest.raises(StoreError, match=message):
            load_arrays(str(tmp_path))
        (tmp_path / name).write_bytes(b"x" + before[name][1:])
        with pytest.raises(StoreError, match=r"corrupt|damaged"):
            load_arrays(str(tmp_path))
        (tmp_path / name).write_bytes(before[name])
    load_arrays(str(tmp_path))


def test_a_feature_store_is_not_loaded_as_arrays(store):
    with pytest.raises(StoreError, match="open_features"):
        load_arrays(store.url)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_any_zarr_group_opens_lazily(tmp_path, zarr_format):
    group = zarr.create_group(str(tmp_path), zarr_format=zarr_format)
    inputs = np.arange(60.0).reshape(12, 5)
    group.create_array("inputs", data=inputs, chunks=(5, 5))
    group.create_array("labels", data=np.zeros(12, np.int64), chunks=(5,))
    if zarr_format == 3:
        group.create_array("sharded", data=inputs, chunks=(2, 5), shards=(6, 5))
    opened = open_arrays(str(tmp_path))
    assert list(opened) == sorted(group.array_keys())
    assert (opened["inputs"].shape, opened["inputs"].dtype, len(opened["inputs"])) == ((12, 5), np.float64, 12)
    for name in opened:
        np.testing.assert_array_equal(opened[name][3:9], group[name][3:9])
    np.testing.assert_array_equal(opened["labels"][:], 0)  # Zarr leaves chunks of zeros out
    with pytest.raises(KeyError):
        opened["gone"]


def test_lazy_arrays_of_this_program_are_never_filled_up(store):
    opened = open_arrays(store.url)
    assert (list(opened), len(opened)) == (["features", "index", "labels", "logits"], 4)
    np.testing.assert_array_equal(opened["logits"][:], make_rows()["logits"])
    assert opened.attributes == {"model": "abc", "dims": [1, 2]}
    store.path("logits/c/1/0").unlink()
    raw = store.path("labels/c/0").read_bytes()
    store.path("labels/c/0").write_bytes(b"x" + raw[1:])
    with pytest.raises(StoreError, match="logits/c/1/0 is missing"):
        opened["logits"][:]
    with pytest.raises(StoreError, match="array labels cannot be read"):
        opened["labels"][:2]
    store.path("seal.json").unlink()
    with pytest.raises(StoreError, match="seal"):
        open_arrays(store.url)


def test_what_is_no_zarr_group_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is not a Zarr group"):
        open_arrays(str(tmp_path / "gone"))


def test_importing_the_room_leaves_s3_alone():
    code = "import sys, fisher_ray.store; print(sorted({'s3fs', 'botocore', 'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.s3
def test_arrays_in_s3_go_there_and_back(s3_url):
    for _ in range(2):
        save_arrays(s3_url, SOME, {"x": 1})
    loaded, attributes = load_arrays(s3_url)
    assert attributes == {"x": 1}
    opened = open_arrays(s3_url)
    for name, value in SOME.items():
        np.testing.assert_array_equal(loaded[name], value)
        np.testing.assert_array_equal(opened[name][...], value)
    assert verify(s3_url) == []
