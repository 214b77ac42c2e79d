"""Metric, features, linear model and classifier on tensors, against oracles in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_ray
from fisher_ray import classifier as classifier_room
from fisher_ray.config import SourceConfig
from fisher_ray.data import open_source
from fisher_ray.data.digits import digits
from fisher_ray.errors import DataError, ModelError, RequestError, StoreError
from fisher_ray.linear import LinearWeights
from fisher_ray.models import digits_mlp, mlp
from fisher_ray.stages.shallow import store_rows
from fisher_ray.store import StoreWriter, finished_units
from tests.gradients import networks
from tests.reference import metric as reference
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


@pytest.mark.parametrize("name", ["mlp", "strided grouped dilated", "linear at every position"])
def test_the_features_kernel_is_the_damped_fisher_kernel(name):
    """Kronecker bases are kept in float32, hence the tolerance; as many coordinates as parameters lose nothing."""
    model, inputs = networks.make(name, 12)
    scores = reference.scores(model, inputs)
    fisher = torch.einsum("bcp,bcq->pq", scores, scores) / len(inputs)
    metric = fisher_ray.fit_metric(model, inputs, dim=scores.shape[2], damping=0.1)

    phi = fisher_ray.features(model, metric, inputs)
    assert phi.shape == (12, scores.shape[1], metric.rank)
    assert metric.rank < metric.dim <= scores.shape[2]
    rows = scores.flatten(0, 1).numpy()
    expected = reference.damped_kernel(rows, rows, fisher.numpy(), metric.damping)
    kernel = (phi.flatten(0, 1) @ phi.flatten(0, 1).T).numpy()
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert metric.damping == pytest.approx(0.1 * float(fisher.trace()) / metric.dim, rel=1e-5)


def test_the_digits_features_are_white_on_the_rows_they_were_fitted_on():
    rows = digits("train")
    inputs = torch.stack([torch.from_numpy(rows[row][0])[None] for row in range(200)]).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits_mlp().double().eval()
    metric = fisher_ray.fit_metric(model, inputs, dim=256, rank=64, damping=0.0)

    phi = fisher_ray.features(model, metric, inputs)
    assert phi.shape == (200, 10, 64)
    moment = torch.einsum("bcr,bcs->rs", phi, phi) / len(inputs)
    torch.testing.assert_close(moment, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-8)


def assert_metrics_agree(
    one: fisher_ray.LowRankMetric, other: fisher_ray.LowRankMetric, model: nn.Module, x: Tensor
) -> None:
    torch.testing.assert_close(one.eigvals, other.eigvals, rtol=1e-9, atol=1e-12)
    assert one.damping == pytest.approx(other.damping, rel=1e-9)
    kernels = []
    for metric in (one, other):
        phi = fisher_ray.features(model, metric, x)
        kernels.append(torch.einsum("acr,bdr->acbd", phi, phi))
    torch.testing.assert_close(*kernels, rtol=1e-5, atol=1e-6)  # float32 bases, of factor sums that differ by rounding


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 39), max_size=4, unique=True), st.booleans(), st.sampled_from(["all", "sampled", "uniform"])
)
def test_data_may_come_in_any_batches_with_or_without_labels(cuts, labelled, scores):
    model, inputs, labels = make()
    options: dict[str, Any] = {"labels": scores, "dim": 16, "rank": 8, "damping": 0.1, "seed": 5}
    whole = fisher_ray.fit_metric(model, inputs, **options)

    spans = [slice(*span) for span in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True)]
    batches = [(inputs[span], labels[span]) if labelled else inputs[span] for span in spans]
    assert_metrics_agree(fisher_ray.fit_metric(model, batches, **options), whole, model, inputs)


def test_a_data_loader_a_source_and_a_tensor_give_the_same_metric(tmp_path):
    model, inputs, labels = make(num_samples=150)
    inputs = inputs.float().double()  # as the source keeps them
    options: dict[str, Any] = {"dim": 16, "rank": 8, "damping": 0.1}
    whole = fisher_ray.fit_metric(model, inputs, **options)
    np.savez(tmp_path / "d.npz", inputs=inputs.float().numpy(), labels=labels.numpy())
    source = open_source(SourceConfig(format="numpy", path="d.npz"), root=str(tmp_path), transform=None, key="data")
    datasets = (TensorDataset(inputs, labels), TensorDataset(inputs))

    for data in (source, *(DataLoader(dataset, batch_size=37) for dataset in datasets)):
        assert_metrics_agree(fisher_ray.fit_metric(model, data, **options), whole, model, inputs)
    true = [fisher_ray.fit_metric(model, data, labels="true", **options) for data in (source, [(inputs, labels)])]
    assert_metrics_agree(true[0], true[1], model, inputs)


def test_whole_numbers_of_any_type_are_labels():
    model, inputs, labels = make()
    one, other = (
        fisher_ray.fit_metric(model, [(inputs, given)], labels="true", dim=8, damping=0.1)
        for given in (labels, labels.to(torch.uint8))
    )
    assert torch.equal(one.eigvals, other.eigvals)


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
        ({"compression": "zip"}, "compression 'zip' is not one of kronecker, random, sketch, topk, identity"),
        ({"estimator": "best"}, "estimator 'best' is not one of exact, nystrom, frequent_directions, diagonal"),
        ({"structure": "layers"}, "structure 'layers' is not one of global, block, adjacent"),
        ({"precision": "half"}, "precision 'half' is not one of float32, bfloat16, float16"),
        ({"dim": 0}, r"dim: .*given 0"),
        ({"rank": -1}, r"rank: .*given -1"),
        ({"rank": "a"}, r"rank: .*given 'a'"),
        ({"damping": -0.5}, r"damping: .*given -0.5"),
        ({"damping": True}, "damping: .*given True"),
        ({"centered": True}, "centered: over all classes"),
        ({"draws": 7}, "draws 7"),
        ({"metric_labels": "some"}, "labels: .*given 'some'"),
        ({"damping": "much"}, "damping: .*given 'much'"),
        ({"damping": float("nan")}, "damping: .*given nan"),
        ({"labels": "true"}, r"labels 'true' needs batches of \(inputs, labels\)"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_before_any_work(options, words):
    model, inputs, _ = make()
    model.register_forward_hook(lambda *_: pytest.fail("the network was asked"))

    with pytest.raises(RequestError, match=words):
        fisher_ray.fit_metric(model, inputs, **options)


@pytest.mark.parametrize(
    "data",
    [np.zeros((8, 3, 2, 2), np.float32), [np.zeros((8, 4), np.float32)], [(torch.zeros(8, 4), [0] * 8)], ["a"], 3],
    ids=["array", "batch of an array", "labels in a list", "word", "number"],
)
def test_data_that_is_no_tensor_is_refused_with_what_to_give(data):
    model, _, _ = make()

    with pytest.raises(RequestError, match="tensor"):
        fisher_ray.fit_metric(model, data, dim=4)


def test_data_without_rows_is_refused():
    model, inputs, _ = make()

    for data in ([], inputs[:0], [inputs[:0]]):
        with pytest.raises(DataError, match="no rows"):
            fisher_ray.fit_metric(model, data, dim=4)


def test_every_entry_of_too_many_parameters_is_refused():
    wide = mlp((64, 300, 10)).eval()
    wide.register_forward_hook(lambda *_: pytest.fail("the network was asked, and a matrix of 4 GB is next"))

    with pytest.raises(RequestError, match=r"22510 coordinates.*a matrix of 22510 x 22510"):
        fisher_ray.fit_metric(wide, torch.zeros(2, 64), compression="identity")


def test_data_that_can_be_read_only_once_is_refused():
    model, inputs, _ = make()

    with pytest.raises(RequestError, match="read only once"):
        fisher_ray.fit_metric(model, iter([inputs]))


def test_a_metric_of_another_network_is_refused_naming_the_layer():
    model, inputs, _ = make()
    metric = fisher_ray.fit_metric(model, inputs, dim=16)

    with pytest.raises(ModelError, match=r"layer 'fc1' with factors of 3 × 6, the network has 4 × 6"):
        fisher_ray.features(mlp((4, 5, 4)).double().eval(), metric, inputs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Network, metric, store, weights and data; float32, as users have them."""
    model, inputs, labels = make(torch.float32, 300)
    metric = fisher_ray.fit_metric(model, inputs, dim=16)
    url = str(tmp_path_factory.mktemp("features") / "f.zarr")
    store = fisher_ray.write_features(model, metric, inputs, url, labels=labels, dtype="float32", chunk_rows=64)
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


