import numpy as np
import pytest
import torch
from PIL import Image

from fisher_ray.config import ScoreConfig
from fisher_ray.errors import ConfigError, DataError
from fisher_ray.stages import inspect_request
from fisher_ray.stages.workbench import inspect_queries
from tests.stages.small_runs import small_config, write_pictures


def inspected(folder, request, **sections):
    write_pictures(folder)
    config = small_config(folder, **sections)
    facts = inspect_request(config)
    return facts, *inspect_queries(config, facts, ScoreConfig.checked(request).located())


def source(folder, inputs, labels):
    np.savez(folder / "queries.npz", inputs=inputs, labels=labels)
    return {"format": "numpy", "path": str(folder / "queries.npz")}


@pytest.mark.parametrize("by", ["kernel", "influence", "ridge"])
def test_queries_from_elsewhere_take_the_place_of_the_test_split(tmp_path, by):
    inputs = np.ones((5, 1, 4, 3), np.float32)
    queries = source(tmp_path, inputs, np.arange(5) % 3)
    before, config, facts, _ = inspected(tmp_path, {"queries": queries, "by": by})
    assert config.data.test.path == queries["path"]
    assert facts.num_rows == {**before.num_rows, "test": 5}
    changed = {name for name, value in facts.fingerprints.items() if before.fingerprints[name] != value}
    assert changed == {"test"}
    assert facts.input_shape == before.input_shape


def test_other_queries_have_another_fingerprint(tmp_path):
    found = []
    for value in (0.0, 1.0):
        queries = source(tmp_path, np.full((5, 1, 4, 3), value, np.float32), np.arange(5) % 3)
        found.append(inspected(tmp_path, {"queries": queries})[2].fingerprints["test"])
    assert found[0] != found[1]


def test_a_relative_path_is_of_the_working_directory_and_not_of_the_data(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    source(tmp_path / "here", np.ones((5, 1, 4, 3), np.float32), np.arange(5) % 3)
    monkeypatch.chdir(tmp_path / "here")
    _, config, facts, _ = inspected(tmp_path, {"queries": {"format": "numpy", "path": "queries.npz"}})
    assert config.data.test.path == str(tmp_path / "here/queries.npz")
    assert facts.num_rows["test"] == 5


def test_queries_of_another_shape_are_refused(tmp_path):
    queries = source(tmp_path, np.ones((5, 1, 4, 4), np.float32), np.arange(5) % 3)
    with pytest.raises(ConfigError, match=r"samples have shape \(1, 4, 4\), the run's \(1, 4, 3\)"):
        inspected(tmp_path, {"queries": queries})


def test_a_label_that_the_run_does_not_have_is_named(tmp_path):
    queries = source(tmp_path, np.ones((5, 1, 4, 3), np.float32), np.arange(5))
    with pytest.raises(DataError, match=r"queries row 3\) has a wrong label: 3"):
        inspected(tmp_path, {"queries": queries, "by": "influence"})


@pytest.fixture
def named(tmp_path):
    """A run of three classes that have names, and a place for queries."""
    for name in ("cat", "dog", "eel"):
        for split in ("run", "queries"):
            (tmp_path / split / name).mkdir(parents=True)
        Image.new("L", (3, 4), 60).save(tmp_path / "run" / name / "one.png")
    splits = {split: {"format": "images", "path": "run"} for split in ("train", "shallow", "test")}
    return {"data": {**splits, "transform": f"{__name__}:grey"}}


def grey(picture, generator):
    return torch.from_numpy(np.asarray(picture, np.float32)[None] / 255)


@pytest.mark.parametrize(("folders", "classes"), [(("cat", "dog", "eel"), None), (("dog",), ["cat", "dog", "eel"])])
@pytest.mark.parametrize("by", ["influence", "ridge"])
def test_queries_of_the_same_classes_have_labels(tmp_path, named, by, folders, classes):
    for name in folders:
        Image.new("L", (3, 4), 90).save(tmp_path / "queries" / name / "one.png")
    queries = {"format": "images", "path": str(tmp_path / "queries"), "classes": classes}
    _, config, facts, own = inspected(tmp_path, {"queries": queries, "by": by}, **named)
    assert (facts.num_rows["test"], facts.class_names) == (len(folders), ("cat", "dog", "eel"))
    assert config.data.test.classes == (None if classes is None else tuple(classes))
    assert own is None


@pytest.mark.parametrize(
    ("by", "target", "refused"),
    [("influence", "label", True), ("ridge", "label", True), ("influence", "taken", False), ("kernel", "label", False)],
)
def test_queries_of_other_classes_have_no_label_to_be_targets(tmp_path, named, by, target, refused):
    (tmp_path / "queries/dog").rename(tmp_path / "queries/fox")
    Image.new("L", (3, 4), 90).save(tmp_path / "queries/fox/one.png")
    asked = {"queries": {"format": "images", "path": str(tmp_path / "queries")}, "by": by, "target": target}
    if not refused:
        _, _, facts, own = inspected(tmp_path, asked, **named)
        assert (facts.num_rows["test"], own) == (1, ("fox",))
        return
    with pytest.raises(ConfigError, match=r"classes of their own \('fox'\).*target: taken.*'classes'"):
        inspected(tmp_path, asked, **named)


def test_features_of_true_labels_are_not_made_of_other_classes(tmp_path, named):
    (tmp_path / "queries/dog").rename(tmp_path / "queries/fox")
    Image.new("L", (3, 4), 90).save(tmp_path / "queries/fox/one.png")
    queries = {"format": "images", "path": str(tmp_path / "queries")}
    with pytest.raises(ConfigError, match=r"classes of their own \('fox'\)"):
        inspected(tmp_path, {"queries": queries, "by": "kernel"}, **named, scores={"labels": "true"})
