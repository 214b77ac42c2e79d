from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import fisher_ray
from fisher_ray import pipeline
from fisher_ray.stages import shallow
from fisher_ray.stages.minibatch import FILE, PROGRESS_FILE
from fisher_ray.store import open_features
from tests.integration.processes import wait_for
from tests.integration.runs import Listening, bits, digits
from tests.integration.test_gradnet import train_workers
from tests.reference.linear import logistic_objective, standardised


def streamed(output: Path):
    section = "{model: logistic, solver: minibatch, epochs: 150, batch_size: 64, checkpoint_steps: 7, penalties: [3.0]}"
    return digits(output, "runtime.num_workers=2", "trained_on=null", f"linear={section}")


class Acting(Listening):
    """Acts once the fit has told of an epoch and kept a checkpoint."""

    def __init__(self, output: Path, act):
        super().__init__()
        self._output, self._act, self.acted = output, act, False

    def advanced(self, stage, done, total, text):
        if stage == "linear" and "epochs, loss" in text and (self._output / FILE).exists() and not self.acted:
            self.acted = True
            self._act()


@pytest.fixture(scope="module")
def undisturbed(ray_session, tmp_path_factory):
    output = tmp_path_factory.mktemp("minibatch") / "run"
    return output, fisher_ray.run(streamed(output))


@pytest.mark.slow
def test_a_streamed_fit_reaches_the_optimum_on_the_digits_features(undisturbed):
    output, _ = undisturbed
    store = open_features(str(output / "features/train.zarr"))
    kept = store.read_kept(["features", "hidden", "labels"], 0, store.num_rows)
    labels = kept.pop("labels")
    x = np.concatenate([values.reshape(len(labels), -1) for values in kept.values()], 1).astype(np.float64)
    model = shallow.load_weights(str(output / "linear/weights.zarr"))
    columns, _, _ = standardised(x)
    best = LogisticRegression(C=10 / (3.0 * len(x)), tol=1e-8, max_iter=10_000).fit(columns, labels)
    least = logistic_objective(columns, labels, best.coef_, best.intercept_, 3.0)
    reached = logistic_objective(x, labels, model.weight.numpy(), model.bias.numpy(), 3.0)
    assert reached == pytest.approx(least, rel=1e-3)


@pytest.mark.slow
def test_a_streamed_fit_leaves_its_weights_alone(undisturbed):
    output, results = undisturbed
    assert results["accuracy"]["fisher_linear"] > results["accuracy"]["base"] + 0.1
    fitted = json.loads((output / "run.json").read_text())["stages"]["linear"]["result"]
    assert [item["penalty"] for item in fitted["path"]] == [3.0]
    assert fitted["steps"] >= 150
    names = {path.name for path in (output / "linear").iterdir()}
    assert not names & {Path(FILE).name, Path(PROGRESS_FILE).name, "sums-fit.zarr", "sums-all.zarr"}
    assert {"weights.zarr", "classifier.safetensors"} <= names


@pytest.mark.slow
def test_a_worker_killed_in_the_fit_changes_no_byte(undisturbed, tmp_path):
    def kill():
        (tmp_path / "run/linear/.checkpoint.safetensors.0123.partial").write_bytes(b"half")  # of a worker in a write
        os.kill(train_workers()[0], signal.SIGKILL)

    heard = Acting(tmp_path / "run", kill)
    results = pipeline.run(streamed(tmp_path / "run"), progress=heard)
    assert heard.acted
    assert any("an attempt at the logistic fit ended: Actor" in note for note in heard.notes)
    assert bits(tmp_path / "run") == bits(undisturbed[0])
    assert results["accuracy"] == undisturbed[1]["accuracy"]


@pytest.mark.slow
def test_an_interrupted_fit_resumes_from_its_checkpoint_to_the_same_bytes(undisturbed, tmp_path):
    heard = Acting(tmp_path / "run", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(streamed(tmp_path / "run"), progress=heard)
    wait_for(lambda: not train_workers(), 60, "the workers' end")
    assert (tmp_path / "run" / FILE).exists()
    (tmp_path / "run/linear/.checkpoint.safetensors.0123.partial").write_bytes(b"half")  # as of one killed in a write
    again = Listening()
    pipeline.run(streamed(tmp_path / "run"), progress=again)
    assert again.stages[0] == "linear"
    assert bits(tmp_path / "run") == bits(undisturbed[0])
