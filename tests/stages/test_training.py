import time

import pytest
import safetensors.torch
import torch

from fisher_ray.errors import ModelError
from fisher_ray.stages import Workbench, inspect_request
from fisher_ray.stages.training import train_base, train_on
from tests.integration.runs import digits


def bench(output, *overrides: str) -> Workbench:
    config = digits(output, *overrides).located()
    return Workbench(config, inspect_request(config))


def test_the_base_network_is_the_same_to_the_bit_each_time(tmp_path):
    for name in ("a", "b"):
        *progress, last = train_base(bench(tmp_path / name, "base.snapshots=[20, 60]"))
        assert progress[-1]["done"] == progress[-1]["total"] == 60
        assert len(last["fingerprint"]) == 64

    files = ("model", "step-20", "step-60")
    bits = [[(tmp_path / name / "base" / f"{file}.safetensors").read_bytes() for file in files] for name in ("a", "b")]
    assert bits[0] == bits[1]
    assert bits[0][0] == bits[0][2] != bits[0][1]


def test_a_checkpoint_is_taken_as_it_is(tmp_path):
    list(train_base(bench(tmp_path / "a")))
    checkpoint = tmp_path / "a" / "base" / "model.safetensors"
    overrides = ["base=null", f"model.checkpoint={checkpoint}"]

    (last,) = train_base(bench(tmp_path / "b", *overrides))
    assert (tmp_path / "b" / "base" / "model.safetensors").read_bytes() == checkpoint.read_bytes()
    assert last["fingerprint"]


def test_training_that_diverges_is_told_with_what_to_do(tmp_path):
    with pytest.raises(ModelError, match=r"diverged.*Lower base\.lr"):
        list(train_base(bench(tmp_path, "base.lr=1e30")))


def test_training_on_takes_its_time_and_counts_the_test_rows(tmp_path):
    made = bench(tmp_path)
    list(train_base(made))
    start = time.monotonic()
    *_, last = train_on(made, seconds=1.0)

    assert time.monotonic() - start >= 1.0
    assert last["total"] == 597
    assert 0 <= last["correct"] <= 597
    assert last["epochs"] == last["steps"] * 32 / 600
    kept = safetensors.torch.load_file(tmp_path / "base" / "trained_on.safetensors")
    assert not torch.equal(kept["fc0.weight"], made.model.state_dict()["fc0.weight"])


def test_training_on_that_diverges_does_not_fail_the_run(tmp_path):
    made = bench(tmp_path, "trained_on.lr=1e30")
    list(train_base(made))
    *_, last = train_on(made, seconds=0.5)

    assert last["correct"] is None
    assert not (tmp_path / "base" / "trained_on.safetensors").exists()
