"""Pictures as users keep them: in folders, in Hugging Face's datasets, in WebDataset's tar files."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from fisher_ray.config import Config, SourceConfig
from fisher_ray.data import check_source, load_batches, open_source
from fisher_ray.errors import ConfigError, DataError, StorageError
from fisher_ray.stages import inspect_request
from fisher_ray.storage import Storage
from tests.data.files import picture, value_of

CLASSES = ("ant", "bee", "cow")


def opened(root, **settings):
    return open_source(SourceConfig(**settings), root=str(root), transform=None, key="data.shallow")


def loaded(source):
    """The values of ``picture`` and the labels, in order."""
    batches = list(load_batches(source, range(len(source)), 4, num_classes=None))
    return [v for batch in batches for v in value_of(batch.inputs)], [v for b in batches for v in b.labels.tolist()]


def write_folders(place, count=30, classes=CLASSES):
    """Picture ``i`` is of class ``i % len(classes)``, every second one a folder deeper."""
    for i in range(count):
        folder = place / classes[i % len(classes)] / ("deep" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.{'PNG' if i % 4 else 'png'}").write_bytes(picture(i))


# --- folders


def test_a_folders_pictures_have_the_folders_number_in_an_order_that_mixes_the_classes(tmp_path):
    write_folders(tmp_path)
    source = opened(tmp_path, format="images", path=".")
    values, labels = loaded(source)
    assert sorted(values) == list(range(30))
    assert labels == [value % 3 for value in values] == source.labels().tolist()
    assert source.classes == CLASSES
    assert {*labels[:10]} == {*labels[10:20]} == {*labels[20:]} == {0, 1, 2}
    assert source.where(0).endswith(f"{values[0]:03d}.{'PNG' if values[0] % 4 else 'png'}")


def test_rows_of_a_folder_are_a_part_of_that_order_wherever_it_lies(tmp_path):
    write_folders(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole, _ = loaded(opened(tmp_path, format="images", path="a"))
    part = opened(tmp_path, format="images", path="b", rows=(7, 21))
    assert loaded(part)[0] == whole[7:21]
    assert part.fingerprint() == opened(tmp_path, format="images", path="a", rows=(7, 21)).fingerprint()
    assert part.fingerprint() != opened(tmp_path, format="images", path="a", rows=(7, 20)).fingerprint()
    for start in range(14):
        raws = list(part.raw_rows(start, 14))
        assert [part.decode(raw)[0].getpixel((0, 0))[0] for raw in raws] == whole[7 + start : 21]
    read = part.random_reader()
    assert [read(row)[0].getpixel((0, 0))[0] for row in (5, 0, 13)] == [whole[12], whole[7], whole[20]]


def test_what_is_no_picture_or_hidden_is_left_alone_and_links_are_followed(tmp_path):
    write_folders(tmp_path / "real", 6)
    (tmp_path / "real/ant/notes.txt").write_text("mine")
    (tmp_path / "real/ant/._000.png").write_bytes(b"a finder's leftover")
    (tmp_path / "real/.thumbs").mkdir()
    (tmp_path / "real/.thumbs/000.png").write_bytes(picture(99))
    (tmp_path / "seen").mkdir()
    for name in CLASSES:
        os.symlink(tmp_path / "real" / name, tmp_path / "seen" / name)
    assert sorted(loaded(opened(tmp_path, format="images", path="seen"))[0]) == list(range(6))
    assert len(opened(tmp_path, format="images", path="real")) == 6


def test_classes_give_the_labels_their_order_and_none_is_left_out(tmp_path):
    write_folders(tmp_path)
    values, labels = loaded(opened(tmp_path, format="images", path=".", classes=("cow", "ant", "elk", "bee")))
    assert labels == [[1, 3, 0][value % 3] for value in values]
    with pytest.raises(ConfigError, match=r"data\.shallow\.classes does not name the folder 'cow'"):
        opened(tmp_path, format="images", path=".", classes=("ant", "bee"))


@pytest.mark.parametrize("settings", [{"format": "parquet"}, {"format": "images", "classes": ["a", "a"]}])
def test_classes_are_of_folders_and_each_is_named_once(settings):
    with pytest.raises(ConfigError, match="classes names each class of format 'images' once"):
        SourceConfig.checked({"path": "x", "classes": ["a"], **settings})


def test_folders_that_are_no_set_of_classes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.shallow\.path: there is no folder .*/nowhere"):
        opened(tmp_path, format="images", path="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no rows"):
        opened(tmp_path, format="images", path="empty")
    write_folders(tmp_path / "loose", 3)
    (tmp_path / "loose/010.png").write_bytes(picture(10))
    with pytest.raises(ConfigError, match=r"loose/010\.png lies in no class's folder"):
        opened(tmp_path, format="images", path="loose")


def test_a_picture_that_goes_away_may_come_back_and_a_damaged_one_is_a_bad_row(tmp_path):
    write_folders(tmp_path, 3)
    source = opened(tmp_path, format="images", path=".")
    (tmp_path / "bee/deep/001.PNG").write_bytes(picture(1)[:40])
    with pytest.raises(DataError, match=r"bee/deep/001\.PNG \(data\.shallow row \d\) cannot be decoded"):
        loaded(source)
    (tmp_path / "bee/deep/001.PNG").unlink()
    with pytest.raises(StorageError, match=r"001\.PNG cannot be read: No such file"):
        loaded(source)
    (tmp_path / "bee/deep/001.PNG").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(StorageError, match="cannot be read: No such file"):
        opened(tmp_path, format="images", path=".")


@pytest.mark.s3
def test_folders_on_object_storage_are_read_as_those_on_the_disk(tmp_path, s3_url):
    write_folders(tmp_path, 40)
    storage = Storage(s3_url)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"data/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    local = opened(tmp_path, format="images", path=".", rows=(1, 39))
    remote = opened(s3_url, format="images", path="data", rows=(1, 39))
    assert remote.fingerprint() == local.fingerprint()
    for start, stop in ((0, 38), (3, 36), (37, 38), (5, 5)):
        assert list(remote.raw_rows(start, stop)) == list(local.raw_rows(start, stop))
    with pytest.raises(ConfigError, match="has no rows"):
        opened(s3_url, format="images", path="nothing")


def classes_config(root, **splits):
    data = {name: {"format": "images", "path": path} for name, path in splits.items()}
    return Config.from_dict(
        {
            "output": f"{root}/run",
            "data": {"root": str(root), **data, "transform": "tests.data.test_pictures:small"},
            "model": {"factory": "tests.data.test_pictures:network"},
            "base": {"steps": 1},
        }
    )


def small(image, generator):
    import torch

    return torch.from_numpy(np.asarray(image, np.float32)[0, 0] / 255)


def network():
    from torch import nn

    return nn.Linear(3, 3)


def test_splits_with_other_classes_are_refused(tmp_path):
    write_folders(tmp_path / "train")
    write_folders(tmp_path / "test", 6, ("ant", "bee"))
    config = classes_config(tmp_path, train="train", shallow="train", test="test")
    with pytest.raises(ConfigError, match=r"data\.train has 3 classes and data\.test has 2, .*'cow'"):
        inspect_request(config)
    whole = classes_config(tmp_path, train="train", shallow="train", test="train")
    assert inspect_request(whole).num_rows == {"train": 30, "shallow": 30, "test": 30}


# --- datasets of Hugging Face


def hub_dataset(count=20, names=CLASSES, column="label"):
    features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=[*names])})
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(count)]}
    return datasets.Dataset.from_dict(rows | {column: [i % 3 for i in range(count)]}, features=features)


def test_a_saved_dataset_of_hugging_face_is_read_as_it_was(tmp_path):
    whole = hub_dataset()
    whole.save_to_disk(str(tmp_path / "one"))
    whole.shuffle(seed=3).save_to_disk(str(tmp_path / "shuffled"), num_shards=3)
    source = opened(tmp_path, format="arrow", path="one")
    assert loaded(source) == (list(range(20)), [i % 3 for i in range(20)])
    assert source.classes == CLASSES
    shuffled = opened(tmp_path, format="arrow", path="shuffled", rows=(2, 19))
    values, labels = loaded(shuffled)
    expected = datasets.load_from_disk(str(tmp_path / "shuffled"))
    assert values == [example["image"].getpixel((0, 0))[0] for example in expected][2:19]
    assert labels == [*expected["label"]][2:19] == shuffled.labels().tolist()
    for start in range(17):
        for stop in range(start, 18):
            raws = [shuffled.decode(raw)[0].getpixel((0, 0))[0] for raw in shuffled.raw_rows(start, stop)]
            assert raws == values[start:stop]
    assert shuffled.where(0).split("/")[-1] == "data-00000-of-00003.arrow row 2"
    assert (
        len({one.fingerprint() for one in (source, shuffled, opened(tmp_path, format="arrow", path="shuffled"))}) == 3
    )


def test_columns_of_other_names_can_be_named(tmp_path):
    dataset = hub_dataset(column="fine_label").rename_column("image", "img")
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    columns = {"image_column": "img", "label_column": "fine_label"}
    for settings in ({"format": "arrow", "path": "saved"}, {"format": "parquet", "path": "a.parquet"}):
        source = opened(tmp_path, **settings, **columns)
        assert source.classes == CLASSES
        assert loaded(source) == (list(range(20)), [i % 3 for i in range(20)])
        assert source.labels().tolist() == [i % 3 for i in range(20)]
        with pytest.raises(DataError, match=r"no column 'image', 'label'; .*Name yours by image_column"):
            opened(tmp_path, **settings)


def test_one_split_of_several_has_to_be_named(tmp_path):
    datasets.DatasetDict({"train": hub_dataset(), "test": hub_dataset(6)}).save_to_disk(str(tmp_path / "all"))
    with pytest.raises(
        ConfigError, match=rf"holds several splits\. Give one: {tmp_path}/all/test, {tmp_path}/all/train"
    ):
        opened(tmp_path, format="arrow", path="all")
    assert len(opened(tmp_path, format="arrow", path="all/test")) == 6


def test_arrow_files_themselves_are_read_by_a_pattern(tmp_path):
    table = pa.table({"image": [picture(i) for i in range(9)], "label": [*range(9)]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as sink:
        sink.write_table(table.slice(0, 5), max_chunksize=2)
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as sink:
        sink.write_table(table.slice(5))
    source = opened(tmp_path, format="arrow", path="*.arrow")
    assert loaded(source) == (list(range(9)), list(range(9)))
    assert source.classes is None


def test_what_is_no_saved_dataset_is_told(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a folder without state"):
        opened(tmp_path, format="arrow", path="folder")
    hub_dataset().save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json is damaged: KeyError"):
        opened(tmp_path, format="arrow", path="saved")
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "saved/data-00000-of-00001.arrow").read_bytes()[:300])
    for content in (b"", b"no arrow"):
        (tmp_path / "bad.arrow").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.arrow is not a sound Arrow file"):
            opened(tmp_path, format="arrow", path="bad.arrow")
    with pytest.raises(DataError, match=r"cut\.arrow is not a sound Arrow file"):
        opened(tmp_path, format="arrow", path="cut.arrow")
    with pytest.raises(ConfigError, match=r"is a URL; format arrow reads local files.* use format parquet"):
        opened("s3://bucket/data", format="arrow", path="saved")


# --- tar files of WebDataset


def write_tars(place, sizes=(7, 5)):
    start = 0
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(place / f"part-{number}.tar"), encoder=False) as sink:
            for i in range(start, start + size):
                row = {"__key__": f"shots.{'x' * 120}/{i:04d}", "png": picture(i), "cls": str(i % 5).encode()}
                sink.write(row | ({"json": b"{}"} if i % 2 else {}))
        start += size


def test_samples_of_tar_files_are_counted_over_the_files(tmp_path):
    write_tars(tmp_path)
    source = opened(tmp_path, format="webdataset", path="part-*.tar", rows=(2, 11))
    assert loaded(source) == (list(range(2, 11)), [i % 5 for i in range(2, 11)])
    assert source.labels().tolist() == [i % 5 for i in range(2, 11)]
    assert source.where(6).endswith(f"part-1.tar sample shots.{'x' * 120}/0008")
    for start in range(9):
        assert len(list(source.raw_rows(start, 9))) == 9 - start
    whole = opened(tmp_path, format="webdataset", path="part-*.tar")
    assert whole.fingerprint() != source.fingerprint()
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert opened(tmp_path, format="webdataset", path="copy/part-*.tar").fingerprint() == whole.fingerprint()


def test_labels_are_part_of_the_fingerprints(tmp_path):
    write_tars(tmp_path, (4,))
    before = opened(tmp_path, format="webdataset", path="part-0.tar").fingerprint()
    with tarfile.open(tmp_path / "part-0.tar") as members:
        (place,) = [member.offset_data for member in members if member.name.endswith("0002.cls")]
    with open(tmp_path / "part-0.tar", "r+b") as file:
        file.seek(place)
        file.write(b"1")
    assert opened(tmp_path, format="webdataset", path="part-0.tar").fingerprint() != before
    prints = set()
    for label in (0, 1):
        rows = 300
        labels = [label if row == rows // 2 else 0 for row in range(rows)]
        table = pa.table({"image": [np.random.default_rng(row).bytes(20_000) for row in range(rows)], "label": labels})
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as sink:
            sink.write_table(table, max_chunksize=10)
        prints.add(opened(tmp_path, format="arrow", path="a.arrow").fingerprint())
    assert len(prints) == 2


def test_a_sample_that_comes_twice_is_refused(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as sink:
        for _ in range(2):
            sink.write({"__key__": "7", "png": picture(7), "cls": b"1"})
    with pytest.raises(DataError, match=r"a\.tar: sample 7 has two (labels|pictures)"):
        opened(tmp_path, format="webdataset", path="a.tar")


def test_samples_that_lack_a_part_are_bad_rows(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as sink:
        sink.write({"__key__": "0", "png": picture(0), "cls": b"0\n"})
        sink.write({"__key__": "1", "png": picture(1)})
        sink.write({"__key__": "2", "cls": b"2"})
        sink.write({"__key__": "3", "png": picture(3), "cls": b"cat"})
    source = opened(tmp_path, format="webdataset", path="a.tar")
    skipped = {}
    (batch,) = load_batches(source, range(4), 4, num_classes=5, on_error="skip", skipped=skipped)
    assert batch.index.tolist() == [0]
    assert {row: reason.split(") ")[1] for row, reason in skipped.items()} == {
        1: "has a wrong label: there is none (null)",
        2: "cannot be decoded: the row has no picture (null bytes)",
        3: "has a wrong label: 'cat' is not an integer",
    }
    assert source.labels().tolist()[0] == 0
    assert np.isnan(source.labels()[[1, 3]]).all()
    with pytest.raises(DataError, match="has a wrong label: there is none"):
        check_source(source, 5)


def test_what_is_no_plain_tar_file_is_told(tmp_path):
    write_tars(tmp_path)
    whole = (tmp_path / "part-0.tar").read_bytes()
    for content in (b"no tar" * 200, gzip.compress(whole), whole[:1700], b""):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.tar is not a sound tar file"):
            opened(tmp_path, format="webdataset", path="bad.tar")
    with pytest.raises(ConfigError, match=r"is a folder\. Give a file or a pattern, such as .*\*\.tar"):
        opened(tmp_path, format="webdataset", path="")


def test_all_keep_the_same_pictures(tmp_path):
    """The formats differ in how they are kept alone."""
    dataset = hub_dataset(6)
    dataset.save_to_disk(str(tmp_path / "saved"))
    pq.write_table(
        pa.table({"image": [picture(i) for i in range(6)], "label": [i % 3 for i in range(6)]}), tmp_path / "a.parquet"
    )
    write_tars(tmp_path, (6,))
    settings = {"arrow": "saved", "parquet": "a.parquet", "webdataset": "part-0.tar"}
    inputs = [
        np.concatenate([batch.inputs.numpy() for batch in load_batches(source, range(6), 4, num_classes=None)])
        for source in (opened(tmp_path, format=name, path=path) for name, path in settings.items())
    ]
    assert all(np.array_equal(one, inputs[0]) for one in inputs)
