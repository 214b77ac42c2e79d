"""Whole runs of networks with many classes, and of networks that take tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisher_ray
from fisher_ray.config import Config
from fisher_ray.data.digits import digits as load
from fisher_ray.errors import RequestError
from fisher_ray.models import digits_transform
from fisher_ray.store import load_arrays
from tests.integration.runs import digits

NUM_TOKENS, LENGTH, CLASSES = 40, 12, 4


class Words(nn.Module):
    """Classes of the mean of what tokens are embedded as."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden, self.head = nn.Embedding(NUM_TOKENS, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.tokens(tokens)).relu().mean(1))


def as_tokens(values: np.ndarray, generator: torch.Generator | None) -> Tensor:
    if values.min() < 0:
        raise ValueError("no token")
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def in_buckets(ray_session, tmp_path_factory):
    """A run whose ten classes share four buckets, and its results."""
    output = tmp_path_factory.mktemp("buckets") / "run"
    return output, fisher_ray.run(digits(output, "scores.class_buckets=4", "seed=3", "trained_on=null"))


def test_features_of_buckets_take_over_from_the_network(in_buckets):
    output, results = in_buckets
    store = fisher_ray.open_features(str(output / "features/test.zarr"))
    rank = fisher_ray.LowRankMetric.load(str(output / "metric.zarr")).rank
    assert store.read("features", 0, 5).shape == (5, 4, rank)
    assert store.layout("features").dims == ("sample", "bucket", "rank")
    assert results["num_features"] == 4 * rank
    assert results["accuracy"]["fisher_linear"] > results["accuracy"]["base"] + 0.05


def test_the_classifier_has_the_run_s_own_buckets(in_buckets):
    output, _ = in_buckets
    rows = load("test")
    inputs = torch.stack([digits_transform(rows[row][0], None) for row in range(len(rows))])
    classifier = fisher_ray.FisherClassifier.from_run(str(output))
    stored, _ = load_arrays(str(output / "linear/predictions.zarr"))
    torch.testing.assert_close(classifier(inputs), torch.from_numpy(stored["fisher_linear"]), rtol=0, atol=2e-3)
    loaded = fisher_ray.FisherClassifier.load(str(output / "linear/classifier.safetensors"), classifier.model)
    assert torch.equal(loaded(inputs), classifier(inputs))
    program = classifier.export(inputs[:2]).module()
    torch.testing.assert_close(program(inputs[:9])[0], classifier(inputs[:9]), rtol=1e-4, atol=1e-4)


def test_what_needs_scores_of_classes_is_refused_or_left_out(in_buckets):
    output, _ = in_buckets
    with pytest.raises(RequestError, match=r"this run's are of 4 buckets of classes.*by: kernel"):
        fisher_ray.score(str(output), by="influence", rows=(0, 3))
    found = fisher_ray.score(str(output), by="kernel", rows=(0, 3), top=2)
    assert found["num_queries"] == 3
    place = fisher_ray.audit(str(output), top=5)["place"]
    assert "self_influence" not in fisher_ray.open_features(f"{place}/rows.zarr").arrays


def test_a_network_of_tokens_goes_the_whole_way(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("fisher_ray.stages.workbench.NUM_TRIED", 2)  # both of which are bad
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 900)
    own = labels[:, None] * (NUM_TOKENS // CLASSES) + rng.integers(0, NUM_TOKENS // CLASSES, (900, LENGTH))
    tokens = np.where(rng.random((900, LENGTH)) < 0.5, own, rng.integers(0, NUM_TOKENS, (900, LENGTH)))
    tokens[[300, 301], 0] = -1  # as the first two rows of the second split
    np.savez(Path(tmp_path) / "tokens.npz", inputs=tokens, labels=labels)
    source = {"format": "numpy", "path": "tokens.npz"}
    rows = {"train": [0, 300], "shallow": [300, 600], "test": [600, 900]}
    config = Config.from_dict(
        {
            "output": str(tmp_path / "run"),
            "data": {
                "root": str(tmp_path),
                "transform": f"{__name__}:as_tokens",
                "on_error": "skip",
                **{name: {**source, "rows": span} for name, span in rows.items()},
            },
            "model": {"factory": f"{__name__}:Words"},
            "base": {"steps": 40, "batch_size": 16, "lr": 0.1},
            "trained_on": None,
            "compression": {"dim": 128},
            "metric": {"rank": 64, "fraction": 1.0},
            "store": {"chunk_rows": 50},
            "runtime": {"num_workers": 1, "unit_rows": 100},
        }
    )
    results = fisher_ray.run(config)
    assert sorted(fisher_ray.open_features(f"{config.output}/features/train.zarr").skipped) == [0, 1]
    accuracy = results["accuracy"]
    assert accuracy["fisher_linear"] > 0.8
    assert accuracy["fisher_linear"] > accuracy["base"]
