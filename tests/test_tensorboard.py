"""What a run leaves for TensorBoard, read back by TensorBoard's own reader."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fisher_ray.config import Config
from fisher_ray.errors import ConfigError, StorageError
from fisher_ray.report import write_report
from fisher_ray.report.tensorboard import run_name, write_tensorboard
from fisher_ray.storage import Storage
from tests.test_report import DETAILS, RESULTS


@pytest.fixture
def finished(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    write_report(storage, RESULTS, DETAILS)
    parts = [{"eigvals": [3.0, 1.0]}, {"eigvals": [2.0]}]
    run = {"stages": {"metric": {"result": {"parts": parts}}}, "config": {"output": "runs/x", "seed": 7}}
    storage.write_bytes("run.json", json.dumps(run).encode())
    return storage


def read(place):
    found = EventAccumulator(str(place))
    found.Reload()
    return found


def test_numbers_eigenvalues_figures_and_configuration_are_there(finished, tmp_path):
    found = read(write_tensorboard(str(tmp_path / "board"), finished))

    scalars = {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert scalars["accuracy/fisher_linear"] == pytest.approx([0.693])
    assert "accuracy/gradnet" not in scalars
    assert scalars["seconds/metric"] == pytest.approx([14.8])
    assert scalars["samples_per_second/features"] == pytest.approx([482.8])
    assert scalars["metric/eigenvalue"] == [3.0, 2.0, 1.0]
    figures = ("accuracy", "confusions", "layers", "penalty", "spectrum", "timeline")
    assert found.Tags()["images"] == [f"figures/{name}" for name in figures]
    (picture,) = found.Images("figures/accuracy")
    assert picture.width > 900
    (text,) = found.Tensors("configuration/text_summary")
    assert "    seed: 7" in text.tensor_proto.string_val[0].decode()


def test_what_was_written_before_is_replaced_and_other_files_stay(finished, tmp_path):
    place = write_tensorboard(str(tmp_path / "board"), finished)
    (place / "notes.txt").write_text("mine")
    assert write_tensorboard(str(tmp_path / "board"), finished) == place
    assert len(list(place.glob("events.out.tfevents.*"))) == 1
    assert (place / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_told(finished, tmp_path):
    (tmp_path / "board").write_text("a file")
    with pytest.raises(StorageError, match="Correct 'tensorboard'"):
        write_tensorboard(str(tmp_path / "board"), finished)


def test_a_run_is_called_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_name(str(tmp_path / "runs/cifar10")) == "runs/cifar10"
    assert run_name("/data/runs/cifar10") == "data/runs/cifar10"
    assert run_name("s3://bucket/runs/cifar10") == "bucket/runs/cifar10"


def test_it_is_no_part_of_what_results_depend_on_and_no_url():
    values = {"output": "x", "data": {}, "model": {"factory": "a:b"}, "base": {"steps": 1}}
    values["data"] = {name: {"format": "numpy", "path": "x.npz"} for name in ("train", "shallow", "test")}
    given = Config.from_dict({**values, "tensorboard": "board"})
    assert given.identity() == Config.from_dict(values).identity()
    assert given.located().tensorboard.startswith("/")
    with pytest.raises(ConfigError, match="is a URL"):
        Config.from_dict({**values, "tensorboard": "s3://bucket/board"})