def test_the_penalty_is_the_one_that_predicts_held_out_rows_best(trained):
    _, _, store, _, _, _ = trained
    penalties = (1e-4, 0.03, 1.0, 30.0, 3000.0)
    parts = {}
    for part in ("fit", "validation", "all"):
        blocks = list(store_rows(store, part, seed=7, validation=0.3, use_hidden=False))
        parts[part] = [np.concatenate([block[name].numpy() for block in blocks]) for name in ("x", "labels", "index")]
    assert sorted([*parts["fit"][2], *parts["validation"][2]]) == parts["all"][2].tolist()
    assert 60 < len(parts["validation"][2]) < 120

    found = []
    for penalty in penalties:
        columns, mean, scale = standardised(parts["fit"][0])
        onehot = np.eye(NUM_CLASSES)[parts["fit"][1]]
        gram = columns.T @ columns + penalty * len(columns) * np.eye(columns.shape[1])
        weight = np.linalg.solve(gram, columns.T @ (onehot - onehot.mean(0)))
        scores = (parts["validation"][0] - mean) / scale @ weight + onehot.mean(0)
        found.append(float((scores.argmax(1) == parts["validation"][1]).mean()))
    best = max(range(len(penalties)), key=lambda place: (found[place], penalties[place]))
    weights = fisher_ray.train_linear(store, penalties=penalties, validation=0.3, hidden=False, seed=7)
    assert len(set(found)) > 1
    assert weights.penalty == penalties[best]
    assert weights.weight.shape == (NUM_CLASSES, parts["all"][0].shape[1])


