"""Metric, features, linear model and classifier on tensors, against oracles in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisher_ray
from fisher_ray.errors import DataError, ModelError, RequestError, StoreError
from fisher_ray.models import mlp
from fisher_ray.store import finished_units
from tests.reference.gradients import weighted_scores
from tests.reference.linear import standardised

NUM_CLASSES = 3


def make(dtype: torch.dtype = torch.float64, num_samples: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = mlp((4, 5, NUM_CLASSES)).to(dtype).eval()
        inputs = torch.randn(num_samples, 1, 2, 2, dtype=dtype)
        return model, inputs, torch.randint(NUM_CLASSES, (num_samples,))


def all_scores(model: nn.Module, inputs: Tensor) -> Tensor:
    """√p-weighted scores ``(B, C, P)``, parameters joined in the order of identity's coordinates."""
    scores = weighted_scores(model, inputs)
    columns, start = [], 0
    for layer in (model.fc0, model.fc1):
        rows, width = layer.weight.shape
        weight = torch.arange(start, start + rows * width).reshape(rows, width)
        bias = torch.arange(start + rows * width, start + rows * (width + 1))[:, None]
        columns.append(torch.cat([weight, bias], 1).flatten())
        start += rows * (width + 1)
    return scores[:, :, torch.cat(columns)]


def test_the_features_of_all_parameters_are_the_whitened_scores():
    model, inputs, _ = make()
    scores = all_scores(model, inputs)
    metric = fisher_ray.fit_metric(model, inputs, compression="identity", rank=20, damping=0.1)

    fisher = torch.einsum("bcp,bcq->pq", scores, scores) / len(inputs)
    eigvals, eigvecs = torch.linalg.eigh(fisher)
    eigvals, eigvecs = eigvals.flip(0)[:20], eigvecs.flip(1)[:, :20]
    torch.testing.assert_close(metric.eigvals, eigvals, rtol=1e-10, atol=1e-12)
    phi = fisher_ray.features(model, metric, inputs)
    assert phi.shape == (40, NUM_CLASSES, 20)
    damping = 0.1 * float(fisher.trace()) / len(fisher)
    expected = scores @ eigvecs / (eigvals + damping).sqrt()
    # Eigenvectors are known up to their signs, the kernel is not.
    kernel = torch.einsum("acr,bdr->acbd", phi, phi)
    torch.testing.assert_close(kernel, torch.einsum("acr,bdr->acbd", expected, expected), rtol=1e-7, atol=1e-9)


def test_without_damping_the_features_second_moment_is_the_identity():
    model, inputs, _ = make()
    metric = fisher_ray.fit_metric(model, inputs, dim=24, damping=0.0)
    phi = fisher_ray.features(model, metric, inputs)

    moment = torch.einsum("bcr,bcs->rs", phi, phi) / len(inputs)
    torch.testing.assert_close(moment, torch.eye(metric.rank, dtype=torch.float64), rtol=0, atol=1e-6)


def test_data_may_come_in_any_batches_with_or_without_labels():
    model, inputs, labels = make()
    whole = fisher_ray.fit_metric(model, inputs, dim=16, damping=0.1)

    for batches in ([inputs[:7], inputs[7:]], [(inputs[:33], labels[:33]), (inputs[33:], labels[33:])]):
        parts = fisher_ray.fit_metric(model, batches, dim=16, damping=0.1)
        torch.testing.assert_close(parts.eigvals, whole.eigvals, rtol=1e-9, atol=1e-12)


def test_true_labels_give_the_empirical_fisher():
    model, inputs, labels = make()
    metric = fisher_ray.fit_metric(
        model, [(inputs, labels)], labels="true", compression="identity", damping=0.0, rank=30
    )

    probabilities = model(inputs).softmax(1).detach()
    scores = all_scores(model, inputs) / probabilities.sqrt()[:, :, None]
    own = scores[torch.arange(len(labels)), labels]
    expected = torch.linalg.eigvalsh(own.T @ own / len(own)).flip(0)[: metric.rank]
    torch.testing.assert_close(metric.eigvals, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "some"}, "labels 'some' is not one of all, true, sampled, uniform"),
        ({"compression": "zip"}, "compression 'zip' is not one of kronecker, identity"),
        ({"dim": 0}, "dim 0"),
        ({"labels": "true"}, r"labels 'true' needs batches of \(inputs, labels\)"),
    ],
)
def test_a_wrong_option_is_refused(options, words):
    model, inputs, _ = make()

    with pytest.raises(RequestError, match=words):
        fisher_ray.fit_metric(model, inputs, **options)


def test_data_that_can_be_read_only_once_is_refused():
    model, inputs, _ = make()

    with pytest.raises(RequestError, match="read only once"):
        fisher_ray.fit_metric(model, iter([inputs]))


def test_a_metric_of_another_network_is_refused_naming_the_layer():
    model, inputs, _ = make()
    metric = fisher_ray.fit_metric(model, inputs, dim=16)

    with pytest.raises(ModelError, match=r"layer 'fc1' with factors of 3 × 6, the network has \(4, 6\)"):
        fisher_ray.features(mlp((4, 5, 4)).double().eval(), metric, inputs)


@pytest.fixture
def trained(tmp_path):
    """Network, metric, store, weights and data; float32, as users have them."""
    model, inputs, labels = make(torch.float32, 300)
    metric = fisher_ray.fit_metric(model, inputs, dim=16)
    store = fisher_ray.write_features(
        model, metric, inputs, str(tmp_path / "f.zarr"), labels=labels, dtype="float32", chunk_rows=64
    )
    return model, metric, store, fisher_ray.train_linear(store, penalties=(0.1, 1.0)), inputs, labels


