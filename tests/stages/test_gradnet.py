from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from fisher_ray.errors import ConfigError, DataError, ModelError, RequestError, StoreError, WorkersLostError
from fisher_ray.gradients import PercentileEntries, ScoreEngine, keyed_uniform
from fisher_ray.linear import GradNet, densify, pieces, plan_shape
from fisher_ray.metric import Normalisation, RangeSum
from fisher_ray.records import Batch, Unit
from fisher_ray.stages import Workbench, inspect_request, planning
from fisher_ray.stages.exchange import Alone
from fisher_ray.stages.gradnet import training, units
from fisher_ray.stages.gradnet.checkpoint import FILE
from fisher_ray.stages.gradnet.entries import batch_outputs, entry_spec, label_entries, normalised, prediction_spec
from fisher_ray.stages.gradnet.network import load_network, num_kept
from fisher_ray.stages.gradnet.training import fit_gradnet
from fisher_ray.stages.shallow import held_out
from fisher_ray.store import create_store, open_features, seal
from tests.reference import gradnet as reference
from tests.stages.small_runs import NUM_CLASSES, ROWS, shallow_rows, small_bench, small_config
from tests.stages.test_logistic import ThreadRank, Threads
from tests.store.conftest import snapshot

SECTION = {"steps": 40, "lr": 0.5, "batch_size": 8, "validation": 0.2, "evaluate_steps": 15, "checkpoint_steps": 12}
SECTION |= {"widths": [4, 3], "buffer_rows": 24, "init_std": 0.2}


class Ranks(ThreadRank):
    """A rank that is a thread of this process, and may stop before its exchange number ``last``."""

    last = None
    gathered = 0

    def gather(self, value):
        if self.gathered == self.last:
            self._ranks.barrier.abort()
        self.gathered += 1
        return self._all(value.clone())


def fit(bench, size, last=None):
    """Train on ``size`` ranks; every one of them has to end, whatever happens."""
    shared = Threads(size)
    ranks = [Ranks(shared, rank) for rank in range(size)]
    for rank in ranks:
        rank.last = last
    with ThreadPoolExecutor(size) as pool:
        fits = [pool.submit(fit_gradnet, bench, rank) for rank in ranks]
    assert [item.result(0) for item in fits[1:] if last is None] == [None] * (size - 1 if last is None else 0)
    return fits[0].result(0)


def with_entries(folder, *, bad=(), **options):
    """A run that has its entries."""
    linear = options.pop("linear", {"model": "gradnet"})
    data = {"data": options.pop("data")} if "data" in options else {}
    bench = small_bench(folder, bad=bad, linear=linear, gradnet={**SECTION, **options}, **data)
    config, facts = bench.config, bench.facts
    rows = planning.split_units(config, facts, "shallow")
    sums = [units.sum_ranges(bench, unit, 1)[1] for unit in rows]
    ranges = sums[0]
    for part in sums[1:]:
        ranges = units.merge_ranges(bench, ranges, part)
    found = units.save_ranges(bench, ranges)
    attributes = {"fingerprints": {"ranges": found}}
    spec = entry_spec(config, facts.num_rows["shallow"], num_kept(config, facts), found["largest"], attributes)
    create_store(bench.url(units.ENTRIES), spec)
    for unit in reversed(rows):
        units.write_entries(bench, unit, 1)
    seal(bench.url(units.ENTRIES), len(rows))
    return bench


def uniform_labels(seed, index, draw=0):
    """The labels of a draw, from the generator's own numbers."""
    return (keyed_uniform(seed + (draw << 32), index) * NUM_CLASSES).long()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_WEIGHTS", 50)


class Net(nn.Sequential):
    """A small convolutional network in float64."""

    def __init__(self):
        layers = nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten()
        super().__init__(*layers, nn.Linear(12, NUM_CLASSES))


