from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from fisher_ray.records import Unit
from fisher_ray.stages import logistic, minibatch, planning, shallow, tasks
from fisher_ray.stages.exchange import Alone
from fisher_ray.store import load_arrays, open_features, verify
from tests.reference.linear import logistic_objective, standardised
from tests.stages.small_runs import NUM_CLASSES, fit_metric, shallow_rows, small_bench, write_features

STACK = {"views": 2, "view_mode": "stack", "validation": 0.3}
BAD = (7, 41)
GOOD = [row for row in range(70) if row not in BAD]


def stacked(folder, **linear):
    """A run with the features of every view of its samples."""
    bench = small_bench(folder, linear={**STACK, **linear}, bad=BAD, data={"on_error": "skip"})
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    write_features(bench, "test", "test")
    return bench


def rows_of(bench, name, *columns):
    """The stored views ``(N, V, F)`` and the labels of all good samples, read without the linear model's code."""
    store = open_features(bench.url(f"features/{name}.zarr"))
    kept = store.read_kept([*columns, "labels", "index"], 0, store.num_rows)
    views = [kept[key].reshape(len(kept["labels"]), 2, -1) for key in columns]
    return np.concatenate(views, 2).astype(np.float64), kept["labels"], kept["index"]


def ridge(x, labels, penalty):
    """Return scores as a function of views ``(N, V, F)``, of a fit to each view ``(N, V, F)`` as a row of its own."""
    rows, repeated = x.reshape(-1, x.shape[2]), np.repeat(labels, x.shape[1])
    columns, mean, scale = standardised(rows)
    found = Ridge(alpha=penalty * len(rows), solver="cholesky").fit(columns, np.eye(NUM_CLASSES)[repeated])
    return lambda views: found.predict(((views - mean) / scale).reshape(-1, x.shape[2])).reshape(
        *views.shape[:2], NUM_CLASSES
    )


def summed(bench, task):
    units = [Unit(0, 0, 40), Unit(1, 40, 70)]
    return [
        {name: sum(task(bench, unit, 1, part=part)[1][name] for unit in units) for name in names}
        for part, names in ((part, task(bench, units[0], 1, part=part)[1]) for part in ("fit", "validation"))
    ]