def test_other_labels_train_on_the_same_features(trained):
    store, others = trained[2], torch.arange(300) % 2
    others[10:40] = -1
    weights = fisher_ray.train_linear(store, labels=others, penalties=(1.0,))
    blocks = list(store_rows(store, "all", seed=0, validation=0.1, use_hidden=True, labels=others))
    x, found = (np.concatenate([block[name].numpy() for block in blocks]) for name in ("x", "labels"))
    assert np.array_equal(found, others[others >= 0])

    columns, _, scale = standardised(x)
    onehot = np.eye(2)[found]
    gram = columns.T @ columns + len(x) * np.eye(x.shape[1])
    expected = np.linalg.solve(gram, columns.T @ (onehot - onehot.mean(0))).T / scale
    np.testing.assert_allclose(weights.weight.numpy() * scale, expected * scale, atol=1e-5)


def test_balanced_classes_are_those_of_rows_repeated_as_often_as_they_count(trained, tmp_path):
    model, metric, _, _, inputs, labels = trained
    few = torch.cat([torch.arange(300)[labels == 0], torch.arange(300)[labels == 1][:20]])
    weights = {1: 3.0}
    repeated = torch.cat([few, few[labels[few] == 1], few[labels[few] == 1]])
    made = []
    for number, (rows, asked) in enumerate([(few, weights), (repeated, "none")]):
        own = fisher_ray.write_features(
            model, metric, inputs[rows], str(tmp_path / f"{number}.zarr"), labels=labels[rows], dtype="float32"
        )
        made.append(fisher_ray.train_linear(own, class_weights=asked, penalties=(1.0,), validation=0.2))
    torch.testing.assert_close(made[0].weight, made[1].weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(made[0].bias, made[1].bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalties": ()}, "penalties"),
        ({"penalties": (0.1, -1.0)}, "penalty -1.0 is not a positive number"),
        ({"validation": 0.0}, r"validation 0\.0"),
        ({"validation": 1.0}, r"validation 1\.0"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels \(3,\) are not integers from 0 .*\(300,\)"),
        ({"labels": torch.full((300,), -2)}, "are not integers from 0"),
        ({"labels": torch.full((300,), -1)}, "are not integers from 0"),
        ({"labels": torch.zeros(300)}, "labels are torch.float32"),
    ],
    ids=str,
)
def test_a_wrong_option_of_the_linear_model_is_refused_before_any_row_is_read(trained, options, words, monkeypatch):
    store = trained[2]
    monkeypatch.setattr(type(store), "read", lambda *_: pytest.fail("the store was read"))

    with pytest.raises(RequestError, match=words):
        fisher_ray.train_linear(store, **options)


def test_features_without_labels_do_not_train(tmp_path):
    model, inputs, _ = make()
    metric = fisher_ray.fit_metric(model, inputs, dim=16)
    store = fisher_ray.write_features(model, metric, inputs, str(tmp_path / "f.zarr"))

    with pytest.raises(DataError, match="label -1"):
        fisher_ray.train_linear(store)


def test_a_store_that_was_begun_is_finished(trained, tmp_path, monkeypatch):
    model, metric, store, _, inputs, labels = trained
    written, write_unit = [], StoreWriter.write_unit

    def break_off(writer, unit, arrays):
        if unit.index == 2:
            raise KeyboardInterrupt
        written.append(unit.index)
        return write_unit(writer, unit, arrays)

    monkeypatch.setattr(StoreWriter, "write_unit", break_off)
    url = str(tmp_path / "g.zarr")
    options = {"labels": labels, "dtype": "float32", "chunk_rows": 64}
    with pytest.raises(KeyboardInterrupt):
        fisher_ray.write_features(model, metric, inputs, url, **options)
    with pytest.raises(StoreError, match="seal"):
        fisher_ray.open_features(url)
    assert finished_units(url) == {0, 1}

    monkeypatch.setattr(StoreWriter, "write_unit", write_unit)
    finished = fisher_ray.write_features(model, metric, inputs, url, **options)
    assert np.array_equal(finished.read("features", 0, 300), store.read("features", 0, 300))

    monkeypatch.setattr(StoreWriter, "write_unit", lambda *_: pytest.fail("a finished unit was written again"))
    assert fisher_ray.write_features(model, metric, inputs, url, **options).num_rows == 300


@pytest.mark.parametrize("changed", ["model", "metric", "inputs", "labels"])
def test_a_store_of_something_else_is_not_taken_for_this_one(trained, changed):
    model, metric, store, _, inputs, labels = trained
    if changed == "model":
        model = mlp((4, 5, NUM_CLASSES)).eval()
    elif changed == "metric":
        metric = fisher_ray.fit_metric(model, inputs * 1.001, dim=16)
    elif changed == "inputs":
        inputs = torch.cat([inputs[:-1], inputs[-1:] + 1])
    else:
        labels = labels.flip(0)

    with pytest.raises(StoreError, match=r"holds another store: .*fingerprints"):
        fisher_ray.write_features(model, metric, inputs, store.url, labels=labels, dtype="float32", chunk_rows=64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": torch.zeros(299, dtype=torch.int64)}, r"labels \(299,\)"),
        ({"labels": torch.zeros(300)}, r"labels .*float32"),
        ({"views": 3}, "views 3"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"chunk_rows": 0}, "chunk_rows 0"),
    ],
    ids=["another length", "fractions", "views", "dtype", "chunk_rows"],
)
def test_a_wrong_request_for_features_is_refused(trained, tmp_path, options, words):
    model, metric, _, _, inputs, labels = trained

    with pytest.raises((RequestError, StoreError), match=words):
        fisher_ray.write_features(model, metric, inputs, str(tmp_path / "h.zarr"), **{"labels": labels, **options})
    assert not (tmp_path / "h.zarr").exists()