@pytest.mark.parametrize(("power", "draws", "views"), [(0.5, 1, 1), (0.5, 2, 2), (None, 1, 1)])
def test_the_protocol_is_the_papers_step_by_step(power, draws, views):
    torch.manual_seed(0)
    model = Net().double().eval()
    images, index = torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.arange(30, 39)
    batch = Batch(images, torch.zeros(9, dtype=torch.int64), index)
    engine = ScoreEngine(model, "*weight")
    kept = PercentileEntries(engine.blocks, 0.15, engine.like)

    values, coordinates = label_entries(engine, kept, batch, seed=5, draws=draws, views=views)
    sides = [images, images.flip(-1)][:views]
    labels = [uniform_labels(5, index, number).tolist() for number in range(draws * views)]
    rows = [
        [
            reference.kept(reference.gradient(model, sides[number // draws][sample], labels[number][sample]), 85)
            for number in range(draws * views)
        ]
        for sample in range(9)
    ]
    flat = [row for sample in rows for row in sample]
    expected = torch.stack([reference.dense(row, kept.dim) for row in flat]).view(9, -1, kept.dim)
    dense = densify(values.flatten(0, 1), coordinates.flatten(0, 1), kept.dim).view_as(expected)
    torch.testing.assert_close(dense, expected, rtol=1e-10, atol=1e-13)

    sums = RangeSum(kept.dim)
    sums.add_sparse(values[values != 0], coordinates[values != 0])
    normalisation = Normalisation.from_ranges(sums.to_arrays(), power)
    found = normalised(normalisation, values, coordinates)
    scaled = reference.normalise(flat, flat, kept.dim, power)
    expected = torch.stack([reference.dense(row, kept.dim) for row in scaled]).view_as(dense)
    dense = densify(found.flatten(0, 1), coordinates.flatten(0, 1), kept.dim).view_as(expected)
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-6)  # a root near zero

    sizes = [span.stop - span.start for span in kept.spans.values()]
    network = GradNet(plan_shape(sizes, "block", (3, 5, 4), NUM_CLASSES), 0.3, 0, torch.float64)
    blocks = [
        (range(*span), block.weight.detach(), block.bias.detach())
        for span, block in zip(network.shape.spans, network.blocks, strict=True)
    ]
    head = (network.head.weight.detach(), network.head.bias.detach())
    made = batch_outputs(engine, kept, normalisation, network, batch, views=views)
    for sample in range(3):
        total = torch.zeros(NUM_CLASSES, dtype=torch.float64)
        for side in sides:
            for label in range(NUM_CLASSES):
                row = reference.kept(reference.gradient(model, side[sample], label), 85)
                (row,) = reference.normalise([row], flat, kept.dim, power)
                total += reference.outputs(row, blocks, head)
        torch.testing.assert_close(made.scores[sample], total, rtol=1e-6, atol=1e-6)
        logits = torch.stack([model(side[sample][None])[0] for side in sides]).mean(0)
        torch.testing.assert_close(made.logits[sample], logits.detach(), rtol=1e-10, atol=1e-12)


def test_stored_entries_are_those_of_each_sample_whatever_the_units(tmp_path):
    bench = with_entries(tmp_path, draws=2, share=0.3)
    inputs, labels = shallow_rows(bench)
    store = open_features(bench.url(units.ENTRIES))
    assert store.layout("values").shape == (70, 2, num_kept(bench.config, bench.facts))
    assert store.layout("coordinates").dtype == "int32"
    values, coordinates = (torch.from_numpy(store.read(name, 0, 70)) for name in ("values", "coordinates"))
    np.testing.assert_array_equal(store.read("labels", 0, 70), labels.numpy())
    index = torch.arange(70)
    layers = [
        [
            reference.gradient(bench.model, inputs[row], int(uniform_labels(bench.config.seed, index, draw)[row]))
            for draw in range(2)
        ]
        for row in range(70)
    ]
    rows = [reference.kept(layer, 70) for sample in layers for layer in sample]
    dim = bench.gradnet_entries.dim
    expected = torch.stack([reference.dense(row, dim) for row in reference.normalise(rows, rows, dim, 0.5)])
    dense = densify(values.flatten(0, 1), coordinates.flatten(0, 1), dim).double()
    # float32 gradients: an entry near its range's lower end loses digits, and the root makes more of it
    assert float((dense - expected).abs().quantile(0.99)) < 1e-4
    assert float((dense - expected).abs().mean()) < 1e-5


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_trains_the_same_bits(tmp_path, num_ranks):
    bench = with_entries(tmp_path, momentum=0.5, weight_decay=0.01, draws=2)
    results, files = [], []
    for size in (1, num_ranks):
        results.append(fit(bench, size))
        files.append(snapshot(str(tmp_path / "run/gradnet/weights.zarr")))
        shutil.rmtree(tmp_path / "run/gradnet")
    assert results[0] == results[1]
    assert files[0] == files[1]
    assert [item["step"] for item in results[0]["path"]] == [15, 30, 40]


def test_training_is_torchs_descent_on_the_stores_batches(tmp_path):
    bench = with_entries(tmp_path, validation=0.0, draws=2, steps=25, batch_size=16)
    result = fit_gradnet(bench, Alone())
    store, config = open_features(bench.url(units.ENTRIES)), bench.config
    shape = plan_shape([60, 15], "block", (4, 3), NUM_CLASSES)
    network = GradNet(shape, 0.2, config.seed)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    done = epoch = 0
    losses = []
    while done < 25:
        batches = store.iter_batches(
            16, ("values", "coordinates", "labels", "index"), shuffle=True, epoch=epoch, buffer_rows=24
        )
        for batch in batches:
            picked = (np.arange(len(batch["index"])), (batch["index"] + epoch) % 2)
            rows = densify(
                torch.from_numpy(batch["values"][picked]), torch.from_numpy(batch["coordinates"][picked]), 75
            )
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(network(rows), torch.from_numpy(batch["labels"]))
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            done += 1
            if done == 25:
                break
        epoch += 1
    assert result["path"][0]["loss"] == pytest.approx(np.mean(losses[:15]), rel=1e-5)
    found = load_network(bench.url("gradnet/weights.zarr")).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert (result["step"], result["stored_validation"], result["num_rows"]) == (25, None, 70)


@pytest.mark.parametrize(("last", "before", "after"), [(5, 1, 1), (23, 2, 2), (39, 2, 1)])
def test_a_training_cut_off_anywhere_resumes_to_the_same_bits(tmp_path, last, before, after):
    bench = with_entries(tmp_path, momentum=0.5, draws=2)
    whole = fit(bench, 1)
    files = snapshot(str(tmp_path / "run/gradnet/weights.zarr"))
    shutil.rmtree(tmp_path / "run/gradnet")
    with pytest.raises(WorkersLostError, match="a thread is gone"):
        fit(bench, before, last=last)
    assert (tmp_path / "run" / FILE).exists() == (last > 12)
    assert fit(bench, after) == whole
    assert snapshot(str(tmp_path / "run/gradnet/weights.zarr")) == files


def test_another_trainings_checkpoint_is_not_taken_up_and_a_longer_ones_is(tmp_path, monkeypatch):
    bench = with_entries(tmp_path, steps=24)
    fit_gradnet(bench, Alone())
    longer = Workbench(bench.config.model_copy(update={"gradnet": section(bench, steps=36)}), bench.facts)
    other = Workbench(bench.config.model_copy(update={"gradnet": section(bench, lr=0.1)}), bench.facts)
    began = []
    monkeypatch.setattr(training.PieceTrainer, "begin", _noting(began, training.PieceTrainer.begin))
    assert fit_gradnet(longer, Alone())["path"][-1]["step"] == 36
    assert not began
    fit_gradnet(other, Alone())
    assert len(began) == 1


def section(bench, **changes):
    return bench.config.gradnet.model_copy(update=changes)


def _noting(calls, act):
    def noted(*arguments):
        calls.append(arguments)
        return act(*arguments)

    return noted


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_meets_ends_all_of_them(tmp_path, rank, monkeypatch):
    bench = with_entries(tmp_path)
    made = training.PieceTrainer.products

    def products(trainer, rows):
        if trainer._mine == training.share_pieces(training.cut_pieces(trainer._shape), trainer._shape, 2)[rank]:
            raise StoreError("chunk 3 is damaged")
        return made(trainer, rows)

    monkeypatch.setattr(training.PieceTrainer, "products", products)
    with pytest.raises(StoreError, match="chunk 3 is damaged"):
        fit(bench, 2)


def test_weights_are_those_that_did_best_on_rows_that_were_not_trained_on(tmp_path):
    bench = with_entries(tmp_path, validation=0.3, draws=2)
    result = fit_gradnet(bench, Alone())
    held = held_out(np.arange(70), bench.config.seed, 0.3)
    assert result["num_rows"] == (~held).sum()
    assert 0 < held.sum() < 40
    store = open_features(bench.url(units.ENTRIES))
    values, coordinates = (torch.from_numpy(store.read(n, 0, 70)[held]) for n in ("values", "coordinates"))
    network = load_network(bench.url("gradnet/weights.zarr"))
    predicted = network.scores(values, coordinates).argmax(1).numpy()
    accuracy = (predicted == store.read("labels", 0, 70)[held]).mean()
    assert result["stored_validation"] == pytest.approx(accuracy, abs=1e-12)
    assert result["stored_validation"] == max(item["accuracy"] for item in result["path"])
    assert result["step"] == max(i["step"] for i in result["path"] if i["accuracy"] == result["stored_validation"])


def test_predictions_and_counts_are_those_of_the_trained_network(tmp_path):
    bench = with_entries(tmp_path, linear={"model": "gradnet", "views": 2})
    fit_gradnet(bench, Alone())
    create_store(bench.url(units.PREDICTIONS), prediction_spec(bench.config, bench.facts.num_rows["test"], 3, {}))
    tested = planning.split_units(bench.config, bench.facts, "test")
    for unit in tested:
        receipt, _ = units.predict(bench, unit, 1)
        assert receipt.num_bytes > 0
    seal(bench.url(units.PREDICTIONS), len(tested))
    counts = units.count_test(bench)
    with np.load(tmp_path / "pictures.npz") as arrays:
        inputs, labels = (torch.from_numpy(arrays[name]) for name in ("inputs", "labels"))
    made = outputs_of(bench, inputs[slice(*ROWS["test"])])
    assert counts["total"] == 42
    assert counts["correct"]["gradnet"] == int((made.scores.argmax(1) == labels[slice(*ROWS["test"])]).sum())
    assert counts["correct"]["base"] == int((made.logits.argmax(1) == labels[slice(*ROWS["test"])]).sum())

    found = [
        units.count_held_out(bench, unit, 1)[1] for unit in planning.split_units(bench.config, bench.facts, "shallow")
    ]
    shares = units.share_held_out(bench, {name: sum(part[name] for part in found) for name in found[0]})
    held = torch.from_numpy(held_out(np.arange(70), bench.config.seed, bench.config.gradnet.validation))
    made, labels = outputs_of(bench, inputs[slice(*ROWS["shallow"])][held]), labels[slice(*ROWS["shallow"])][held]
    assert shares["num_rows"] == int(held.sum())
    assert shares["gradnet"] == pytest.approx(float((made.scores.argmax(1) == labels).double().mean()))
    assert shares["base"] == pytest.approx(float((made.logits.argmax(1) == labels).double().mean()))


def outputs_of(bench, inputs):
    batch = Batch(inputs, torch.zeros(len(inputs), dtype=torch.int64), torch.arange(len(inputs)))
    tools = (bench.gradnet_engine, bench.gradnet_entries, bench.gradnet_normalisation, bench.gradnet)
    return batch_outputs(*tools, batch, views=bench.config.linear.views)


def test_samples_without_finite_gradients_are_left_out_or_named(tmp_path):
    bench = with_entries(tmp_path, bad=(3, 40), data={"on_error": "skip"})
    assert set(open_features(bench.url(units.ENTRIES)).skipped) == {3, 40}
    assert fit_gradnet(bench, Alone())["num_rows"] == 70 - len(
        {3, 40} | set(np.flatnonzero(held_out(np.arange(70), bench.config.seed, 0.2)).tolist())
    )
    (tmp_path / "stop").mkdir()
    stopped = small_bench(tmp_path / "stop", bad=(3,), linear={"model": "gradnet"}, gradnet=SECTION)
    with pytest.raises(DataError, match="row 3"):
        units.sum_ranges(stopped, Unit(0, 0, 16), 1)


@pytest.mark.parametrize(("normalise", "power"), [(False, None), (False, 0.5), (True, None)])
def test_normalisations_that_are_left_out_are_left_out(tmp_path, normalise, power):
    bench = with_entries(tmp_path, normalise=normalise, power=power)
    store = open_features(bench.url(units.ENTRIES))
    values, coordinates = (torch.from_numpy(store.read(name, 0, 16)) for name in ("values", "coordinates"))
    inputs, labels = shallow_rows(bench)
    batch = Batch(inputs[:16], labels[:16], torch.arange(16))
    raw, places = label_entries(bench.gradnet_engine, bench.gradnet_entries, batch, seed=0, draws=1, views=1)
    assert torch.equal(places, coordinates)
    if normalise:
        assert float(values.min()) >= 0
        assert float(values.max()) <= 1
    else:
        expected = raw if power is None else raw.abs().sqrt().copysign(raw)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-7)


def test_a_diverging_training_says_so(tmp_path):
    bench = with_entries(tmp_path, lr=1e30)
    with pytest.raises(ModelError, match=r"diverged: the loss is (nan|inf) at step \d+\. Lower gradnet\.lr"):
        fit(bench, 2)


def test_a_damaged_checkpoint_is_named(tmp_path):
    bench = with_entries(tmp_path, steps=12)
    fit_gradnet(bench, Alone())
    path = tmp_path / "run" / FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"checkpoint\.safetensors is damaged.*Remove it"):
        fit_gradnet(bench, Alone())


