import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fisher_ray.records import Batch
from fisher_ray.stages import examples, planning, shallow
from fisher_ray.store import open_features
from tests.stages.small_runs import fit_metric, shallow_rows, small_bench, write_features


def evaluated(folder, **sections):
    bench = small_bench(folder, store={"dtype": "float32"}, **sections)
    fit_metric(bench)
    for name, split in (("train", "shallow"), ("test", "test")):
        write_features(bench, name, split)
    (fit,), (validation,) = (
        [shallow.gram_sums(bench, unit, part) for unit in planning.linear_units(bench.config, bench.facts, 1, part)]
        for part in ("fit", "validation")
    )
    chosen = shallow.choose_penalty(bench, fit)
    kept = {name: chosen[name] for name in ("penalty", "rank", "damping", "temperature")}
    shallow.fit_ridge(bench, fit, validation, **kept)
    if bench.facts.hidden is not None:
        shallow.fit_probe(bench)
    shallow.evaluate(bench)
    return bench


def directions(bench, name):
    """Features of length one, in float64, without the package's blocks."""
    store = open_features(bench.url(f"features/{name}.zarr"))
    flat = store.read("features", 0, store.num_rows).astype(np.float64)
    flat = flat.mean(axis=1) if bench.config.linear.num_stacked else flat
    flat = flat.reshape(len(flat), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


@pytest.mark.parametrize("linear", [{}, {"views": 2}, {"views": 2, "view_mode": "stack"}])
def test_the_nearest_are_those_of_the_largest_cosine(tmp_path, monkeypatch, linear):
    monkeypatch.setattr(shallow, "BLOCK_ROWS", 16)  # several blocks, of which the best are kept
    bench = evaluated(tmp_path, linear=linear)

    found = examples.show_examples(bench)

    assert found["searched"] == 70
    train, test = directions(bench, "train"), directions(bench, "test")
    _, labels = shallow_rows(bench)
    assert [item["kind"] for item in found["examples"]].count("least") == examples.NUM_SHOWN
    for item in found["examples"]:
        cosines = train @ test[item["row"]]
        rows = [near["row"] for near in item["nearest"]]
        assert rows == np.argsort(-cosines)[:3].tolist()
        assert [near["cosine"] for near in item["nearest"]] == pytest.approx(cosines[rows], abs=1e-5)
        assert [near["label"] for near in item["nearest"]] == labels[rows].tolist()


def test_the_pictures_are_the_samples_stretched_from_black_to_white(tmp_path):
    bench = evaluated(tmp_path)
    bench.storage.write_bytes("report/pictures/test-999.png", b"of a report before")

    found = examples.show_examples(bench)

    rows = {("test", item["row"]) for item in found["examples"]}
    rows |= {("shallow", near["row"]) for item in found["examples"] for near in item["nearest"]}
    assert {path.name for path in (tmp_path / "run/report/pictures").iterdir()} == {f"{s}-{r}.png" for s, r in rows}
    inputs, _ = shallow_rows(bench)
    row = found["examples"][0]["nearest"][0]["row"]
    with Image.open(io.BytesIO(bench.storage.read_bytes(examples.picture_name("shallow", row)))) as picture:
        drawn = np.asarray(picture)
    sample = inputs[row, 0].numpy()
    expected = (sample - sample.min()) / (sample.max() - sample.min()) * 255
    assert np.abs(drawn - expected).max() <= 0.5


def test_only_the_first_rows_of_many_are_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "SEARCHED_ROWS", 11)
    found = examples.show_examples(evaluated(tmp_path))
    assert found["searched"] == 11
    assert all(near["row"] < 11 for item in found["examples"] for near in item["nearest"])


def test_samples_that_are_no_pictures_have_none(tmp_path):
    bench = evaluated(tmp_path)
    bench.facts = replace(bench.facts, input_shape=(4, 3))
    assert examples.show_examples(bench) == {"examples": [], "searched": 0}


def test_the_most_and_the_least_certain_are_chosen_each_once(monkeypatch):
    monkeypatch.setattr(examples, "NUM_SHOWN", 4)
    certain = torch.tensor([0.99, 0.98, 0.97, 0.6, 0.9, 0.5, 0.55, 0.96, 0.95, 0.94, 0.93, 0.7])
    scores = torch.stack([certain, 1 - certain], dim=1).double().log()
    labels = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0])
    index = torch.arange(100, 112)

    found = examples.choose(scores, labels, index)

    kinds = {kind: [item["row"] for item in found if item["kind"] == kind] for kind in ("wrong", "least", "most")}
    assert kinds == {"wrong": [101, 103, 106], "least": [105, 111, 104, 110], "most": [100, 102, 107, 108]}
    assert found[0] == {"kind": "wrong", "row": 101, "label": 1, "taken": 0, "probability": pytest.approx(0.98)}


def test_of_few_samples_none_is_shown_twice():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64).log()
    found = examples.choose(scores, torch.tensor([0, 1]), torch.arange(2))
    assert [(item["kind"], item["row"]) for item in found] == [("least", 1), ("least", 0)]


def test_what_is_certain_beyond_floating_point_has_an_order_all_the_same():
    scores = torch.tensor([[900.0, 100.0], [100.0, 950.0], [500.0, 400.0]], dtype=torch.float64)
    found = examples.choose(scores, torch.tensor([0, 1, 0]), torch.arange(3))
    assert [(item["kind"], item["row"], item["probability"]) for item in found] == [
        *(("least", 2, 1.0), ("least", 0, 1.0), ("least", 1, 1.0))
    ]


def test_nothing_is_near_to_features_that_are_zero():
    block = {"x": torch.eye(4), "index": torch.arange(4), "labels": torch.arange(4)}
    queries = torch.stack([torch.zeros(4), torch.tensor([0.0, 0, 1, 0])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "_rows", lambda *_: iter([block]))
        none, found = examples._nearest(None, range(4), queries)
    assert none == []
    assert found[0] == {"row": 2, "label": 2, "cosine": 1.0}


def test_values_at_the_ends_of_float32_are_drawn(tmp_path):
    bench = evaluated(tmp_path)
    inputs = torch.full((1, 1, 4, 3), 3e38)
    inputs[0, 0, 0, 0] = -3e38
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "load_batches", lambda *_, **__: (Batch(inputs, None, None) for _ in range(1)))
        examples.draw_picture(bench, "test", 0, "one.png")
    with Image.open(io.BytesIO(bench.storage.read_bytes("one.png"))) as drawn:
        assert sorted(drawn.getcolors()) == [(1, 0), (11, 255)]
