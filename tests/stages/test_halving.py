"""Micro-batches that do not fit into memory, against smaller ones that do."""

import logging
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fisher_ray
from fisher_ray.data import plan_units
from fisher_ray.errors import MemoryExhaustedError
from fisher_ray.gradients import Compressor, ScoreEngine, is_out_of_memory
from fisher_ray.metric import FisherSum, LowRankMetric, Part, choose_bases
from fisher_ray.records import Batch
from fisher_ray.stages import tasks
from fisher_ray.stages.halving import Halvings
from fisher_ray.stages.passes import batch_features, feature_spec, fisher_pass, kronecker_pass
from fisher_ray.store import create_store, open_features
from tests.metric.fitting import settings
from tests.stages.small_runs import fit_metric, small_bench, write_features

ROWS = 16


def on_a_gpu():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def on_the_cpu():
    return RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: …")


ERRORS = pytest.mark.parametrize("error", [on_a_gpu, on_the_cpu])


class Limited(nn.Module):
    """A network that has memory for so many samples."""

    def __init__(self, most, error=on_a_gpu):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.most, self.error, self.sizes = most, error, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error()
        return self.last(torch.tanh(self.first(x)))


def network(most, error=on_a_gpu):
    torch.manual_seed(0)
    return Limited(most, error)


def batches(size, num_rows=ROWS):
    inputs = torch.randn(num_rows, 5, generator=torch.Generator().manual_seed(1))
    index = torch.arange(100, 100 + num_rows)
    parts = (part.split(size) for part in (inputs, torch.arange(num_rows) % 3, index))
    return [Batch(*columns) for columns in zip(*parts, strict=True)]


def compressor_of(engine):
    bases = choose_bases(kronecker_pass(engine, engine.block_shapes, batches(4), "all", 0), engine.block_shapes, 20)
    return Compressor(bases, engine.blocks, engine.like), bases


def new_sum(compressor):
    dims = {name: place.stop - place.start for name, place in compressor.places.items()}
    return FisherSum(settings(20), dims, 0)


@ERRORS
@pytest.mark.parametrize("labels", ["all", "sampled"])
def test_sums_are_those_of_smaller_batches(error, labels):
    """Bit by bit: the parts are the same, and are added in the same order."""
    limited, free, halvings = ScoreEngine(network(5, error)), ScoreEngine(network(ROWS)), Halvings()
    made = kronecker_pass(limited, limited.block_shapes, batches(ROWS), labels, 0, halvings=halvings)
    expected = kronecker_pass(free, free.block_shapes, batches(4), labels, 0)
    assert made.keys() == expected.keys()
    assert all(np.array_equal(made[name], value) for name, value in expected.items())
    assert halvings.count == 3  # 16 in two eights, and both of them in two

    compressor, _ = compressor_of(free)
    made = fisher_pass(limited, compressor, new_sum(compressor), batches(ROWS), labels, 0, halvings=halvings)
    expected = fisher_pass(free, compressor, new_sum(compressor), batches(4), labels, 0)
    assert all(np.array_equal(made[name], value) for name, value in expected.items())
    assert made["counts"].sum() == ROWS
    assert halvings.count == 6


