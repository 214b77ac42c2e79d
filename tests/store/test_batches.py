from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fisher_ray.errors import RequestError, StoreError
from fisher_ray.records import Unit
from fisher_ray.store import ArraySpec, StoreSpec, StoreWriter, create_store, open_features, seal
from fisher_ray.store.torch_dataset import FeatureDataset

NUM_ROWS, CHUNK, UNIT = 103, 5, 20
SKIPPED = {7: "torn", 60: "torn", 61: "torn", 62: "torn", 63: "torn", 64: "torn", 102: "torn"}
"""Some of a chunk's rows, all of a chunk's, and the last one."""
KEPT = [row for row in range(NUM_ROWS) if row not in SKIPPED]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("store"))
    arrays = {"index": ArraySpec((), "int64", ("sample",)), "x": ArraySpec((2,), "float16", ("sample", "rank"), 0.5)}
    create_store(url, StoreSpec(NUM_ROWS, UNIT, CHUNK, "none", arrays))
    for number, start in enumerate(range(0, NUM_ROWS, UNIT)):
        unit = Unit(number, start, min(start + UNIT, NUM_ROWS))
        rows = np.arange(unit.start, unit.stop)
        skipped = {row: why for row, why in SKIPPED.items() if row in rows}
        given = {"index": rows, "x": np.stack([rows, -rows], 1).astype(np.float32)}
        StoreWriter(url).write_unit(unit, given, attempt=1, skipped=skipped)
    seal(url, -(-NUM_ROWS // UNIT))
    return url


@pytest.fixture(scope="module")
def store(url):
    return open_features(url)


def rows_of(batches):
    return [batch["index"].tolist() for batch in batches]


@settings(max_examples=100)
@given(data=st.data())
def test_every_row_comes_once_to_one_reader_from_any_batch_on(store, data):
    world = data.draw(st.integers(1, 25))
    options = {
        "batch_size": data.draw(st.integers(1, 110)),
        "shuffle": data.draw(st.booleans()),
        "seed": data.draw(st.integers(0, 2**32)),
        "epoch": data.draw(st.integers(0, 5)),
        "buffer_rows": data.draw(st.integers(1, 120)),
        "world_size": world,
        "names": ["index", "x"],
    }
    found = []
    for rank in range(world):
        batches = store.iter_batches(**options, rank=rank)
        whole = rows_of(batches)
        assert len(batches) == len(whole)
        assert all(len(batch) == options["batch_size"] for batch in whole[:-1])
        assert all(whole)
        found += [row for batch in whole for row in batch]
        start = data.draw(st.integers(0, len(whole) + 1))
        resumed = store.iter_batches(**options, rank=rank, start=start)
        assert rows_of(resumed) == whole[start:]
        assert len(resumed) == len(whole[start:])
        dropped = rows_of(store.iter_batches(**options, rank=rank, drop_last=True))
        assert dropped == [batch for batch in whole if len(batch) == options["batch_size"]]
    assert sorted(found) == KEPT
    if world == 1 and not options["shuffle"]:
        assert found == KEPT


@settings(max_examples=50)
@given(data=st.data())
def test_rows_that_take_no_part_are_left_out_as_skipped_ones_are(store, data):
    only = np.array(data.draw(st.lists(st.booleans(), min_size=NUM_ROWS, max_size=NUM_ROWS)))
    options = {
        "batch_size": data.draw(st.integers(1, 110)),
        "shuffle": data.draw(st.booleans()),
        "buffer_rows": data.draw(st.integers(1, 120)),
        "names": ["index", "x"],
    }
    batches = list(store.iter_batches(**options, only=only))
    whole = rows_of(batches)
    assert sorted(row for batch in whole for row in batch) == [row for row in KEPT if only[row]]
    assert len(store.iter_batches(**options, only=only)) == len(whole)
    assert all(len(batch) == options["batch_size"] for batch in whole[:-1])
    for batch in batches:
        np.testing.assert_array_equal(batch["x"], np.stack([batch["index"], -batch["index"]], 1))
    start = data.draw(st.integers(0, len(whole) + 1))
    assert rows_of(store.iter_batches(**options, only=only, start=start)) == whole[start:]


@pytest.mark.parametrize("only", [np.ones(NUM_ROWS - 1, bool), np.ones(NUM_ROWS)])
def test_what_says_of_which_rows_batches_are_has_one_bool_for_each(store, only):
    with pytest.raises(RequestError, match=f"not one bool for each of {NUM_ROWS} rows"):
        store.iter_batches(3, ["index"], only=only)


def test_the_arrays_of_a_batch_belong_together(store):
    for batch in store.iter_batches(7, ["x", "index"], shuffle=True):
        np.testing.assert_array_equal(batch["x"], np.stack([batch["index"], -batch["index"]], 1))


def test_epochs_and_seeds_differ_and_repeat(store):
    def order(**options):
        batches = store.iter_batches(103, ["index"], shuffle=True, buffer_rows=30, **options)
        return [row for batch in rows_of(batches) for row in batch]

    first = order(seed=1)
    assert first == order(seed=1)
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9
    moved = [abs(place - row) for place, row in enumerate(first)]
    assert np.mean(moved) > 20  # chunks are mixed, 34 would be a random order
    assert sum(b - a == 1 for a, b in pairwise(first)) < 15  # and rows within them


def test_the_order_is_the_same_with_every_version(store):
    batches = store.iter_batches(6, ["index"], shuffle=True, seed=3, epoch=1, buffer_rows=10)
    assert rows_of(batches)[0] == [36, 39, 47, 35, 46, 45]


def test_what_was_read_before_a_resume_is_not_read_again(store, monkeypatch):
    read = []
    monkeypatch.setattr(type(store), "read_kept", lambda self, names, start, stop: read.append(start) or {})
    batches = store.iter_batches(5, ["index"], buffer_rows=5, start=12)
    with pytest.raises(KeyError):
        next(iter(batches))
    assert min(read) >= 55


def test_a_reader_that_stops_early_leaves_no_thread(store):
    batches = iter(store.iter_batches(2, ["index"]))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fisher-ray-prefetch")]


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"buffer_rows": 0}, {"rank": 2, "world_size": 2}, {"start": -1}, {"world_size": 0}]
)
def test_what_makes_no_batches_is_refused(store, wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        store.iter_batches(**{"batch_size": 4, "names": ["index"], **wrong})
    with pytest.raises(StoreError, match="no array 'gone'"):
        store.iter_batches(4, ["gone"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gets_every_row_once(url, num_workers):
    dataset = FeatureDataset(url, 8, ["index", "x"], shuffle=True, seed=5)
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = list(loader)
        assert all(isinstance(batch["x"], torch.Tensor) for batch in batches)
        orders.append([row for batch in batches for row in batch["index"].tolist()])
    assert sorted(orders[0]) == sorted(orders[1]) == KEPT
    assert orders[0] != orders[1]


def test_a_dataset_is_shared_out_over_ranks_and_resumed(url):
    found = []
    for rank in range(3):
        dataset = FeatureDataset(url, 8, ["index"], rank=rank, world_size=3)
        whole = rows_of(dataset)
        assert dataset.num_batches == len(whole)
        found += [row for batch in whole for row in batch]
        dataset.set_epoch(0, start=2)
        assert rows_of(dataset) == whole[2:]
    assert sorted(found) == KEPT


def test_several_loader_workers_cannot_resume(url):
    dataset = FeatureDataset(url, 8, ["index"], start=1)
    with pytest.raises(RequestError, match="start 1: with 2 DataLoader workers"):
        list(DataLoader(dataset, batch_size=None, num_workers=2))
    with pytest.raises(RequestError, match="batch_size 0"):
        FeatureDataset(url, 0)
