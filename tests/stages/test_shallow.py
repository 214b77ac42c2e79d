"""Rows of the feature store, the penalty, the fit and the evaluation, against NumPy on the whole arrays."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_ray.errors import DataError, StoreError
from fisher_ray.linear import LinearWeights
from fisher_ray.stages import planning, shallow, tasks
from fisher_ray.stages.shallow import hidden_rows, linear_rows, score_rows, store_rows
from fisher_ray.store import load_arrays, open_features
from tests.reference.linear import standardised
from tests.stages.feature_runs import HIDDEN, make_run
from tests.stages.small_runs import NUM_CLASSES, ROWS, fit_metric, merged, small_bench, write_features

SKIPPED = (3, *range(128, 144), 299)
NUM_COLUMNS = 12


def joined(blocks, name="x"):
    parts = [block[name] for block in blocks]
    return torch.cat(parts).numpy()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    make_run(folder, skipped=SKIPPED)
    return open_features(f"{folder}/features/train.zarr")


@settings(max_examples=25)
@given(st.integers(0, 2**40), st.floats(0.01, 0.99), st.lists(st.integers(1, 299), max_size=3, unique=True))
def test_fitting_and_validation_rows_are_disjoint_and_together_all_rows(store, seed, validation, cuts):
    spans = [range(*span) for span in zip([0, *sorted(cuts)], [*sorted(cuts), 300], strict=True)]
    options = {"seed": seed, "validation": validation, "use_hidden": True}
    parts = {
        part: [block for span in spans for block in store_rows(store, part, span, **options)]
        for part in ("fit", "validation", "all")
    }
    index = {part: [int(row) for block in blocks for row in block["index"]] for part, blocks in parts.items()}

    assert index["all"] == [row for row in range(300) if row not in SKIPPED]
    assert sorted(index["fit"] + index["validation"]) == index["all"]
    assert abs(len(index["validation"]) - validation * len(index["all"])) < 6 * np.sqrt(0.25 * 300)
    x = dict(zip(index["all"], joined(parts["all"]), strict=True))
    for part in ("fit", "validation"):
        for block in parts[part]:
            for row, values in zip(block["index"].tolist(), block["x"].numpy(), strict=True):
                assert np.array_equal(values, x[row])


@pytest.mark.parametrize("block_rows", [1, 30, 64, 10**6])
def test_rows_do_not_depend_on_blocks_and_chunks(tmp_path, block_rows, monkeypatch):
    monkeypatch.setattr(shallow, "BLOCK_ROWS", block_rows)
    found = []
    for chunk_rows in (16, 50):
        run = make_run(tmp_path / str(chunk_rows), chunk_rows=chunk_rows, skipped=SKIPPED)
        blocks = list(linear_rows(run.bench, run.bench.train_store, "fit"))
        assert all(len(block["x"]) >= min(block_rows, 200) for block in blocks[:-1])
        found.append({name: joined(blocks, name) for name in ("x", "labels", "index", "logits", "hidden")})
        assert np.array_equal(found[-1]["x"], run.x[~run.held])
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_columns_are_the_features_then_the_hidden_layer(store):
    def width(**options):
        return next(store_rows(store, "all", seed=0, validation=0.1, **options))["x"].shape[1]

    assert width(use_hidden=True) == NUM_COLUMNS + HIDDEN
    assert width(use_hidden=False) == NUM_COLUMNS
    assert width(use_hidden=True, use_features=False) == HIDDEN


def test_the_features_are_not_read_where_the_hidden_layer_alone_is_wanted(tmp_path):
    run = make_run(tmp_path)
    for chunk in (tmp_path / "features/train.zarr/features/c").iterdir():
        for path in chunk.rglob("*"):
            if path.is_file():
                path.write_bytes(b"broken")

    hidden = joined(hidden_rows(run.bench, run.bench.train_store, "all"))
    assert np.array_equal(hidden, run.x[:, NUM_COLUMNS:].astype(np.float32))
    with pytest.raises(StoreError, match="features/c/"):
        next(linear_rows(run.bench, run.bench.train_store, "all"))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run up to its linear model, its stored arrays, and what the stages returned."""
    penalties = [1e-4, 1e-2, 0.3, 30.0, 1e4]
    folder = tmp_path_factory.mktemp("run")
    bench = small_bench(
        folder, linear={"penalties": penalties, "validation": 0.3, "views": 2}, bad=(7, 41), data={"on_error": "skip"}
    )
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    write_features(bench, "test", "test")
    columns = planning.num_columns(bench.config, bench.facts, bench.metric.rank)
    units = planning.linear_units(bench.config, bench.facts, columns, "fit")
    sums = {
        part: merged([tasks.sum_gram(bench, unit, 1, part=part)[1] for unit in units])
        for part in ("fit", "validation", "all")
    }
    chosen = shallow.choose_penalty(bench, sums["fit"])
    kept = {name: chosen[name] for name in ("penalty", "rank", "damping", "temperature")}
    copied = {name: value.copy() for name, value in sums["fit"].items()}
    result = shallow.fit_ridge(bench, copied, sums["validation"], **kept)
    probe = shallow.fit_probe(bench)
    evaluation = shallow.evaluate(bench)
    return SimpleNamespace(
        bench=bench,
        columns=columns,
        sums=sums,
        chosen=chosen,
        result=result,
        probe=probe,
        evaluation=evaluation,
        parts={part: list(linear_rows(bench, bench.train_store, part)) for part in sums},
        tests=list(linear_rows(bench, open_features(bench.url("features/test.zarr")), "all")),
    )


