"""One unit's work against the formulas, and its sums against those of the whole."""

import math
from functools import partial, reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fisher_ray
from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, RequestError
from fisher_ray.gradients import Compressor, ScoreEngine
from fisher_ray.metric import FisherSum, LowRankMetric
from fisher_ray.models import mlp
from fisher_ray.records import Batch
from fisher_ray.stages import Workbench, tasks
from fisher_ray.stages.passes import STORED_RMS, feature_arrays, fisher_pass, kronecker_pass
from fisher_ray.stages.shallow import linear_rows
from fisher_ray.store import load_arrays, open_features, save_arrays
from tests.gradients import networks
from tests.metric.fitting import settings as metric_settings
from tests.metric.fitting import sides, whole_bases
from tests.reference import metric as reference
from tests.stages.small_runs import fit_metric, merged, shallow_rows, small_bench, write_features

NUM_ROWS = 12


@pytest.fixture(scope="module")
def whole():
    """A convolution and a linear layer in float64, inputs, and the oracle's sums over all of them."""
    model, inputs = networks.make("oblong kernel", NUM_ROWS)
    return model, inputs, reference.factor_sums(model, inputs), reference.fisher(model, inputs)


def cut(inputs: torch.Tensor, cuts: list[int]) -> list[Batch]:
    spans = zip([0, *cuts], [*cuts, len(inputs)], strict=True)
    index = torch.arange(len(inputs))
    return [Batch(inputs[a:b], torch.zeros(b - a, dtype=torch.int64), index[a:b]) for a, b in spans]


@settings(max_examples=15)
@given(st.lists(st.integers(1, NUM_ROWS - 1), max_size=4, unique=True), st.integers(0, 4))
def test_sums_over_any_units_merge_to_the_sums_over_all_rows(whole, cuts, num_first):
    model, rows, factors, expected = whole
    engine, parts = ScoreEngine(model), cut(rows, sorted(cuts))
    units = [part for part in (parts[:num_first], parts[num_first:]) if part]

    kronecker = merged([kronecker_pass(engine, engine.block_shapes, unit, "all", 0) for unit in units])
    for name, (inputs, outputs, positions) in factors.items():
        np.testing.assert_allclose(kronecker[f"{name}:inputs"], inputs, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(kronecker[f"{name}:outputs"], outputs, rtol=1e-10, atol=1e-12)
        assert kronecker[f"{name}:positions"] == positions
    bases = whole_bases(model)
    compressor, dims = Compressor(bases, engine.blocks, rows), {name: basis.dim for name, basis in bases.items()}
    new = partial(FisherSum, metric_settings(4), dims, 0)
    fisher = reduce(new().merge, [fisher_pass(engine, compressor, new(), unit, "all", 0) for unit in units])
    np.testing.assert_allclose(sum(sides(fisher, compressor.dim)), expected, rtol=1e-10, atol=1e-12)
    assert fisher["counts"].sum() == NUM_ROWS


def test_the_tasks_sums_do_not_depend_on_the_units_that_rows_are_in(tmp_path):
    """Float32 products of the same micro-batches, added in float64 in another order: 1e-12 of the largest entry."""
    bench = small_bench(tmp_path)
    tasks.choose_basis(bench, merged([tasks.sum_kronecker(bench, unit, 1)[1] for unit in plan_units(70, 16)]))

    for task in (tasks.sum_kronecker, tasks.sum_fisher):
        merge = partial(tasks.merge_fisher, bench) if task is tasks.sum_fisher else lambda a, b: merged([a, b])
        sums = [reduce(merge, [task(bench, unit, 1)[1] for unit in plan_units(70, rows)]) for rows in (16, 24, 72)]
        for name, value in sums[0].items():
            for other in sums[1:] if name != "norms" else ():  # which are of a unit's first rows
                np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-12 * np.abs(value).max())


