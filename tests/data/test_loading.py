import itertools
import threading

import pytest
import torch

from fisher_ray.data import check_source, load_batches, training_batches
from fisher_ray.errors import ConfigError, DataError
from tests.data.files import open_parquet, picture, value_of, write_numbered, write_parquet

NOISE = "tests.data.files:value_and_noise"


def write_bad(folder):
    """Rows 2 (not a picture), 3 (null), 5 (too large), 6 (label 9), 8 (no label) are bad; 0, 1, 4, 7 are good."""
    images = [picture(i) for i in range(9)]
    images[2], images[3], images[5] = b"not a picture", None, picture(5, side=9)
    write_parquet(folder / "bad.parquet", images, [0, 1, 2, 3, 4, 0, 9, 2, None])


BAD = {
    2: "cannot be decoded: its",
    3: "has no picture",
    5: r"has an input of shape \(3, 9, 9\), the split's is \(3, 8, 8\)",
    6: r"wrong label: 9 is not in \[0, 5\)",
    8: "wrong label: there is none",
}


def num_threads():
    return sum(thread.name.startswith("fisher-ray-prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("row", sorted(BAD))
def test_a_bad_row_is_named_with_its_file_and_key(tmp_path, row):
    write_bad(tmp_path)
    source = open_parquet(tmp_path, rows=(1, 9))
    with pytest.raises(DataError, match=BAD[row]) as caught:
        list(load_batches(source, range(row - 1, row), 4, num_classes=5, expected_shape=(3, 8, 8)))
    assert caught.value.row == row - 1
    assert str(caught.value).startswith(f"{tmp_path}/bad.parquet row {row} (data.shallow row {row - 1}) ")
    assert "data.on_error: skip" in str(caught.value)
    assert num_threads() == 0


def test_bad_rows_are_left_out_and_shorten_their_own_batch_only(tmp_path):
    write_bad(tmp_path)
    skipped = {}
    batches = load_batches(
        open_parquet(tmp_path), range(9), 2, num_classes=5, expected_shape=(3, 8, 8), on_error="skip", skipped=skipped
    )
    assert [batch.index.tolist() for batch in batches] == [[0, 1], [4], [7]]
    assert sorted(skipped) == sorted(BAD)
    assert all("data.on_error" not in reason for reason in skipped.values())


def test_batches_are_cut_from_the_first_row_asked_for(tmp_path):
    write_numbered(tmp_path)
    batches = list(load_batches(open_parquet(tmp_path), range(3, 14), 4, num_classes=5))
    assert [batch.index.tolist() for batch in batches] == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13]]
    assert [value_of(batch.inputs) for batch in batches] == [batch.index.tolist() for batch in batches]
    assert {batch.labels.dtype for batch in batches} == {batch.index.dtype for batch in batches} == {torch.int64}


def test_clean_samples_get_no_generator(tmp_path):
    write_numbered(tmp_path)
    (batch,) = load_batches(open_parquet(tmp_path, transform=NOISE), range(17), 32, num_classes=5)
    assert batch.inputs[:, 1].tolist() == [0.0] * 17


@pytest.mark.parametrize(("rows", "batch_size"), [(range(18), 4), (range(0, 8, 2), 4), (range(4), 0)])
def test_rows_outside_the_split_are_refused_at_once(tmp_path, rows, batch_size):
    write_numbered(tmp_path)
    with pytest.raises(ValueError, match="not within"):
        load_batches(open_parquet(tmp_path), rows, batch_size, num_classes=5)


def test_the_thread_ends_when_the_iterator_is_closed(tmp_path):
    write_numbered(tmp_path)
    for stream in (
        load_batches(open_parquet(tmp_path), range(17), 2, num_classes=5),
        training_batches(open_parquet(tmp_path), batch_size=2, seed=0),
    ):
        next(stream)
        assert num_threads() == 1
        stream.close()
        assert num_threads() == 0


def test_the_check_returns_the_shape(tmp_path):
    write_numbered(tmp_path)
    assert check_source(open_parquet(tmp_path), 5).shape[1:] == (3, 8, 8)
    assert check_source(open_parquet(tmp_path, transform=NOISE), None).shape[1:] == (2,)


def test_the_check_finds_a_label_out_of_range_anywhere(tmp_path):
    write_numbered(tmp_path)
    with pytest.raises(
        DataError, match=r"part-0.parquet row 4 \(data.shallow row 4\).* 4 is not in \[0, 4\)"
    ) as caught:
        check_source(open_parquet(tmp_path), 4)
    assert caught.value.row == 4


def test_the_check_finds_a_missing_label(tmp_path):
    write_parquet(tmp_path / "a.parquet", [picture(0)] * 3, [0, 1, None])
    with pytest.raises(DataError, match=r"row 2 .*there is none"):
        check_source(open_parquet(tmp_path), None)


def test_the_check_passes_over_bad_rows_when_they_may_be_left_out(tmp_path):
    write_bad(tmp_path)
    assert check_source(open_parquet(tmp_path, rows=(2, 9)), 5, on_error="skip").shape[1:] == (3, 8, 8)
    with pytest.raises(DataError, match=r"none of its 2 rows can be used. The first: .*row 2"):
        check_source(open_parquet(tmp_path, rows=(2, 4)), 5, on_error="skip")