def ridge(x, labels, penalty):
    """A function from rows to scores: ridge regression on standardised columns and centred one-hot labels."""
    columns, mean, scale = standardised(x)
    onehot = np.eye(NUM_CLASSES)[labels]
    gram = columns.T @ columns + penalty * len(x) * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, columns.T @ (onehot - onehot.mean(0)))
    return lambda rows: (rows - mean) / scale @ weight + onehot.mean(0)


def test_gram_sums_are_those_of_the_rows(fitted):
    """Float32 products about each block's mean."""
    for part, blocks in fitted.parts.items():
        x, labels = joined(blocks).astype(np.float64), joined(blocks, "labels")
        upper = np.triu_indices(x.shape[1])
        expected = (x.T @ x)[upper]
        np.testing.assert_allclose(
            fitted.sums[part]["gram"][upper], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )
        cross = np.eye(NUM_CLASSES)[labels].T @ x
        np.testing.assert_allclose(fitted.sums[part]["cross"], cross, rtol=0, atol=1e-5 * np.abs(cross).max())
        assert fitted.sums[part]["counts"].tolist() == np.bincount(labels, minlength=NUM_CLASSES).tolist()
    assert sum(fitted.sums["all"]["counts"]) == 68
    assert fitted.result == {"num_rows": 68, "num_columns": fitted.columns}


def test_the_penalty_is_the_best_on_the_validation_rows(fitted):
    fit, validation = fitted.parts["fit"], fitted.parts["validation"]
    expected = []
    for entry in fitted.chosen["path"]:
        scores = ridge(joined(fit), joined(fit, "labels"), entry["penalty"])(joined(validation))
        expected.append(float((scores.argmax(1) == joined(validation, "labels")).mean()))

    assert [entry["accuracy"] for entry in fitted.chosen["path"]] == pytest.approx(expected)
    assert [entry["penalty"] for entry in fitted.chosen["path"]] == list(fitted.bench.config.linear.penalties)
    best = max(range(len(expected)), key=lambda place: (expected[place], fitted.chosen["path"][place]["penalty"]))
    assert len(set(expected)) > 1
    assert fitted.chosen["penalty"] == fitted.chosen["path"][best]["penalty"]
    assert fitted.chosen["validation"] == pytest.approx(expected[best])


def test_rank_and_damping_are_chosen_on_the_validation_rows_from_the_same_sums(tmp_path):
    linear = {"penalties": [0.01, 1.0], "validation": 0.3, "ranks": [2, 5], "dampings": [None, 3.0]}
    bench = small_bench(tmp_path, linear=linear)
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    eigvals, rank = bench.metric.eigvals.numpy(), bench.metric.rank
    columns = NUM_CLASSES * rank + int(bench.facts.hidden)
    unit = planning.linear_units(bench.config, bench.facts, columns, "fit")[0]
    fit, validation = (tasks.sum_gram(bench, unit, 1, part=part)[1] for part in ("fit", "validation"))
    chosen = shallow.choose_penalty(bench, fit)
    blocks = {part: list(linear_rows(bench, bench.train_store, part)) for part in ("fit", "validation", "all")}

    def scale(entry):
        """What standardised columns are multiplied by, 0 for those left out."""
        damped = 1.0 if entry["damping"] is None else np.sqrt(eigvals / (eigvals + entry["damping"] * eigvals.mean()))
        each = np.where(np.arange(rank) < entry["rank"], damped, 0.0)
        return np.concatenate([np.tile(each, NUM_CLASSES), np.ones(bench.facts.hidden)])

    def fitted(entry, part):
        x, labels = joined(blocks[part]), joined(blocks[part], "labels")
        columns, mean, deviation = standardised(x)
        onehot, scaled = np.eye(NUM_CLASSES)[labels], columns * scale(entry)
        gram = scaled.T @ scaled + entry["penalty"] * len(x) * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, scaled.T @ (onehot - onehot.mean(0)))
        return lambda rows: (rows - mean) / deviation * scale(entry) @ weight + onehot.mean(0)

    found = []
    for entry in chosen["path"]:
        scores = fitted(entry, "fit")(joined(blocks["validation"]))
        found.append(float((scores.argmax(1) == joined(blocks["validation"], "labels")).mean()))
    assert [entry["accuracy"] for entry in chosen["path"]] == pytest.approx(found)
    assert {(entry["rank"], entry["damping"]) for entry in chosen["path"]} == {(2, None), (2, 3.0), (5, None), (5, 3.0)}
    assert len(set(found)) > 1
    assert chosen["validation"] == max(found)

    kept = {name: chosen[name] for name in ("penalty", "rank", "damping", "temperature")}
    shallow.fit_ridge(bench, fit, validation, **kept)
    x = joined(blocks["all"])
    scores = shallow.load_weights(bench.url("linear/weights.zarr")).scores(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(scores, fitted(chosen, "all")(x), rtol=0, atol=1e-3)


def test_the_model_is_fitted_on_all_rows(fitted):
    weights = shallow.load_weights(fitted.bench.url("linear/weights.zarr"))
    everything, x = fitted.parts["all"], joined(fitted.tests)

    assert (weights.penalty, weights.temperature) == (fitted.chosen["penalty"], fitted.chosen["temperature"])
    scores = weights.scores(torch.from_numpy(x)).numpy()
    expected = ridge(joined(everything), joined(everything, "labels"), weights.penalty)(x)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-3)


