"""What users get wrong, and what they are told: one paragraph and an exit code, before any work begins."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import torch
from torch import nn

from fisher_ray.cli import main

CONFIG = """
output: run
data:
  train: {format: numpy, path: good.npz}
  shallow: {format: numpy, path: good.npz}
  test: {format: numpy, path: good.npz}
model: {factory: "tests.test_wrong_requests:network"}
base: {steps: 2}
compression: {dim: 8}
metric: {rank: 4}
store: {chunk_rows: 8}
runtime: {unit_rows: 8, num_workers: 1}
"""
HERE = "tests.test_wrong_requests"


def network(width: int = 4) -> nn.Module:
    return nn.Linear(width, 3)


def no_network() -> int:
    return 3


def failing() -> nn.Module:
    raise RuntimeError("boom")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.last = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.memory(x.unflatten(1, (2, 2)))[0][:, -1])


def integers(array: np.ndarray, generator: torch.Generator | None) -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int32)


def broken(array: np.ndarray, generator: torch.Generator | None) -> torch.Tensor:
    raise KeyError("no such augmentation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("wrong")
    inputs, labels = np.random.default_rng(0).normal(size=(40, 4)).astype("float32"), np.arange(40) % 3
    for name, arrays in {
        "good": {"inputs": inputs, "labels": labels},
        "negative": {"inputs": inputs, "labels": labels - 1},
        "many": {"inputs": inputs, "labels": np.arange(40)},
        "nan": {"inputs": np.full_like(inputs, np.nan), "labels": labels},
        "wide": {"inputs": np.ones((40, 5), np.float32), "labels": labels},
        "unlabelled": {"inputs": inputs},
    }.items():
        np.savez(place / f"{name}.npz", **arrays)
    for name, text in {
        "good": CONFIG,
        "list": "- 1",
        "broken": "a: [1",
        "empty": "",
    }.items():
        (place / f"{name}.yaml").write_text(text)
    torch.save({"weight": torch.zeros(3, 5)}, place / "other.pt")
    torch.save({"weight": torch.full((3, 4), torch.nan), "bias": torch.zeros(3)}, place / "nan.pt")
    torch.save(np.zeros(3), place / "object.pt")
    (place / "junk.pt").write_bytes(b"junk")
    (place / "junk.safetensors").write_bytes(b"junk")
    (place / "pictures/a").mkdir(parents=True)
    (place / "pictures/a/1.png").write_bytes(b"no picture")
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full/thesis.tex").write_text("mine")
    return place


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("run none.yaml", 2, "configuration none.yaml: No such file or directory. Give the path"),
        ("run list.yaml", 2, "list.yaml is not a mapping of keys to values"),
        ("run broken.yaml", 2, "broken.yaml is not YAML"),
        ("run empty.yaml", 2, "empty.yaml is not a mapping"),
        ("rum good.yaml", 2, "Did you mean 'run'?"),
        ("run good.yaml --outpt x", 2, "No such option: --outpt"),
        ("run good.yaml --set metrc.rank=3", 2, "unknown key 'metrc'; did you mean 'metric'?"),
        ("run good.yaml --set metric.rnk=3", 2, "unknown key 'metric.rnk'; did you mean 'rank'?"),
        ("run good.yaml --set metric.rank=many", 2, "metric.rank: Input should be a valid integer"),
        ("run good.yaml --set metric.fraction=2", 2, "metric.fraction: Input should be less than or equal to 1"),
        ("run good.yaml --set metric.rank", 2, "is not of the form a.b=value"),
        ("run good.yaml --set metric.rank=64", 2, "metric.rank 64 is more than compression.dim 8"),
        ("run good.yaml --set data.test.path=no.npz", 2, "there is no file {folder}/no.npz. Correct the path"),
        ("run good.yaml --set data.test.rows=[10,50]", 2, "good.npz, which has 40 rows. Give a range within [0, 40]"),
        ("run good.yaml --set data.test.path=s3://b/x.npz", 2, "reads local files"),
        (
            "run good.yaml --set data.shallow.path=negative.npz",
            3,
            "(data.shallow row 0) has a wrong label: -1",
        ),
        (
            "run good.yaml --set data.shallow.path=many.npz",
            3,
            "(data.shallow row 3) has a wrong label: 3",
        ),
        (
            "run good.yaml --set data.shallow.path=nan.npz",
            3,
            "nan.npz row 0 (data.shallow row 0) has an input",
        ),
        ("run good.yaml --set data.test.path=wide.npz", 2, "the splits' samples have different shapes"),
        ("run good.yaml --set data.test.path=unlabelled.npz", 3, "has no array 'labels'"),
        ("run good.yaml --set data.test={format:|images,path:|pictures}", 3, "a/1.png (data.test row 0) cannot be"),
        ("run good.yaml --set model.factory=nowhere:network", 2, "importing 'nowhere' failed"),
        (f"run good.yaml --set model.factory={HERE}:netwrk", 2, "has no 'netwrk'"),
        ("run good.yaml --set model.factory=network", 2, "is not of the form module:name"),
        (f"run good.yaml --set model.factory={HERE}:failing", 2, "raised RuntimeError: boom"),
        (f"run good.yaml --set model.factory={HERE}:no_network", 2, "returned int, not a torch.nn.Module"),
        ("run good.yaml --set model.kwargs={depth:|3}", 2, "unexpected keyword argument 'depth'"),
        ("run good.yaml --set model.kwargs={width:|5}", 2, "the network fails on samples of shape (4,)"),
        (f"run good.yaml --set model.factory={HERE}:Recurrent", 2, "layer 'memory' (GRU) has no gradient formula"),
        ("run good.yaml --set scores.parameters=nothing*", 2, "no parameter of the network matches"),
        ("run good.yaml --set base=null --set model.checkpoint=no.pt", 2, "there is no file {folder}/no.pt"),
        ("run good.yaml --set base=null --set model.checkpoint=other.pt", 2, "missing bias, weight is (3, 5) instead"),
        ("run good.yaml --set base=null --set model.checkpoint=nan.pt", 2, "weight holds NaN or infinity"),
        ("run good.yaml --set base=null --set model.checkpoint=object.pt", 2, "holds other objects than tensors"),
        ("run good.yaml --set base=null --set model.checkpoint=junk.pt", 2, "junk.pt cannot be read"),
        ("run good.yaml --set base=null --set model.checkpoint=junk.safetensors", 2, "cannot be read"),
        ("run good.yaml --set model.checkpoint=other.pt", 2, "and only one of them"),
        (f"run good.yaml --set data.transform={HERE}:integers", 2, "data.transform returned a tensor of torch.int32"),
        (f"run good.yaml --set data.transform={HERE}:broken", 3, "data.transform failed: KeyError"),
        ("run good.yaml --set linear.views=2", 2, "Set linear.views: 1"),
        ("run good.yaml --set linear.class_weights={7:|2}", 2, "class 7 the weight 2.0. Classes are 0 to 2"),
        ("run good.yaml --output s3://bucket/run", 4, "cannot read s3://bucket/run/run.json"),
        ("run good.yaml --output file", 2, "output {folder}/file is a file"),
        ("run good.yaml --output full", 2, "is not empty and no run folder: it holds thesis.tex"),
        ("run good.yaml --output begun --address 127.0.0.1:{port}", 4, "nobody listens at '127.0.0.1:{port}'"),
        ("run good.yaml --address ray://127.0.0.1:10001", 2, "From outside the cluster submit a job"),
        ("verify nowhere", 3, "nowhere is not a store: it has no zarr.json"),
        ("inspect nowhere", 3, "nowhere is not a store"),
        ("score nowhere", 2, "nowhere is no run folder: it has no run.json"),
        (
            "score nowhere --by nearest",
            2,
            "by: Input should be 'kernel', 'cosine', 'class_gap', 'influence' or 'ridge'",
        ),
        ("score nowhere --target best", 2, "target: Input should be 'label' or 'taken' (given 'best')"),
        ("score nowhere --top 0", 2, "top: Input should be greater than 0 (given 0)"),
        ("score nowhere --rows 5", 2, "--rows '5' is not FIRST:LAST, as in 0:100"),
        ("score nowhere --rows 5:", 2, "--rows '5:' is not FIRST:LAST"),
        ("score nowhere --rows 1:2:3", 2, "--rows '1:2:3' is not FIRST:LAST"),
        ("score nowhere --rows 0:²", 2, "--rows '0:²' is not FIRST:LAST"),
        ("score nowhere --rows 9:5", 2, "rows [9, 5] are none"),
        ("score nowhere --queries {format:|images", 2, "--queries '{format: images' is not YAML"),
        ("score nowhere --queries {format:|images}", 2, "format 'images' takes 'path'"),
        ("score nowhere --queries train", 2, "queries: Input should be 'test' or 'shallow' (given 'train')"),
        ("score nowhere --queries 12", 2, "queries: "),
        ("score nowhere --queries [test]", 2, "queries: "),
        ("score nowhere --name a/b", 2, "name 'a/b' is not the name of a folder"),
        ("audit nowhere", 2, "nowhere is no run folder: it has no run.json"),
        ("audit nowhere --top 0", 2, "top: Input should be greater than or equal to 1"),
        ("audit", 2, "Missing argument 'RUN'"),
        ("plan none.yaml", 2, "configuration none.yaml: No such file"),
        ("init good.yaml", 2, "good.yaml is there already"),
    ],
)
def test_a_wrong_request_is_told_in_a_paragraph(arguments, code, words, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FISHER_RAY_RETRY_S", "0.2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    given = [word.replace("|", " ").replace("{port}", port) for word in arguments.split()]
    with pytest.raises(SystemExit) as caught:
        main(given)
    told = capsys.readouterr()
    assert caught.value.code == code, told.err
    *before, last = told.err.strip().splitlines()
    assert words.replace("{folder}", str(folder)).replace("{port}", port) in last
    assert last.lower().startswith("error: ")
    assert all("Traceback" not in line for line in before)
    assert not os.path.exists(folder / "run/run.json")
