import time

import numpy as np
import pytest
import safetensors.torch
import torch

from fisher_ray.data import load_batches
from fisher_ray.errors import ModelError
from fisher_ray.models import digits_mlp
from fisher_ray.stages import Workbench, inspect_request, training
from fisher_ray.stages.networks import build_network
from fisher_ray.stages.shallow import held_out
from fisher_ray.stages.training import count_correct, train_base, train_on, train_to_convergence
from tests.integration.runs import digits
from tests.stages.small_runs import ROWS, small_bench


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


def test_training_to_convergence_ends_when_nothing_is_gained_and_keeps_what_did_best(tmp_path, monkeypatch):
    made = bench(tmp_path, "trained_on.convergence={evaluate_steps: 20, patience: 2, max_steps: 5000}")
    list(train_base(made))
    seen: list[torch.Tensor] = []
    step = training._step

    def watched(model, optimiser, batch, device):
        seen.append(batch.index)
        return step(model, optimiser, batch, device)

    monkeypatch.setattr(training, "_step", watched)
    *told, last = train_to_convergence(made)
    path, rate = last["path"], made.config.base.lr
    assert [look["step"] for look in path] == [20 * number for number in range(len(path))]
    assert len(told) == len(path) - 1 < 250  # it did not go on to the last step
    assert dict.fromkeys(look["lr"] for look in path[1:]) == dict.fromkeys((rate, rate * 0.1, rate * 0.1 * 0.1))
    best = max(look["accuracy"] for look in path[1:])
    assert next(look["accuracy"] for look in path if look["step"] == last["step"]) == best > path[0]["accuracy"]
    assert last["correct"] / last["total"] > count_correct(made, made.model)[0] / 597
    assert not held_out(torch.cat(seen).numpy(), made.config.seed, 0.1).any()
    kept = made.new_model()
    kept.load_state_dict(safetensors.torch.load_file(tmp_path / "base" / "converged.safetensors"))
    assert count_correct(made, kept.eval()) == (last["correct"], last["total"])


def test_training_to_convergence_that_diverges_does_not_fail_the_run(tmp_path):
    made = bench(tmp_path, "trained_on={lr: 1.0e+30, convergence: {evaluate_steps: 5}}")
    list(train_base(made))
    *_, last = train_to_convergence(made)
    assert (last["correct"], last["step"]) == (None, 0)
    assert not (tmp_path / "base" / "converged.safetensors").exists()


def test_training_on_that_diverges_does_not_fail_the_run(tmp_path):
    made = bench(tmp_path, "trained_on.lr=1e30")
    list(train_base(made))
    *_, last = train_on(made, seconds=0.5)

    assert last["correct"] is None
    assert not (tmp_path / "base" / "trained_on.safetensors").exists()


def test_one_step_is_one_step_of_gradient_descent_on_the_first_batch(tmp_path):
    """With a batch of all rows in an order that does not matter, and no transform: nothing is drawn."""
    made = small_bench(tmp_path, base={"steps": 1, "batch_size": 48, "lr": 0.5, "momentum": 0.0, "weight_decay": 0.01})
    bench_model = made.model
    start = made.new_model()
    start.load_state_dict(initial(made))
    batch = next(clean(made, "train", 48))

    loss = torch.nn.functional.cross_entropy(start(batch.inputs), batch.labels)
    loss = loss + 0.005 * sum((parameter**2).sum() for parameter in start.parameters())
    gradients = torch.autograd.grad(loss, list(start.parameters()))
    for parameter, gradient, trained in zip(start.parameters(), gradients, bench_model.parameters(), strict=True):
        torch.testing.assert_close(trained, parameter - 0.5 * gradient, rtol=1e-4, atol=1e-6)


def initial(made: Workbench) -> dict[str, torch.Tensor]:
    return build_network(made.config.model, made.config.seed).state_dict()


def clean(made: Workbench, split: str, batch_size: int):
    return load_batches(made.source(split), range(batch_size), batch_size, num_classes=3)


def test_a_torch_file_is_a_checkpoint_too(tmp_path):
    model = digits_mlp()
    torch.save(model.state_dict(), tmp_path / "c.pt")
    made = bench(tmp_path / "run", "base=null", f"model.checkpoint={tmp_path / 'c.pt'}")

    list(train_base(made))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in made.model.state_dict().items())


def test_a_last_step_that_diverges_is_told_too(tmp_path):
    """Its loss, of before the step, is finite."""
    with pytest.raises(ModelError, match=r"diverged.*Lower base\.lr"):
        list(train_base(bench(tmp_path, "base.lr=1e38", "base.momentum=0.9", "base.steps=1", "base.weight_decay=1e38")))
    assert not (tmp_path / "base" / "model.safetensors").exists()


def test_a_last_step_of_training_on_that_diverges_gives_no_accuracy(tmp_path, monkeypatch):
    made = small_bench(tmp_path)

    def spoil(model, *_):
        torch.nn.init.constant_(next(model.parameters()), torch.nan)
        return torch.zeros(())

    monkeypatch.setattr(training, "_step", spoil)
    *_, last = train_on(made, seconds=0.01)
    assert last["correct"] is None
    assert not (tmp_path / "run" / "base" / "trained_on.safetensors").exists()


def test_without_time_to_train_on_the_base_network_is_counted(tmp_path):
    made = small_bench(tmp_path)

    (last,) = train_on(made, seconds=0.0)
    assert (last["steps"], last["epochs"]) == (0, 0.0)
    assert (last["correct"], last["total"]) == count_correct(made, made.model)


@pytest.mark.parametrize("views", [1, 2])
def test_right_answers_are_counted_over_the_views_and_without_skipped_rows(tmp_path, views):
    made = small_bench(tmp_path, linear={"views": views}, bad=(72, 80), data={"on_error": "skip"})  # of the test rows
    start, stop = ROWS["test"]
    with np.load(tmp_path / "pictures.npz") as arrays:
        inputs, labels = torch.from_numpy(arrays["inputs"][start:stop]), arrays["labels"][start:stop]

    logits = sum(made.model(part) for part in (inputs, inputs.flip(-1))[:views]).detach()
    good = inputs.flatten(1).isfinite().all(1)
    assert int(good.sum()) == len(good) - 2
    expected = int((logits.argmax(1).numpy() == labels)[good.numpy()].sum())
    assert count_correct(made, made.model) == (expected, 40)


def test_the_settings_of_training_on_are_the_bases_where_it_has_none(tmp_path):
    made = bench(tmp_path, "base.lr=0.3", "base.momentum=0.5", "trained_on={batch_size: 7, weight_decay: 0.0}")

    settings = training._settings(made.config)
    assert (settings.lr, settings.momentum, settings.batch_size, settings.weight_decay) == (0.3, 0.5, 7, 0.0)