def test_a_units_sums_are_the_same_bits_each_time(tmp_path):
    bench = small_bench(tmp_path)
    unit = plan_units(70, 16)[1]

    (receipt, one), (_, other) = (tasks.sum_kronecker(bench, unit, attempt) for attempt in (3, 4))
    assert (receipt.unit, receipt.attempt, receipt.skipped) == (unit, 3, {})
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("compression", [{"kind": "identity"}, {"kind": "kronecker", "dim": 83}])
def test_stored_features_are_the_whitened_scores(compression, tmp_path):
    """Float32 features against float64 formulas, all coordinates kept; the kernel needs no choice of eigenvectors."""
    bench = small_bench(tmp_path, compression=compression, metric={"rank": 83})
    found = fit_metric(bench)
    write_features(bench, "train", "shallow")

    inputs, labels = shallow_rows(bench)
    model = mlp((12, 5, 3)).double()
    model.load_state_dict(bench.model.state_dict())
    scores = reference.scores(model, inputs.double())
    fisher = torch.einsum("bcp,bcq->pq", scores, scores) / 70
    damping = 0.1 * float(fisher.trace()) / (83 if compression["kind"] == "identity" else bench.metric.dim)
    (part,) = found["parts"]
    assert part["damping"] == pytest.approx(damping, rel=1e-4)
    assert found["trace"] == pytest.approx(float(fisher.trace()), rel=1e-4)
    assert found["num_samples"] == 70
    rows = scores.flatten(0, 1).numpy()
    expected = reference.damped_kernel(rows, rows, fisher.numpy(), damping)
    store = open_features(bench.url("features/train.zarr"))
    phi = store.read("features", 0, 70).astype(np.float64).reshape(len(rows), -1)
    np.testing.assert_allclose(phi @ phi.T, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert (phi**2).mean() * 3 == pytest.approx(found["feature_rms"] ** 2, rel=1e-3)

    assert np.array_equal(store.read("labels", 0, 70), labels)
    assert np.array_equal(store.read("index", 0, 70), np.arange(70))
    hidden = model.relu0(model.fc0(inputs.double().flatten(1)))
    np.testing.assert_allclose(store.read("hidden", 0, 70), hidden.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(store.read("logits", 0, 70), model(inputs.double()).detach(), rtol=1e-4, atol=1e-5)


def test_a_metric_knows_what_it_was_fitted_with(tmp_path):
    bench = small_bench(tmp_path, scores={"parameters": "fc1.*"})
    found = fit_metric(bench)

    metric = LowRankMetric.load(bench.url("metric.zarr"))
    asked = {"estimator": "exact", "structure": "global", "draws": 1, "centered": False, "metric_labels": "all"}
    expected = {"fingerprints": {}, "labels": "all", "parameters": "fc1.*", "precision": "float32", **asked}
    assert metric.attributes == expected
    assert list(metric.bases) == ["fc1"]
    assert (found["rank"], found["parts"][0]["eigvals"]) == (metric.rank, metric.eigvals.tolist())
    assert found["fingerprint"] == fit_metric(bench)["fingerprint"]
    arrays, attributes = load_arrays(bench.url("basis.zarr"))
    arrays["basis-0-inputs"][0] *= -1
    save_arrays(bench.url("basis.zarr"), arrays, attributes)
    sums = tasks.sum_fisher(bench, plan_units(70, 70)[0], 1)[1]
    fresh = partial(Workbench, bench.config, bench.facts)
    again = [tasks.fit_metric(fresh(), sums, fingerprints={})["fingerprint"]]
    arrays["basis-0-inputs"][0] *= -1
    save_arrays(bench.url("basis.zarr"), arrays, attributes)
    again.append(tasks.fit_metric(fresh(), sums, fingerprints={})["fingerprint"])
    assert again[0] != again[1]  # the same numbers in another basis


def test_a_runs_network_is_run_in_the_precision_that_was_asked_for(tmp_path):
    bench = small_bench(tmp_path, scores={"precision": "bfloat16"})
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    store, (inputs, _) = open_features(bench.url("features/train.zarr")), shallow_rows(bench)

    assert bench.metric.attributes["precision"] == "bfloat16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([bench.model(part) for part in torch.split(inputs, bench.facts.micro_batch)])
    np.testing.assert_array_equal(store.read("logits", 0, 70), logits.float())
    phi = torch.from_numpy(store.read("features", 0, 70))
    engine = ScoreEngine(bench.model)
    plain = Compressor(bench.metric.bases, engine.blocks, inputs).compress(engine.all_classes(inputs))
    expected = bench.metric.transform(plain)
    assert 1e-4 < float((phi - expected).norm() / expected.norm()) < 3e-2


def test_a_linear_model_on_features_of_true_labels_is_refused(tmp_path):
    bench = small_bench(tmp_path, scores={"labels": "true"})
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    store = open_features(bench.url("features/train.zarr"))

    with pytest.raises(RequestError, match="features of true labels"):
        fisher_ray.train_linear(store)


@pytest.mark.parametrize("labels", ["true", "sampled", "uniform"])
def test_one_label_a_sample_gives_one_score_a_sample(labels, tmp_path):
    bench = small_bench(tmp_path, scores={"labels": labels}, compression={"kind": "identity"}, metric={"rank": 83})
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    rank = bench.metric.rank

    inputs, true = shallow_rows(bench)
    store = open_features(bench.url("features/train.zarr"))
    phi = store.read("features", 0, 70)
    assert phi.shape == (70, rank)
    assert store.arrays["features"].dims == ("sample", "rank")
    if labels == "true":
        weight = bench.metric.whitening.numpy()
        model = mlp((12, 5, 3)).double()
        model.load_state_dict(bench.model.state_dict())
        scores = (
            reference.scores(model, inputs.double()) / model(inputs.double()).softmax(1).sqrt()[:, :, None].detach()
        )
        own = scores[torch.arange(70), true].numpy()
        np.testing.assert_allclose(phi, own @ weight, rtol=0, atol=1e-4 * np.abs(phi).max())


def test_views_average_a_picture_with_its_mirror_image(tmp_path):
    bench = small_bench(tmp_path, linear={"views": 2})
    fit_metric(bench)
    write_features(bench, "train", "shallow")

    inputs, _ = shallow_rows(bench)
    expected = []
    for part in (inputs, inputs.flip(-1)):
        scores = bench.engine.all_classes(part)
        expected.append(bench.metric.transform(bench.compressor.compress(scores)))
    store = open_features(bench.url("features/train.zarr"))
    mean = ((expected[0] + expected[1]) / 2).numpy()
    np.testing.assert_allclose(store.read("features", 0, 70), mean, rtol=0, atol=1e-5 * np.abs(mean).max())
    logits = (bench.model(inputs) + bench.model(inputs.flip(-1))).detach() / 2
    np.testing.assert_allclose(store.read("logits", 0, 70), logits, rtol=1e-5, atol=1e-6)


BAD = (0, 21, *range(32, 48), 69)
"""Of units of 16 rows: one row of the first and the last, one of the second, and the third whole."""


@pytest.mark.parametrize("value", [math.nan, 3e38], ids=["NaN in the data", "an overflow in the network"])
def test_rows_that_are_skipped_are_left_out_of_everything(value, tmp_path):
    bench = small_bench(tmp_path, bad=BAD, value=value, data={"on_error": "skip"}, store={"dtype": "float16"})
    found = fit_metric(bench)
    units = write_features(bench, "train", "shallow")
    good = [row for row in range(70) if row not in BAD]

    inputs, labels = shallow_rows(bench)
    part = [Batch(inputs[good], labels[good], torch.tensor(good))]
    kronecker = kronecker_pass(bench.engine, bench.facts.block_shapes, part, "all", 0)
    fisher = fisher_pass(bench.engine, bench.compressor, bench.new_fisher_sum(), part, "all", 0)
    for task, expected in ((tasks.sum_kronecker, kronecker), (tasks.sum_fisher, fisher)):
        merge = partial(tasks.merge_fisher, bench) if task is tasks.sum_fisher else lambda a, b: merged([a, b])
        sums = reduce(merge, [task(bench, unit, 1)[1] for unit in units])
        assert set(sums) == set(expected)
        for name, value in expected.items():
            if name == "norms":  # which are of a unit's first rows
                continue
            np.testing.assert_allclose(sums[name], value, rtol=0, atol=1e-5 * np.abs(value).max())
    assert found["num_samples"] == len(good)
    store = open_features(bench.url("features/train.zarr"))
    assert set(store.skipped) == set(BAD)
    assert all("NaN" in reason and f"row {row})" in reason for row, reason in store.skipped.items())
    blocks = list(linear_rows(bench, store, "all"))
    assert torch.cat([block["index"] for block in blocks]).tolist() == good
    assert torch.cat([block["labels"] for block in blocks]).tolist() == labels[good].tolist()
    assert all(bool(value.isfinite().all()) for block in blocks for value in block.values())


@pytest.mark.parametrize("views", [1, 2])
def test_a_row_that_overflows_in_the_network_stops_the_run_and_is_named(views, tmp_path):
    bench = small_bench(tmp_path, bad=(21,), value=3e38, linear={"views": views})
    named = r"\(data\.shallow row 21\): the network makes NaN or infinity of it.*on_error: skip"
    unit = plan_units(70, 16)[1]
    with pytest.raises(DataError, match=named) as caught:
        tasks.sum_kronecker(bench, unit, 1)
    assert caught.value.row == 21
    fit_metric(small_bench(tmp_path, linear={"views": views}))
    with pytest.raises(DataError, match=named):
        write_features(small_bench(tmp_path, bad=(21,), value=3e38, linear={"views": views}), "train", "shallow")


def test_a_layer_that_the_logits_do_not_depend_on_gets_no_coordinate(tmp_path):
    bench = small_bench(tmp_path, model={"factory": "tests.stages.small_runs:LeftOut", "kwargs": {}})
    found = fit_metric(bench)

    assert list(bench.facts.block_shapes) == ["unused", "fc"]
    assert list(bench.metric.bases) == ["fc"]
    sums = tasks.sum_kronecker(bench, plan_units(70, 70)[0], 1)[1]
    (layer,) = tasks.choose_basis(bench, sums)["layers"]
    assert layer == {"name": "fc", "shape": [3, 13], "coordinates": 2 * 13}  # a score's factors sum to 0 over classes
    assert all(math.isfinite(value) and value > 0 for value in found["parts"][0]["eigvals"])


def test_a_units_receipt_names_the_rows_that_it_left_out(tmp_path):
    bench = small_bench(tmp_path, bad=BAD, data={"on_error": "skip"})
    for unit in plan_units(70, 16):
        receipt, _ = tasks.sum_kronecker(bench, unit, 1)
        assert set(receipt.skipped) == {row for row in BAD if unit.start <= row < unit.stop}


def test_units_whose_rows_are_all_skipped_say_so(tmp_path):
    bench = small_bench(tmp_path, bad=tuple(range(16, 70)), data={"on_error": "skip"})
    moments = merged([tasks.sum_kronecker(bench, unit, 1)[1] for unit in plan_units(70, 16)[1:]])
    with pytest.raises(DataError, match="no rows: all were skipped"):
        tasks.choose_basis(bench, moments)


@given(st.floats(1e-6, 1), st.one_of(st.none(), st.integers(2, 1000)))
def test_features_in_half_precision_are_scaled_to_the_middle_of_its_range(feature_rms, num_scores):
    arrays = feature_arrays(7, num_scores, 5, None, "float16", feature_rms)

    scale = arrays["features"].scale
    assert scale == 2.0 ** round(math.log2(scale))
    stored = feature_rms / math.sqrt(num_scores or 1) / scale
    assert STORED_RMS / 1.5 <= stored <= STORED_RMS * 1.5
    assert set(arrays) == {"features", "labels", "logits", "index"}
    assert feature_arrays(7, num_scores, 5, 3, "float32", feature_rms)["features"].scale == 1.0