@pytest.mark.parametrize("views", [1, 2])
def test_features_are_those_of_smaller_batches_in_the_order_of_the_rows(views):
    limited, free, halvings = ScoreEngine(network(3)), ScoreEngine(network(ROWS)), Halvings()
    compressor, bases = compressor_of(free)
    eigvecs = torch.eye(compressor.dim, dtype=torch.float64)
    part = Part("all", 0, compressor.dim, torch.ones(compressor.dim, dtype=torch.float64), eigvecs, 0.1)
    metric = LowRankMetric(bases, (part,), (), {})
    options = {"labels": "all", "seed": 0, "views": views}

    made = batch_features(limited, compressor, metric.transform, batches(7, 7)[0], **options, halvings=halvings)
    (whole,) = (batch_features(free, compressor, metric.transform, batch, **options) for batch in batches(7, 7))
    assert made.batch.index.tolist() == list(range(100, 107))
    for name in ("values", "logits", "hidden"):
        torch.testing.assert_close(getattr(made, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(made.batch.inputs, whole.batch.inputs)
    assert torch.equal(made.batch.labels, whole.batch.labels)
    assert halvings.count == 2  # 7 into 3 and 4, and the 4 in two


def test_a_compression_that_runs_out_of_memory_is_tried_on_halves_too(monkeypatch):
    engine = ScoreEngine(network(ROWS))
    compressor, _ = compressor_of(engine)
    expected, compress = fisher_pass(engine, compressor, new_sum(compressor), batches(8), "all", 0), compressor.compress

    def limited(scores):
        if len(scores.logits) > 8:
            raise on_a_gpu()
        return compress(scores)

    monkeypatch.setattr(compressor, "compress", limited)
    made = fisher_pass(engine, compressor, new_sum(compressor), batches(ROWS), "all", 0)
    assert all(np.array_equal(made[name], value) for name, value in expected.items())


def test_one_sample_that_does_not_fit_ends_with_what_to_do():
    halvings, model = Halvings(), network(3)
    engine = ScoreEngine(model)
    engine.all_classes(batches(2)[0].inputs)
    model.most = 0
    with pytest.raises(
        MemoryExhaustedError, match=r"row 100: .* one sample \(CUDA out of memory.*scores\.labels"
    ) as error:
        kronecker_pass(engine, engine.block_shapes, batches(4, 4), "all", 0, halvings=halvings)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert halvings.count == 2


def test_another_failure_is_not_tried_again():
    model = network(3, lambda: RuntimeError("the device is gone"))
    engine = ScoreEngine(model)
    engine.all_classes(batches(2)[0].inputs)
    model.sizes.clear()
    with pytest.raises(RuntimeError, match="the device is gone"):
        kronecker_pass(engine, engine.block_shapes, batches(8), "all", 0)
    assert model.sizes == [8]


def test_rows_that_are_left_out_are_left_out_of_halves():
    engine, dropped = ScoreEngine(network(5)), set()
    (batch,) = batches(ROWS)
    batch.inputs[[2, 11]] = torch.nan
    made = kronecker_pass(engine, engine.block_shapes, [batch], "all", 0, dropped.add)
    good = [row for row in range(ROWS) if row not in (2, 11)]
    kept = Batch(batch.inputs[good], batch.labels[good], batch.index[good])
    expected = kronecker_pass(ScoreEngine(network(ROWS)), engine.block_shapes, [kept], "all", 0)
    assert dropped == {102, 111}
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-5, atol=1e-6)


def test_each_cut_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "fisher_ray.stages.halving"):
        engine = ScoreEngine(network(4))
        kronecker_pass(engine, engine.block_shapes, batches(7, 7), "all", 0)
    assert [record.getMessage() for record in caplog.records] == [
        "rows 100 to 106: out of memory for 7 samples; tried as 3 and 4"
    ]


def test_nothing_of_a_failed_attempt_is_kept_while_its_halves_are_tried():
    alive, seen = [], []

    def make(batch):
        seen.append([reference() is not None for reference in alive])
        made = torch.zeros(len(batch.inputs))
        alive.append(weakref.ref(made))
        if len(made) > 2:
            raise on_a_gpu()
        return made

    Halvings().each(batches(4, 4)[0], make, lambda made: None)
    assert seen == [[], [False], [False, False]]


@ERRORS
def test_want_of_memory_is_not_taken_for_a_layer_that_cannot_be_vectorised(error):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.short = nn.Parameter(torch.randn(5)), False

        def forward(self, x):
            if self.short and torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise error()
            return x * self.scale

    model = nn.Sequential(Own(), nn.Linear(5, 3))
    engine, inputs = ScoreEngine(model), batches(2)[0].inputs
    engine.all_classes(inputs)
    model[0].short = True
    with pytest.raises(type(error()), match="memory"):
        engine.all_classes(inputs)


def test_torchs_own_error_for_want_of_memory_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_features_of_tensors_are_made_of_halves(tmp_path):
    model, inputs = network(ROWS), batches(ROWS)[0].inputs
    metric = fisher_ray.fit_metric(model, inputs, dim=16, damping=0.1)
    expected = fisher_ray.features(model, metric, inputs)
    model.most = 5
    torch.testing.assert_close(fisher_ray.features(model, metric, inputs), expected, rtol=1e-5, atol=1e-6)


def test_a_units_receipt_says_how_often_its_batches_were_cut(tmp_path):
    """Units of 16 rows, micro-batches of 8, memory for 5 samples."""
    bench = small_bench(tmp_path)
    fit_metric(bench)
    write_features(bench, "train", "shallow")
    expected = open_features(bench.url("features/train.zarr")).read("features", 0, 16)
    spec = feature_spec(bench.config, bench.facts, "shallow", bench.metric.rank, bench.metric.feature_rms, {})
    create_store(bench.url("features/again.zarr"), spec)

    def limit(module, args):
        if len(args[0]) > 5:
            raise on_a_gpu()

    bench.model.register_forward_pre_hook(limit)
    unit = plan_units(70, 16)[0]
    for task, options in (
        (tasks.sum_kronecker, {}),
        (tasks.sum_fisher, {}),
        (tasks.write_features, {"split": "shallow", "name": "features/again.zarr"}),
    ):
        receipt, _ = task(bench, unit, 2, **options)
        assert receipt.num_halvings == 2
    made = open_features(bench.url("features/again.zarr"), allow_partial=True).read("features", 0, 16)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