def test_vectors_have_no_mirror_image(trained, tmp_path):
    model, metric, _, weights, inputs, _ = trained
    vectors = inputs.flatten(1)

    with pytest.raises(RequestError, match=r"views 2 mirrors pictures.*\(4,\)"):
        fisher_ray.write_features(model, metric, vectors, str(tmp_path / "h.zarr"), views=2)
    with pytest.raises(RequestError, match="views 2 mirrors pictures"):
        fisher_ray.FisherClassifier(model, metric, weights, views=2)(vectors)


def test_both_views_are_averaged_in_the_store_too(trained, tmp_path):
    model, metric, _, _, inputs, _ = trained
    store = fisher_ray.write_features(model, metric, inputs, str(tmp_path / "h.zarr"), dtype="float32", views=2)

    parts = [fisher_ray.features(model, metric, part) for part in (inputs, inputs.flip(-1))]
    stored = torch.from_numpy(store.read("features", 0, 300))
    torch.testing.assert_close(stored, (parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-5)
    logits = (model(inputs) + model(inputs.flip(-1))).detach() / 2
    torch.testing.assert_close(torch.from_numpy(store.read("logits", 0, 300)), logits)
    assert (store.read("labels", 0, 300) == -1).all()


def test_stacked_views_are_rows_of_their_own_and_the_classifier_averages_their_scores(trained, tmp_path):
    model, metric, _, _, inputs, labels = trained
    options = {"labels": labels, "dtype": "float32", "views": 2}
    store = fisher_ray.write_features(model, metric, inputs, str(tmp_path / "h.zarr"), **options, view_mode="stack")
    assert store.attributes["views"] == "stacked"
    parts = [fisher_ray.features(model, metric, part) for part in (inputs, inputs.flip(-1))]
    stored = torch.from_numpy(store.read("features", 0, 300))
    torch.testing.assert_close(stored, torch.stack(parts, 1), rtol=1e-5, atol=1e-5)

    weights = fisher_ray.train_linear(store, penalties=(0.3,))
    hidden = [model.relu0(model.fc0(part.flatten(1))) for part in (inputs, inputs.flip(-1))]
    x = torch.stack([torch.cat([p.flatten(1), h], 1) for p, h in zip(parts, hidden, strict=True)], 1).detach()
    rows = x.flatten(0, 1).double().numpy()
    columns, mean, scale = standardised(rows)
    onehot = np.eye(NUM_CLASSES)[labels.numpy().repeat(2)]
    ridge = Ridge(alpha=0.3 * len(rows), solver="cholesky").fit(columns, onehot)
    expected = ridge.predict((rows - mean) / scale).reshape(300, 2, NUM_CLASSES).mean(1)
    scores = fisher_ray.FisherClassifier(model, metric, weights, views=2)(inputs).detach().numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(RequestError, match="view_mode 'both'"):
        fisher_ray.write_features(model, metric, inputs, str(tmp_path / "i.zarr"), view_mode="both")


@pytest.mark.parametrize("view_mode", ["average", "stack"])
def test_classes_are_balanced_without_the_hidden_layer_too(trained, tmp_path, view_mode):
    model, metric, _, _, inputs, labels = trained
    given = {"labels": labels, "views": 2, "view_mode": view_mode}
    store = fisher_ray.write_features(model, metric, inputs, str(tmp_path / "h.zarr"), **given)
    weights = fisher_ray.train_linear(store, penalties=(0.3,), hidden=False, class_weights="balanced")
    counts = torch.bincount(labels, minlength=NUM_CLASSES)
    by_hand = {number: 300 / (NUM_CLASSES * int(count)) for number, count in enumerate(counts)}
    same = fisher_ray.train_linear(store, penalties=(0.3,), hidden=False, class_weights=by_hand)
    torch.testing.assert_close(weights.weight, same.weight)
    assert weights.weight.shape == (NUM_CLASSES, NUM_CLASSES * metric.rank)


def test_half_precision_keeps_the_features_to_their_ten_bits(trained, tmp_path):
    model, metric, store, _, inputs, _ = trained
    half = fisher_ray.write_features(model, metric, inputs, str(tmp_path / "h.zarr"), codec="zstd")

    whole = store.read("features", 0, 300)
    np.testing.assert_allclose(half.read("features", 0, 300), whole, rtol=2**-11, atol=1e-6 * np.abs(whole).max())


def test_no_inputs_have_no_features(trained):
    model, metric, _, weights, inputs, _ = trained

    assert fisher_ray.features(model, metric, inputs[:0]).shape == (0, NUM_CLASSES, metric.rank)
    assert fisher_ray.FisherClassifier(model, metric, weights).predict_proba(inputs[:0]).shape == (0, NUM_CLASSES)


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
    torch.testing.assert_close(probabilities.sum(1), torch.ones(300), rtol=0, atol=1e-6)


def test_the_classifier_does_without_the_hidden_layer_where_the_weights_do(trained):
    model, metric, store, _, inputs, _ = trained
    weights = fisher_ray.train_linear(store, penalties=(1.0,), hidden=False)

    expected = weights.scores(fisher_ray.features(model, metric, inputs).flatten(1))
    torch.testing.assert_close(fisher_ray.FisherClassifier(model, metric, weights)(inputs), expected)


class Gated(nn.Module):
    """Multiplies by its input, which autograd then keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(x) * x)


def test_features_of_tensors_made_in_inference_mode():
    model, inputs = Gated().eval(), torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    metric = fisher_ray.fit_metric(model, inputs, dim=12)
    with torch.inference_mode():
        made = inputs * 1
        inside = fisher_ray.features(model, metric, made)

    assert made.is_inference()
    assert torch.equal(inside, fisher_ray.features(model, metric, inputs))
    assert torch.equal(fisher_ray.features(model, metric, made), inside)


def test_a_classifier_predicts_the_same_in_whatever_mode_it_is_put():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5), nn.Linear(6, 3)]
        model, (_, inputs, _) = nn.Sequential(*layers).eval(), make(torch.float32)
        metric = fisher_ray.fit_metric(model, inputs, dim=12)
        weights = LinearWeights(torch.randn(3, 3 * metric.rank), torch.zeros(3), 1.0)
    made = fisher_ray.FisherClassifier(model, metric, weights)
    expected = made(inputs)

    assert torch.equal(made.train()(inputs), expected)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(made(inputs), expected)
            assert torch.equal(made(inputs * 1), expected)  # a tensor made in that mode
    assert not made(inputs).requires_grad
    assert not any(parameter.grad is not None for parameter in model.parameters())


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
    save_file({"x": torch.zeros(2)}, tmp_path / "w.safetensors", {"fisher_ray": "[]"})
    (tmp_path / "y.safetensors").write_bytes(b"no")
    (tmp_path / "z.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    for name in ("w.safetensors", "x.safetensors", "y.safetensors", "z.safetensors"):
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


def test_a_classifier_that_was_cut_short_or_is_of_another_schema_is_refused(trained, tmp_path):
    model, metric, _, weights, _, _ = trained
    raw = fisher_ray.FisherClassifier(model, metric, weights).to_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[:-1])
    (tmp_path / "new.safetensors").write_bytes(raw.replace(b'\\"schema\\": 2', b'\\"schema\\": 3'))

    with pytest.raises(StoreError, match=r"is not a file of FisherClassifier\.save"):
        fisher_ray.FisherClassifier.load(str(tmp_path / "cut.safetensors"), mlp((4, 5, NUM_CLASSES)))
    with pytest.raises(StoreError, match="has schema 3, this program reads 2"):
        fisher_ray.FisherClassifier.load(str(tmp_path / "new.safetensors"), mlp((4, 5, NUM_CLASSES)))
    with pytest.raises(StoreError, match=r"there is no file .*gone\.safetensors"):
        fisher_ray.FisherClassifier.load(str(tmp_path / "gone.safetensors"), mlp((4, 5, NUM_CLASSES)))


def test_what_a_run_has_not_made_yet_is_named(tmp_path):
    config = {
        "output": str(tmp_path),
        "data": {"shallow": {"path": "a"}, "test": {"path": "b"}},
        "model": {"factory": "fisher_ray.models:digits_mlp", "checkpoint": "c"},
    }
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "program": "fisher_ray", "config": config}))

    with pytest.raises(StoreError, match=r"there is no .*base/model\.safetensors"):
        fisher_ray.FisherClassifier.from_run(str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match=r"base/model\.safetensors is damaged"):
        fisher_ray.FisherClassifier.from_run(str(tmp_path))


def test_the_room_exports_what_the_package_does():
    assert set(classifier_room.__all__) <= set(fisher_ray.__all__)
