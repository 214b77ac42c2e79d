import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fisher_ray.config import SourceConfig
from fisher_ray.data import load_batches, open_source
from fisher_ray.errors import ConfigError, DataError, StorageError
from fisher_ray.storage import Storage
from tests.data.files import open_parquet, picture, value_of, write_numbered, write_parquet
from tests.s3_server import S3Server, make_bucket, set_environment


@pytest.mark.parametrize("struct", [True, False], ids=["struct", "bytes"])
@pytest.mark.parametrize("rows", [None, (3, 16), (10, 17), (0, 1)])
def test_rows_are_counted_over_the_sorted_files(tmp_path, struct, rows):
    write_numbered(tmp_path, struct=struct)
    source = open_parquet(tmp_path, rows=rows)
    first, last = rows or (0, 17)
    assert len(source) == last - first
    batches = list(load_batches(source, range(len(source)), 4, num_classes=5))
    assert [value for batch in batches for value in value_of(batch.inputs)] == list(range(first, last))
    assert [label for batch in batches for label in batch.labels.tolist()] == [i % 5 for i in range(first, last)]
    assert [row for batch in batches for row in batch.index.tolist()] == list(range(last - first))


def test_any_part_of_the_rows_can_be_read(tmp_path):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, rows=(2, 17))
    for start in range(15):
        for stop in range(start, 16):
            decoded = [source.decode(raw) for raw in source.raw_rows(start, stop)]
            assert [image.getpixel((0, 0))[0] for image, _ in decoded] == list(range(start + 2, stop + 2))


def test_only_the_row_groups_that_are_needed_are_read(tmp_path):
    write_numbered(tmp_path, sizes=(12,))
    path = tmp_path / "part-0.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(damaged)
    source = open_parquet(tmp_path)
    assert len(list(source.raw_rows(4, 12))) == 8
    with pytest.raises(DataError, match=r"data.shallow: .*part-0.parquet is not a sound Parquet file"):
        list(source.raw_rows(0, 1))


def test_a_picture_without_a_transform_is_rgb_in_0_to_1(tmp_path):
    write_parquet(tmp_path / "a.parquet", [picture(10, side=5)], [0])
    (batch,) = load_batches(open_parquet(tmp_path), range(1), 8, num_classes=1)
    expected = np.broadcast_to((np.array([10, 11, 12], np.float32) / 255)[:, None, None], (3, 5, 5))
    np.testing.assert_array_equal(batch.inputs[0].numpy(), expected)


def test_labels_are_read_over_all_files_with_nan_for_a_missing_one(tmp_path):
    write_parquet(tmp_path / "a.parquet", [picture(0)] * 3, [4, None, 2])
    write_parquet(tmp_path / "b.parquet", [picture(0)] * 2, [1, 0])
    np.testing.assert_array_equal(open_parquet(tmp_path, rows=(1, 4)).labels(), [np.nan, 2, 1])


def test_a_row_is_named_by_its_file_and_its_place_there(tmp_path):
    write_numbered(tmp_path)
    assert open_parquet(tmp_path, rows=(5, 17)).where(7) == f"{tmp_path}/part-1.parquet row 2"


def test_the_fingerprint_is_the_same_in_another_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_numbered(tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        shutil.copy(file, tmp_path / "b")
    assert open_parquet(tmp_path / "a").fingerprint() == open_parquet(tmp_path / "b").fingerprint()


def test_the_fingerprint_tells_rows_names_and_contents_apart(tmp_path):
    write_numbered(tmp_path, sizes=(6,))
    write_parquet(tmp_path / "b.parquet", [picture(9)] * 6, [0] * 6)
    shutil.copy(tmp_path / "part-0.parquet", tmp_path / "c.parquet")
    opened = [
        open_parquet(tmp_path, path="part-0.parquet"),
        open_parquet(tmp_path, path="part-0.parquet", rows=(0, 5)),
        open_parquet(tmp_path, path="part-0.parquet", rows=(1, 6)),
        open_parquet(tmp_path, path="b.parquet"),
        open_parquet(tmp_path, path="c.parquet"),
        open_parquet(tmp_path, path="*.parquet"),
    ]
    assert len({source.fingerprint() for source in opened}) == len(opened)


def test_a_pattern_without_a_match_is_named_in_full(tmp_path):
    with pytest.raises(ConfigError, match=rf"data.shallow.path: no file matches {tmp_path}/none-\*.parquet"):
        open_parquet(tmp_path, path="none-*.parquet")


def test_an_absolute_path_is_not_joined_to_the_root(tmp_path):
    write_numbered(tmp_path)
    config = SourceConfig(path=f"{tmp_path}/part-1.parquet")
    assert len(open_source(config, root="/elsewhere", transform=None, key="data.test")) == 7


def test_a_root_or_file_name_with_the_characters_of_patterns_is_taken_as_it_is(tmp_path):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    write_numbered(folder)
    shutil.copy(folder / "part-1.parquet", folder / "x[2].parquet")
    assert len(open_parquet(folder, path="part-*.parquet")) == 17
    assert len(open_parquet(folder, path="x[2].parquet")) == 7


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        open_parquet(tmp_path, path="")


@pytest.mark.s3
def test_files_on_object_storage_are_read_as_those_on_the_disk(tmp_path, s3_url):
    write_numbered(tmp_path)
    storage = Storage(s3_url)
    for path in tmp_path.iterdir():
        storage.write_bytes(f"data/{path.name}", path.read_bytes())
        storage.write_bytes(f"data/deeper/{path.name}", path.read_bytes())
    local, remote = open_parquet(tmp_path, rows=(2, 17)), open_parquet(f"{s3_url}/data", rows=(2, 17))
    assert remote.fingerprint() == local.fingerprint()
    assert remote.where(0) == f"{s3_url}/data/part-0.parquet row 2"
    assert remote.labels().tolist() == local.labels().tolist()
    for start, stop in ((0, 15), (3, 12), (14, 15)):
        assert list(remote.raw_rows(start, stop)) == list(local.raw_rows(start, stop))
    one = open_parquet(tmp_path, path=f"{s3_url}/data/part-1.parquet")  # whatever the root
    assert list(one.raw_rows(0, 7)) == list(open_parquet(tmp_path, path="part-1.parquet").raw_rows(0, 7))
    assert len(open_parquet(s3_url, path="data/**/part-1.parquet")) == 14


@pytest.mark.s3
def test_of_an_object_only_what_is_needed_is_fetched(tmp_path, s3_url, monkeypatch):
    chance = np.random.default_rng(0)
    table = pa.table({"image": [chance.bytes(3 * 2**20) for _ in range(8)], "label": [*range(8)]})
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=1)
    Storage(s3_url).write_bytes("large.parquet", (tmp_path / "large.parquet").read_bytes())
    fetched, read = [], Storage.read_bytes

    def noted(self, name, start=None, stop=None):
        fetched.append(stop - start)
        return read(self, name, start, stop)

    monkeypatch.setattr(Storage, "read_bytes", noted)
    source = open_parquet(s3_url)
    assert sum(fetched) <= 3 * 2**20
    fetched.clear()
    assert [label for _, label in source.raw_rows(5, 6)] == [5]
    assert sum(fetched) <= 6 * 2**20