def test_a_transform_that_returns_integers_is_a_wrong_request_even_under_skip(tmp_path):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, transform="tests.data.files:integers")
    with pytest.raises(ConfigError, match=r"data.transform returned a tensor of torch.int32"):
        check_source(source, 5, on_error="skip")


def test_a_transform_may_return_tokens(tmp_path):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, transform="tests.data.files:tokens")
    batch = next(load_batches(source, range(3), 3, num_classes=5))
    assert batch.inputs.tolist() == [[1, 2**40]] * 3
    assert batch.inputs.dtype == torch.int64


def test_inputs_of_one_split_are_of_one_type(tmp_path):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, transform="tests.data.files:of_any_type")
    with pytest.raises(DataError, match=r"row \d+.* has an input of torch\.(int64|float32), others of torch\."):
        list(load_batches(source, range(17), 17, num_classes=5))


def test_a_transform_that_fails_names_the_row(tmp_path):
    write_numbered(tmp_path)
    with pytest.raises(DataError, match=r"row 0 .*data.transform failed: KeyError: 'no such augmentation'"):
        check_source(open_parquet(tmp_path, transform="tests.data.files:failing"), 5)


def take(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def test_every_epoch_holds_every_row_once_in_another_order(tmp_path):
    write_numbered(tmp_path)
    batches = take(training_batches(open_parquet(tmp_path, transform=NOISE), batch_size=5, seed=1), 17)
    assert all(len(batch.index) == 5 for batch in batches)
    rows = torch.cat([batch.index for batch in batches]).tolist()
    epochs = [rows[i : i + 17] for i in range(0, 85, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert torch.cat([batch.inputs[:, 0] for batch in batches]).int().tolist() == rows


def test_a_sample_is_augmented_by_seed_epoch_and_row_whatever_the_batch(tmp_path):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, transform=NOISE)
    small = take(training_batches(source, batch_size=2, seed=1), 17)
    large = take(training_batches(source, batch_size=17, seed=1), 2)
    torch.testing.assert_close(
        torch.cat([b.inputs for b in small]), torch.cat([b.inputs for b in large]), rtol=0, atol=0
    )
    noise = torch.cat([b.inputs[:, 1] for b in large]).tolist()
    assert len(set(noise)) == 34
    other = take(training_batches(source, batch_size=17, seed=2), 1)[0]
    assert other.index.tolist() != large[0].index.tolist()
    assert set(other.inputs[:, 1].tolist()).isdisjoint(noise)


@pytest.mark.parametrize("start", [0, 1, 3, 7, 40])
def test_starting_at_a_step_gives_the_batches_that_come_there(tmp_path, start):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, transform=NOISE)
    whole = take(training_batches(source, batch_size=6, seed=4), start + 3)
    resumed = take(training_batches(source, batch_size=6, seed=4, start_step=start), 3)
    for expected, batch in zip(whole[start:], resumed, strict=True):
        assert batch.index.tolist() == expected.index.tolist()
        torch.testing.assert_close(batch.inputs, expected.inputs, rtol=0, atol=0)


def test_a_transform_that_draws_on_its_picture_does_not_change_the_next_epoch(tmp_path):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, transform="tests.data.files:scribbling")
    for batch in take(training_batches(source, batch_size=17, seed=0), 3):
        assert batch.inputs[:, 0].int().tolist() == batch.index.tolist()


def test_pictures_beyond_the_memory_for_decoded_ones_are_the_same(tmp_path, monkeypatch):
    write_numbered(tmp_path)
    source = open_parquet(tmp_path, transform=NOISE)
    expected = take(training_batches(source, batch_size=17, seed=0), 3)
    monkeypatch.setattr("fisher_ray.data.pictures.DECODED_BYTES", 4 * 8 * 8 * 5)
    for a, b in zip(expected, take(training_batches(source, batch_size=17, seed=0), 3), strict=True):
        torch.testing.assert_close(a.inputs, b.inputs, rtol=0, atol=0)


def test_training_leaves_bad_rows_out_or_stops_at_them(tmp_path):
    write_bad(tmp_path)
    source = open_parquet(tmp_path)
    rules = {"num_classes": 5, "expected_shape": (3, 8, 8)}
    skipped = {}
    (batch,) = take(training_batches(source, batch_size=9, seed=0, on_error="skip", skipped=skipped, **rules), 1)
    assert sorted(batch.index.tolist()) == [0, 1, 4, 7]
    assert sorted(skipped) == sorted(BAD)
    with pytest.raises(DataError, match=r"bad.parquet row [23568] "):
        take(training_batches(source, batch_size=9, seed=0, **rules), 1)
    with pytest.raises(DataError, match=r"no row of training step \d can be used"):
        take(training_batches(source, batch_size=1, seed=0, on_error="skip", **rules), 9)


@pytest.mark.parametrize(("batch_size", "start"), [(0, 0), (1, -1)])
def test_impossible_training_batches_are_refused_at_once(tmp_path, batch_size, start):
    write_numbered(tmp_path)
    with pytest.raises(ValueError, match="must be positive"):
        training_batches(open_parquet(tmp_path), batch_size=batch_size, seed=0, start_step=start)
