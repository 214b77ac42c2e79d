import shutil

import numpy as np
import pytest
import torch
import zarr

from fisher_ray.config import SourceConfig
from fisher_ray.data import arrays, load_batches, open_source, training_batches
from fisher_ray.errors import ConfigError, DataError
from fisher_ray.store import save_arrays

INPUTS = np.random.RandomState(0).randn(11, 2, 3)
LABELS = np.arange(11) % 4


def write(kind, folder, inputs=INPUTS, labels=LABELS):
    if kind == "npz":
        np.savez(folder / "data.npz", inputs=inputs, labels=labels)
        return "data.npz"
    if kind == "folder":
        (folder / "data").mkdir()
        np.save(folder / "data" / "inputs.npy", inputs)
        np.save(folder / "data" / "labels.npy", labels)
        return "data"
    if kind == "own":
        save_arrays(str(folder / "data.zarr"), {"inputs": inputs, "labels": labels}, {})
        return "data.zarr"
    group = zarr.create_group(str(folder / "data.zarr"))
    group.create_array("inputs", data=inputs, chunks=(3, *inputs.shape[1:]))
    group.create_array("labels", data=labels, chunks=(4, *labels.shape[1:]))
    return "data.zarr"


def opened(kind, folder, path, rows=None):
    config = SourceConfig(format="numpy" if kind in ("npz", "folder") else "zarr", path=path, rows=rows)
    return open_source(config, root=str(folder), transform=None, key="data.test")


KINDS = ["npz", "folder", "own", "zarr"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [None, (2, 10)])
def test_values_come_as_float32_as_they_are(tmp_path, kind, rows):
    source = opened(kind, tmp_path, write(kind, tmp_path), rows)
    wanted = slice(*(rows or (0, 11)))
    batches = list(load_batches(source, range(len(source)), 3, num_classes=4))
    np.testing.assert_array_equal(torch.cat([b.inputs for b in batches]).numpy(), INPUTS[wanted].astype(np.float32))
    np.testing.assert_array_equal(torch.cat([b.labels for b in batches]).numpy(), LABELS[wanted])
    np.testing.assert_array_equal(source.labels(), LABELS[wanted])
    assert batches[0].inputs.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_of_training_holds_every_row_once(tmp_path, kind):
    source = opened(kind, tmp_path, write(kind, tmp_path), (1, 11))
    stream = training_batches(source, batch_size=5, seed=3)
    batches = [next(stream), next(stream)]
    stream.close()
    index = torch.cat([b.index for b in batches])
    assert sorted(index.tolist()) == list(range(10))
    np.testing.assert_array_equal(torch.cat([b.inputs for b in batches]).numpy(), INPUTS[1:][index].astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_does_not_depend_on_the_folder_but_on_values_and_rows(tmp_path, kind):
    places = [tmp_path / name for name in "abcd"]
    for place in places:
        place.mkdir()
    changed = INPUTS.copy()
    changed[5, 1, 1] += 1
    paths = [
        write(kind, places[0]),
        write(kind, places[1]),
        write(kind, places[2], changed),
        write(kind, places[3], labels=LABELS[::-1].copy()),
    ]
    a, b, c, d = [opened(kind, *pair).fingerprint() for pair in zip(places, paths, strict=True)]
    assert a == b
    assert len({a, c, d, opened(kind, places[0], paths[0], (0, 10)).fingerprint()}) == 4


def test_large_arrays_enter_the_fingerprint_by_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "HASHED_WHOLE_BYTES", 100)
    monkeypatch.setattr(arrays, "HASHED_END_BYTES", 50)
    prints = []
    for row in (0, 5, 10):
        inputs = INPUTS.copy()
        inputs[row] += 1
        (tmp_path / str(row)).mkdir()
        prints.append(opened("folder", tmp_path / str(row), write("folder", tmp_path / str(row), inputs)).fingerprint())
    shutil.rmtree(tmp_path / "5")
    (tmp_path / "5").mkdir()
    unchanged = opened("folder", tmp_path / "5", write("folder", tmp_path / "5")).fingerprint()
    assert [other == unchanged for other in prints] == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_place_is_a_wrong_request(tmp_path, kind):
    with pytest.raises(ConfigError, match=rf"data.test.path: .*{tmp_path}/none"):
        opened(kind, tmp_path, "none")


def test_a_folder_without_labels_is_a_wrong_request(tmp_path):
    np.save(tmp_path / "inputs.npy", INPUTS)
    with pytest.raises(ConfigError, match=r"there is no file .*labels.npy"):
        opened("folder", tmp_path, ".")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("inputs", "labels", "said"),
    [
        (INPUTS, LABELS[:-1], r"'labels' has shape \(10,\)"),
        (INPUTS, LABELS.astype(float), "'labels' is float64"),
        (INPUTS, LABELS[:, None], r"of shape \(11, 1\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, kind, inputs, labels, said):
    with pytest.raises(DataError, match=said):
        opened(kind, tmp_path, write(kind, tmp_path, inputs, labels))


def test_an_archive_without_inputs_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=INPUTS, labels=LABELS)
    with pytest.raises(DataError, match="no array 'inputs'"):
        opened("npz", tmp_path, "a.npz")


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.array([{}, {}], dtype=object), labels=np.arange(2))
    with pytest.raises(DataError, match="without pickles"):
        opened("npz", tmp_path, "a.npz")


def test_a_single_array_and_a_broken_archive_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", INPUTS)
    with pytest.raises(ConfigError, match="is one array"):
        opened("npz", tmp_path, "a.npy")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match=r"b\.npz is not NumPy's format"):
        opened("npz", tmp_path, "b.npz")


def test_a_row_with_nan_is_named(tmp_path):
    inputs = INPUTS.copy()
    inputs[7, 0, 0] = np.nan
    source = opened("npz", tmp_path, write("npz", tmp_path, inputs), (2, 11))
    with pytest.raises(DataError, match=rf"{tmp_path}/data.npz row 7 \(data.test row 5\) .* NaN") as caught:
        list(load_batches(source, range(9), 4, num_classes=4))
    assert caught.value.row == 5
