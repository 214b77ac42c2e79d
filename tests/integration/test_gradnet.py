from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import fisher_ray
from fisher_ray import pipeline
from fisher_ray.errors import ResumeMismatchError
from fisher_ray.stages.gradnet.checkpoint import FILE, PROGRESS_FILE
from fisher_ray.store import verify
from tests.integration.processes import descendants, wait_for
from tests.integration.runs import Listening, bits, digits

TRAINING = ("gradnet.lr=0.1", "gradnet.momentum=0.9", "gradnet.widths=[32, 16]", "gradnet.steps=600")
ALONE = (*TRAINING, "linear.model=gradnet", "trained_on=null", "runtime.num_workers=2")
STAGES = ["base", "gradnet/ranges", "gradnet/entries", "gradnet", "gradnet/validation", "gradnet/test", "report"]


def long_training(output: Path):
    return digits(output, *ALONE, "gradnet.steps=3000", "gradnet.checkpoint_steps=100", "gradnet.draws=2")


@pytest.fixture(scope="session")
def alone(ray_session, tmp_path_factory):
    """An undisturbed run of GradNet alone on two workers: its folder and its results."""
    output = tmp_path_factory.mktemp("gradnet") / "run"
    return output, fisher_ray.run(long_training(output))


def train_workers():
    """The processes that Ray Train's workers are in, all of them descendants of this one."""
    titles = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(os.getpid())}
    return [pid for pid, path in titles.items() if path.exists() and path.read_text().startswith("ray::RayTrainWorker")]


class Acting(Listening):
    """Acts once a training has been told to be under way, from a checkpoint on."""

    def __init__(self, output: Path, act):
        super().__init__()
        self._checkpoint, self._act, self.steps = output / FILE, act, []

    def advanced(self, stage, done, total, text):
        if stage == "gradnet":
            self.steps.append(done)
            if self._checkpoint.exists() and self._act is not None:
                act, self._act = self._act, None
                act()


@pytest.mark.slow
def test_gradnet_alone_beats_the_briefly_trained_network_without_a_metric(alone):
    output, results = alone
    accuracy = results["accuracy"]
    assert accuracy["gradnet"] > accuracy["base"] + 0.1
    assert accuracy["fisher_linear"] is None
    assert accuracy["linear_probe"] is None
    assert results["seconds"]["gradnet"] > 0
    run = json.loads((output / "run.json").read_text())
    assert list(run["stages"]) == STAGES
    assert run["stages"]["gradnet/validation"]["result"]["gradnet"] > 0.7
    assert sorted(path.name for path in (output / "gradnet").iterdir()) == [
        "predictions.zarr",
        "ranges.zarr",
        "weights.zarr",
    ]
    page = (output / "report/report.html").read_text()
    assert "GradNet gets" in page
    assert "units of its blocks" in page
    assert not verify(str(output / "features/gradnet.zarr"))


@pytest.mark.slow
def test_gradnet_stands_beside_the_linear_model(ray_session, tmp_path):
    results = fisher_ray.run(digits(tmp_path / "run", *TRAINING))
    accuracy = results["accuracy"]
    assert min(accuracy["gradnet"], accuracy["fisher_linear"]) > accuracy["base"] + 0.1
    assert results["num_features"] == 640
    heard = Listening()
    assert pipeline.run(digits(tmp_path / "run", *TRAINING), progress=heard) == results
    assert heard.stages == []


@pytest.mark.slow
def test_a_worker_killed_in_training_changes_no_byte(alone, tmp_path):
    heard = Acting(tmp_path / "run", lambda: os.kill(train_workers()[0], signal.SIGKILL))
    results = pipeline.run(long_training(tmp_path / "run"), progress=heard)
    assert any("an attempt at the training of GradNet ended: Actor" in note for note in heard.notes)
    assert bits(tmp_path / "run") == bits(alone[0])
    assert results["accuracy"] == alone[1]["accuracy"]
    assert not train_workers()


@pytest.mark.slow
def test_an_interrupted_training_resumes_from_its_checkpoint_to_the_same_bytes(alone, tmp_path):
    heard = Acting(tmp_path / "run", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(long_training(tmp_path / "run"), progress=heard)
    wait_for(lambda: not train_workers(), 60, "the workers' end")
    told = {"done": 7, "total": 3000, "loss": 1.0, "validation": None}  # as if ended within its first second
    (tmp_path / "run" / PROGRESS_FILE).write_text(json.dumps(told))
    again = Acting(tmp_path / "run", None)
    pipeline.run(long_training(tmp_path / "run"), progress=again)
    assert again.stages[0] == "gradnet"
    assert min(again.steps, default=100) >= 100
    assert bits(tmp_path / "run") == bits(alone[0])


def test_the_keys_of_the_training_may_change_until_it_is_done_those_of_the_entries_not(alone):
    output, _ = alone
    with pytest.raises(ResumeMismatchError, match=r"gradnet\.draws was 2, now 1"):
        pipeline.run(digits(output, *ALONE, "gradnet.steps=3000"))
    with pytest.raises(ResumeMismatchError, match=r"gradnet\.steps was 3000, now 10"):
        pipeline.run(digits(output, *ALONE, "gradnet.steps=10", "gradnet.draws=2"))