def test_wrong_requests_are_refused_before_any_work(tmp_path):
    small_bench(tmp_path)
    asked = {"linear": {"model": "gradnet"}}
    with pytest.raises(RequestError, match=r"gradnet\.widths gives 3 widths for 2 blocks of \[60, 15\]"):
        inspect_request(small_config(tmp_path, **asked, gradnet={"widths": [1, 2, 3]}))
    with pytest.raises(ModelError, match=r"gradnet\.parameters 'no such'"):
        inspect_request(small_config(tmp_path, **asked, gradnet={"parameters": "no such"}))
    with pytest.raises(ConfigError, match=r"gradnet\.share"):
        small_config(tmp_path, gradnet={"share": 0})
    facts = inspect_request(small_config(tmp_path, **asked))
    assert facts.gradnet_shapes == {"fc0": (5, 12), "fc1": (3, 5)}


def test_a_plan_counts_what_the_entries_take(tmp_path):
    bench = with_entries(tmp_path, draws=2, steps=1)
    planned = planning.describe_run(bench.config, bench.facts)
    assert set(planned) == {"output", "samples", "parameters", "gradnet"}
    found = planned["gradnet"]
    kept = num_kept(bench.config, bench.facts)
    assert (found["coordinates"], found["entries_kept"], found["widths"]) == (75, kept, [4, 3])
    assert found["parameters"] == fit_gradnet(bench, Alone())["num_parameters"]
    held = round(0.2 * 70)
    assert found["gradients"] == {"ranges": 140, "entries": 140, "prediction": 3 * (42 + held)}
    store = open_features(bench.url(units.ENTRIES))
    entries = sum(store.row_bytes(name) for name in ("values", "coordinates"))
    assert found["entry_bytes"] == 70 * entries