@pytest.mark.s3
def test_an_object_that_is_not_there_or_goes_away_is_told_with_its_name(tmp_path, s3_url):
    with pytest.raises(ConfigError, match=r"no object matches s3://.*/nothing\.parquet"):
        open_parquet(s3_url, path="nothing.parquet")
    with pytest.raises(ConfigError, match=r"no object matches s3://.*/nothing/\*\.parquet"):
        open_parquet(s3_url, path="nothing/*.parquet")
    write_numbered(tmp_path)
    Storage(s3_url).write_bytes("a.parquet", (tmp_path / "part-0.parquet").read_bytes())
    source = open_parquet(s3_url)
    Storage(s3_url).remove("a.parquet")
    with pytest.raises(StorageError, match=r"data\.shallow: s3://.*a\.parquet cannot be read: No such file"):
        list(source.raw_rows(0, 1))
    Storage(s3_url).write_bytes("a.parquet", b"PAR1, but nothing else")
    with pytest.raises(DataError, match=r"a\.parquet is not a sound Parquet file"):
        open_parquet(s3_url)


@pytest.mark.s3
def test_a_server_that_goes_away_is_a_storage_error(tmp_path, monkeypatch):
    server = S3Server()
    try:
        set_environment(monkeypatch, server.endpoint)
        url = make_bucket(server.endpoint, "bucket")
        write_numbered(tmp_path)
        Storage(url).write_bytes("a.parquet", (tmp_path / "part-0.parquet").read_bytes())
        monkeypatch.setenv("FISHER_RAY_RETRY_S", "1")
        source = open_parquet(url)
    finally:
        server.kill()
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/a\.parquet"):
        list(source.raw_rows(0, 1))


def test_rows_beyond_the_last_are_refused_with_their_number(tmp_path):
    write_numbered(tmp_path)
    with pytest.raises(ConfigError, match=r"data.shallow.rows \[10, 20\) goes beyond .* which has 17 rows"):
        open_parquet(tmp_path, rows=(10, 20))


def test_files_without_rows_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [], [], struct=False)
    with pytest.raises(ConfigError, match="has no rows"):
        open_parquet(tmp_path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"img": [b""], "label": [1]}, "no column 'image'; its columns are 'img', 'label'"),
        ({"image": [b""]}, "no column 'label'"),
        ({"image": [b""], "label": [1.0]}, "column 'label' is double"),
        ({"image": ["text"], "label": [1]}, "column 'image' is string"),
        ({"image": [{"path": "a.png"}], "label": [1]}, "column 'image' is struct"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, said):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=said) as caught:
        open_parquet(tmp_path)
    assert f"data.shallow: {tmp_path}/a.parquet" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, only some text"])
def test_a_file_that_is_not_parquet_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet is not a sound Parquet file"):
        open_parquet(tmp_path)


def test_a_file_that_vanished_after_opening_may_come_back(tmp_path):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path)
    (tmp_path / "part-1.parquet").unlink()
    with pytest.raises(StorageError, match=r"data.shallow: .*part-1.parquet cannot be read: No such file"):
        list(load_batches(source, range(17), 4, num_classes=5))


def test_a_picture_cut_short_is_a_bad_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", [picture(0, side=32), picture(1, side=32)[:-40]], [0, 1])
    with pytest.raises(DataError, match=r"a.parquet row 1 .*cannot be decoded: OSError"):
        list(load_batches(open_parquet(tmp_path), range(2), 4, num_classes=5))