def test_every_views_features_are_stored_beside_each_other(tmp_path):
    bench = stacked(tmp_path)
    inputs = shallow_rows(bench)[0][GOOD]
    store = open_features(bench.url("features/train.zarr"))
    assert store.layout("features").dims == ("sample", "view", "class", "rank")
    assert store.layout("hidden").dims == ("sample", "view", "hidden")
    kept = store.read_kept(["features", "hidden", "logits"], 0, 70)
    for view, part in enumerate((inputs, inputs.flip(-1))):
        scores = bench.engine.all_classes(part)
        expected = bench.metric.transform(bench.compressor.compress(scores)).numpy()
        np.testing.assert_allclose(kept["features"][:, view], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(kept["hidden"][:, view], scores.hidden, rtol=1e-5, atol=1e-6)
    logits = (bench.model(inputs) + bench.model(inputs.flip(-1))).detach() / 2
    np.testing.assert_allclose(kept["logits"], logits, rtol=1e-5, atol=1e-6)
    assert set(store.skipped) == set(BAD)
    assert not verify(store.url)


def test_ridge_is_fitted_to_each_view_and_predicts_by_their_mean(tmp_path):
    penalties = [1e-2, 0.3, 30.0]
    bench = stacked(tmp_path, penalties=penalties)
    fit, validation = summed(bench, tasks.sum_gram)
    chosen = shallow.choose_penalty(bench, fit)
    x, labels, index = rows_of(bench, "train", "features", "hidden")
    held = shallow.held_out(index, bench.config.seed, 0.3)
    assert 10 < held.sum() < 35
    assert fit["counts"].sum() == 2 * (~held).sum()
    path = [ridge(x[~held], labels[~held], penalty)(x[held]).mean(1).argmax(1) for penalty in penalties]
    accuracies = [float((found == labels[held]).mean()) for found in path]
    assert [item["accuracy"] for item in chosen["path"]] == pytest.approx(accuracies, abs=1e-12)

    kept = {name: chosen[name] for name in ("penalty", "rank", "damping", "temperature")}
    result = shallow.fit_ridge(bench, fit, validation, **kept)
    assert result["num_rows"] == 2 * len(GOOD)
    probe = shallow.fit_probe(bench)
    shallow.evaluate(bench)
    found, _ = load_arrays(bench.url("linear/predictions.zarr"))
    tests, test_labels, _ = rows_of(bench, "test", "features", "hidden")
    expected = ridge(x, labels, chosen["penalty"])(tests).mean(1)
    np.testing.assert_allclose(found["fisher_linear"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    hidden, _, _ = rows_of(bench, "train", "hidden")
    tests, _, _ = rows_of(bench, "test", "hidden")
    expected = ridge(hidden, labels, probe["ridge"]["penalty"])(tests).mean(1)
    np.testing.assert_allclose(found["linear_probe_ridge"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert found["labels"].tolist() == test_labels.tolist()


@pytest.mark.parametrize("solver", ["full_batch", "minibatch"])
def test_logistic_regression_is_fitted_to_each_view(tmp_path, solver):
    penalty = 0.3
    linear = {"model": "logistic", "solver": solver, "penalties": [penalty], "epochs": 60, "lr": 0.03}
    bench = stacked(tmp_path, **linear, batch_size=16, max_steps=100)
    streamed = solver == "minibatch"
    sums = summed(bench, tasks.sum_columns if streamed else tasks.sum_gram)
    (shallow.save_column_sums if streamed else shallow.save_sums)(bench, *sums)
    fit = minibatch.fit_minibatch if streamed else logistic.fit_logistic
    found = fit(bench, Alone() if streamed else logistic.Alone())
    model = shallow.load_weights(bench.url("linear/weights.zarr"))

    x, labels, index = rows_of(bench, "train", "features", "hidden")
    rows, repeated = x.reshape(-1, x.shape[2]), np.repeat(labels, 2)
    columns, _, _ = standardised(rows)
    best = LogisticRegression(C=NUM_CLASSES / (penalty * len(rows)), tol=1e-10, max_iter=10_000).fit(columns, repeated)
    least = logistic_objective(columns, repeated, best.coef_, best.intercept_, penalty)
    reached = logistic_objective(rows, repeated, model.weight.numpy(), model.bias.numpy(), penalty)
    assert reached == pytest.approx(least, rel=1e-3 if streamed else 1e-5)
    assert (found["num_rows"], found["num_columns"]) == rows.shape

    held = shallow.held_out(index, bench.config.seed, 0.3)
    fitted = LogisticRegression(C=NUM_CLASSES / (penalty * 2 * (~held).sum()), tol=1e-10, max_iter=10_000)
    inner = x[~held].reshape(-1, x.shape[2])
    columns, mean, scale = standardised(inner)
    fitted.fit(columns, np.repeat(labels[~held], 2))
    scores = fitted.decision_function(((x[held] - mean) / scale).reshape(-1, x.shape[2])).reshape(-1, 2, NUM_CLASSES)
    accuracy = float((scores.mean(1).argmax(1) == labels[held]).mean())
    assert found["validation"] == pytest.approx(accuracy, abs=1.5 / held.sum() if streamed else 1e-12)


def test_one_view_stacked_is_the_same_model_as_averaged(tmp_path):
    models = []
    for mode in ("average", "stack"):
        (tmp_path / mode).mkdir()
        bench = stacked(tmp_path / mode, views=1, view_mode=mode)
        fit, validation = summed(bench, tasks.sum_gram)
        shallow.fit_ridge(bench, fit, validation, penalty=0.3, rank=None, damping=None, temperature=1.0)
        models.append(shallow.load_weights(bench.url("linear/weights.zarr")))
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(models[0].bias, models[1].bias)


def test_features_of_sampled_labels_are_stacked_too(tmp_path):
    bench = small_bench(tmp_path, linear=STACK, scores={"labels": "sampled"})
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    store = open_features(bench.url("features/train.zarr"))
    assert store.layout("features").dims == ("sample", "view", "rank")
    assert store.layout("features").shape == (70, 2, bench.metric.rank)
    blocks = list(shallow.linear_rows(bench, store, "all"))
    assert blocks[0]["x"].shape == (70, 2, planning.num_columns(bench.config, bench.facts, bench.metric.rank))


def test_a_plan_counts_the_bytes_of_every_view(tmp_path):
    one, two = (
        planning.describe_run(bench.config, bench.facts)
        for bench in (small_bench(tmp_path, linear={**STACK, "view_mode": mode}) for mode in ("average", "stack"))
    )
    rest = (72 + 48) * (4 * 3 + 8 + 8)  # logits, labels and index are the sample's, not the view's
    assert two["feature_bytes"] - rest == 2 * (one["feature_bytes"] - rest)
    assert two["worker_memory_bytes"]["features"] == 2 * one["worker_memory_bytes"]["features"]
    wide = {"model": "logistic", "solver": "minibatch"}
    bench = small_bench(tmp_path, linear=wide)
    assert planning.describe_run(bench.config, bench.facts)["worker_memory_bytes"]["linear"] > 0