def test_stored_features_are_the_features(trained):
    model, metric, store, _, inputs, labels = trained

    torch.testing.assert_close(
        torch.from_numpy(store.read("features", 0, 300)),
        fisher_ray.features(model, metric, inputs),
        rtol=1e-6,
        atol=1e-6,
    )
    assert np.array_equal(store.read("labels", 0, 300), labels.numpy())
    torch.testing.assert_close(torch.from_numpy(store.read("logits", 0, 300)), model(inputs).detach())


def test_the_linear_model_is_ridge_on_standardised_columns(trained):
    _, _, store, weights, _, labels = trained
    x = np.concatenate([store.read("features", 0, 300).reshape(300, -1), store.read("hidden", 0, 300)], 1)

    columns, mean, scale = standardised(x)
    onehot = np.eye(NUM_CLASSES)[labels.numpy()]
    target = onehot - onehot.mean(0)
    ridge = np.linalg.solve(columns.T @ columns + weights.penalty * 300 * np.eye(x.shape[1]), columns.T @ target).T
    expected = ((x - mean) / scale) @ ridge.T + onehot.mean(0)
    np.testing.assert_allclose(weights.scores(torch.from_numpy(x)).numpy(), expected, rtol=0, atol=2e-4)
    assert weights.penalty in (0.1, 1.0)
    assert weights.temperature > 0


def test_features_without_labels_do_not_train(tmp_path):
    model, inputs, _ = make()
    metric = fisher_ray.fit_metric(model, inputs, dim=16)
    store = fisher_ray.write_features(model, metric, inputs, str(tmp_path / "f.zarr"))

    with pytest.raises(DataError, match="label -1"):
        fisher_ray.train_linear(store)


def test_a_store_that_was_begun_is_finished(trained, tmp_path, monkeypatch):
    model, metric, store, _, inputs, labels = trained
    from fisher_ray.classifier import fitting

    written, write_unit = [], fitting.write_unit

    def break_off(url, unit, arrays, **options):
        if unit.index == 2:
            raise KeyboardInterrupt
        written.append(unit.index)
        return write_unit(url, unit, arrays, **options)

    monkeypatch.setattr(fitting, "write_unit", break_off)
    url = str(tmp_path / "g.zarr")
    options = {"labels": labels, "dtype": "float32", "chunk_rows": 64}
    with pytest.raises(KeyboardInterrupt):
        fisher_ray.write_features(model, metric, inputs, url, **options)
    with pytest.raises(StoreError, match="seal"):
        fisher_ray.open_features(url)
    assert finished_units(url) == {0, 1}

    monkeypatch.setattr(fitting, "write_unit", write_unit)
    finished = fisher_ray.write_features(model, metric, inputs, url, **options)
    assert np.array_equal(finished.read("features", 0, 300), store.read("features", 0, 300))


@pytest.mark.parametrize("views", [1, 2])
def test_the_classifier_is_the_linear_model_on_the_features(trained, views):
    model, metric, _, weights, inputs, _ = trained
    classifier = fisher_ray.FisherClassifier(model, metric, weights, views=views)

    parts = []
    for part in (inputs, inputs.flip(-1))[:views]:
        hidden = model.relu0(model.fc0(part.flatten(1)))
        parts.append(torch.cat([fisher_ray.features(model, metric, part).flatten(1), hidden], 1).detach())
    expected = weights.scores(sum(parts) / views)
    torch.testing.assert_close(classifier(inputs), expected, rtol=1e-5, atol=1e-5)
    probabilities = classifier.predict_proba(inputs)
    torch.testing.assert_close(probabilities, (expected / weights.temperature).softmax(1), rtol=1e-4, atol=1e-5)


def test_a_saved_classifier_predicts_the_same_bits(trained, tmp_path):
    model, metric, _, weights, inputs, _ = trained
    classifier = fisher_ray.FisherClassifier(model, metric, weights, views=2)
    classifier.save(str(tmp_path / "c.safetensors"))
    other = mlp((4, 5, NUM_CLASSES))

    loaded = fisher_ray.FisherClassifier.load(str(tmp_path / "c.safetensors"), other)
    assert torch.equal(loaded.predict_proba(inputs), classifier.predict_proba(inputs))
    with pytest.raises(ModelError, match=r"does not fit the network: .*fc1\.weight"):
        fisher_ray.FisherClassifier.load(str(tmp_path / "c.safetensors"), mlp((4, 5, 7)))


def test_a_file_that_is_no_classifier_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"no")
    for name in ("x.safetensors", "y.safetensors"):
        with pytest.raises(StoreError, match=r"is not a file of FisherClassifier\.save"):
            fisher_ray.FisherClassifier.load(str(tmp_path / name), mlp((4, 5, 3)))


def test_a_metric_of_labels_that_a_new_sample_lacks_is_refused():
    model, inputs, labels = make()
    metric = fisher_ray.fit_metric(model, [(inputs, labels)], labels="true", dim=8)
    weights = fisher_ray.linear.LinearWeights(torch.zeros(3, 8), torch.zeros(3), 1.0)

    with pytest.raises(ModelError, match="those of true labels"):
        fisher_ray.FisherClassifier(model, metric, weights)


def test_weights_of_other_columns_are_refused(trained):
    model, _, _, weights, inputs, _ = trained
    other = fisher_ray.fit_metric(model, inputs, dim=8)

    with pytest.raises(ModelError, match="fitted on the features of another metric"):
        fisher_ray.FisherClassifier(model, other, weights)(inputs)