def test_the_probe_is_ridge_on_the_hidden_layer_alone(fitted):
    everything, hidden = fitted.parts["all"], joined(fitted.tests, "hidden")
    weights = shallow.load_weights(fitted.bench.url("linear/probe-ridge.zarr"))

    assert weights.penalty == fitted.probe["ridge"]["penalty"]
    expected = ridge(joined(everything, "hidden"), joined(everything, "labels"), weights.penalty)(hidden)
    np.testing.assert_allclose(weights.scores(torch.from_numpy(hidden)).numpy(), expected, rtol=0, atol=1e-4)


def test_the_probes_penalty_is_the_best_on_the_validation_rows_for_each_kind(fitted):
    fit, validation = fitted.parts["fit"], fitted.parts["validation"]
    found = []
    for penalty in fitted.bench.config.linear.penalties:
        scores = ridge(joined(fit, "hidden"), joined(fit, "labels"), penalty)(joined(validation, "hidden"))
        found.append((float((scores.argmax(1) == joined(validation, "labels")).mean()), penalty))

    accuracy, penalty = max(found)
    assert fitted.probe["ridge"] == {"penalty": penalty, "validation": pytest.approx(accuracy)}
    assert set(fitted.probe) == {"ridge", "logistic"}
    logistic = shallow.load_weights(fitted.bench.url("linear/probe-logistic.zarr"))
    assert logistic.penalty == fitted.probe["logistic"]["penalty"]


def test_evaluation_counts_what_each_model_gets_right(fitted):
    labels, total = joined(fitted.tests, "labels"), ROWS["test"][1] - ROWS["test"][0]
    models = {
        "fisher_linear": ("x", "weights"),
        "linear_probe_ridge": ("hidden", "probe-ridge"),
        "linear_probe_logistic": ("hidden", "probe-logistic"),
    }
    scores = {"base": joined(fitted.tests, "logits")}
    for name, (columns, file) in models.items():
        weights = shallow.load_weights(fitted.bench.url(f"linear/{file}.zarr"))
        scores[name] = joined(fitted.tests, columns) @ weights.weight.numpy().T + weights.bias.numpy()

    assert (fitted.evaluation["total"], fitted.evaluation["num_classes"]) == (total, NUM_CLASSES)
    assert fitted.evaluation["correct"] == {
        name: int((value.argmax(1) == labels).sum()) for name, value in scores.items()
    }
    stored, attributes = load_arrays(fitted.bench.url("linear/predictions.zarr"))
    assert attributes["scores"] == ["base", *models]
    assert stored["index"].tolist() == list(range(total))
    for name, value in scores.items():
        np.testing.assert_allclose(stored[name], value, rtol=1e-4, atol=1e-5)


def test_without_a_last_hidden_layer_the_features_are_all_columns_and_no_probe_is_evaluated(tmp_path):
    bench = small_bench(tmp_path, model={"factory": "tests.stages.small_runs:convolution", "kwargs": {}})
    assert bench.facts.hidden is None
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    write_features(bench, "test", "test")

    columns = planning.num_columns(bench.config, bench.facts, bench.metric.rank)
    assert columns == NUM_CLASSES * bench.metric.rank
    unit = planning.linear_units(bench.config, bench.facts, columns, "fit")[0]
    fit, validation = (tasks.sum_gram(bench, unit, 1, part=part)[1] for part in ("fit", "validation"))
    assert fit["gram"].shape == (columns, columns)
    shallow.fit_ridge(bench, fit, validation, penalty=1.0, rank=None, damping=None, temperature=1.0)
    assert set(shallow.evaluate(bench)["correct"]) == {"base", "fisher_linear"}


def test_no_rows_to_score_is_an_error():
    with pytest.raises(DataError, match=r"no rows were left to score"):
        score_rows([], "x", [LinearWeights(torch.zeros(2, 3), torch.zeros(2), 1.0)])


def test_sums_that_were_kept_for_the_logistic_fit_can_be_removed(tmp_path):
    run = make_run(tmp_path)
    kept, attributes = load_arrays(run.bench.url("linear/sums-all.zarr"))
    assert attributes["kind"] == "sums"
    assert kept["counts"].sum() == 300

    shallow.remove_sums(run.bench.storage)
    assert run.bench.storage.list("linear") == []
    shallow.remove_sums(run.bench.storage)
