from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fisher_ray.cli import compare
from fisher_ray.errors import ConfigError, ModelError
from fisher_ray.experiment import Experiment, collect, run_experiment, write_comparison
from fisher_ray.storage import Storage
from tests.integration.runs import DEMO, QUICK, Listening, digits

CONVERGENCE = "trained_on.convergence={evaluate_steps: 20, patience: 1, max_steps: 200}"
OVERRIDES = [*QUICK, CONVERGENCE]


def experiment(output: Path, **values) -> Experiment:
    asked = {"output": str(output), "run": str(DEMO), "snapshots": [60, 20], "seeds": [0, 1], "views": [1], **values}
    return Experiment.checked(asked)


@pytest.mark.slow
def test_an_experiment_that_was_interrupted_goes_on_and_then_has_nothing_left_to_do(ray_session, tmp_path):
    asked = experiment(tmp_path / "compare", workers=[1])
    planned = asked.planned()
    assert [run.folder for run in planned] == [
        *(f"steps-{steps}/seed-{seed}/views-1" for seed in (0, 1) for steps in (60, 20)),
        *(f"steps-{steps}/seed-0/views-1-workers-1" for steps in (60, 20)),
    ]

    class Interrupting(Listening):
        def stage_started(self, name, total):
            super().stage_started(name, total)
            if Counter(self.stages)["features/test"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(asked, planned, OVERRIDES, progress=Interrupting())
    assert len(collect(asked)) == 1
    heard = Listening()
    assert run_experiment(asked, planned, OVERRIDES, progress=heard) == {}
    assert Counter(heard.stages)["features/test"] == 5
    assert Counter(heard.stages)["base"] == 1 + 4  # the other seed's training, and what four runs take of the two
    again = Listening()
    assert run_experiment(asked, planned, OVERRIDES, progress=again) == {}
    assert again.stages == []

    runs = collect(asked)
    assert [(run["steps"], run["seed"], run["workers"]) for run in runs] == [
        (run.steps, run.seed, run.workers) for run in planned
    ]
    for run in runs[:4]:
        assert run["accuracy"]["fisher_linear"] > run["accuracy"]["base"]
        assert run["accuracy"]["converged"] > run["accuracy"]["base"]
        assert run["converged"][0] == {"step": 0, "seconds": 0.0, "accuracy": run["converged"][0]["accuracy"]}
        assert len(run["stages"]["features/train"]["units"]) == 5
        assert run["num_workers"] == 1
    assert runs[0]["accuracy"]["base"] > runs[1]["accuracy"]["base"]
    assert "trained_on" not in runs[4]["stages"]

    write_comparison(Storage(asked.output), runs)
    assert json.loads((tmp_path / "compare/compare.json").read_text())["runs"] == runs
    assert "base trained on with it to convergence | " in (tmp_path / "compare/compare.md").read_text()
    assert (tmp_path / "compare/compare.html").read_text().count("<svg") == 3


@pytest.mark.slow
def test_a_snapshot_is_the_network_that_so_many_steps_train(ray_session, tmp_path):
    """And a run that takes it is told apart from a run of its own by nothing but its place."""
    asked = experiment(tmp_path / "compare", snapshots=[20, 60], seeds=[1])
    (planned,) = asked.chosen(["steps=20"])
    run_experiment(asked, [planned], [*QUICK, "trained_on=null"])
    from fisher_ray import pipeline

    alone = digits(tmp_path / "alone", "base.steps=20", "seed=1", "trained_on=null")
    results = pipeline.run(alone)
    folders = (tmp_path / "alone", tmp_path / "compare" / planned.folder)
    one, other = (safetensors.torch.load_file(folder / "base/model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    (found,) = collect(asked)
    assert found["accuracy"] == results["accuracy"]


def test_runs_train_on_as_their_base_network_was_trained(tmp_path):
    asked = experiment(tmp_path)
    config = asked.config(asked.planned()[1], ["base.momentum=0.5", "trained_on.lr=0.01"])
    assert (config.base, config.seed, config.linear.views) == (None, 0, 1)
    assert config.model.checkpoint == f"{tmp_path}/base/seed-0/base/step-20.safetensors"
    assert config.trained_on is not None
    assert (config.trained_on.lr, config.trained_on.momentum, config.trained_on.batch_size) == (0.01, 0.5, 32)
    base = asked.base_config(1, [])
    assert base.base is not None
    assert (base.base.steps, base.base.snapshots, base.seed) == (60, (20, 60), 1)


def test_its_own_overrides_come_before_those_of_the_command_line(tmp_path):
    asked = experiment(tmp_path).model_copy(update={"overrides": ("metric.rank=7", "linear.hidden=false")})
    config = asked.config(asked.planned()[0], ["metric.rank=9"])
    assert (config.metric.rank, config.linear.hidden) == (9, False)


def test_some_of_the_runs_are_chosen(tmp_path):
    asked = experiment(tmp_path, workers=[1])
    assert [run.folder for run in asked.chosen(["steps=20", "seed=1"])] == ["steps-20/seed-1/views-1"]
    assert len(asked.chosen(["seed=0", "seed=1", "workers=None"])) == 4
    assert asked.chosen([]) == asked.planned()
    with pytest.raises(ConfigError, match="no run is left of 6"):
        asked.chosen(["steps=21"])
    with pytest.raises(ConfigError, match=r"'rank=1' is not of the form steps=N"):
        asked.chosen(["rank=1"])


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(ray_session, tmp_path, capsys):
    path = tmp_path / "compare.yaml"
    path.write_text(json.dumps(experiment(tmp_path / "unused", seeds=[0]).model_dump()))
    blocked = tmp_path / "out/steps-20/seed-0/views-1"
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("someone else's")
    overrides = [word for text in [*QUICK, "trained_on=null"] for word in ("--set", text)]
    with pytest.raises(SystemExit) as ended:
        compare(["--config", str(path), "--output", str(tmp_path / "out"), "--quiet", *overrides])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "error: 1 of 2 runs failed; the first, steps-20/seed-0/views-1: " in printed.err
    assert "| test accuracy, % | 60 steps |" in printed.out
    assert (tmp_path / "out/compare.html").exists()


def test_a_seed_whose_base_network_cannot_be_trained_is_named(tmp_path, monkeypatch):
    def diverges(config, *_, **__):
        raise ModelError(f"training of seed {config.seed} diverged")

    monkeypatch.setattr("fisher_ray.experiment.running.pipeline.run", diverges)
    asked = experiment(tmp_path)
    failed = run_experiment(asked, asked.planned(), OVERRIDES)
    assert list(failed) == asked.planned()
    assert failed[asked.planned()[-1]] == "its base network: training of seed 1 diverged"


def test_an_experiment_of_a_run_without_training_is_refused(tmp_path):
    asked = experiment(tmp_path)
    with pytest.raises(ConfigError, match="no section 'base'"):
        run_experiment(asked, asked.planned(), ["base=null"])
