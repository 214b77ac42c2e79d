from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, ModelError, RequestError, StoreError, WorkersLostError
from fisher_ray.linear import ColumnSums, StandardColumns, loss_and_gradient
from fisher_ray.stages import Workbench, logistic, minibatch, planning, shallow
from fisher_ray.stages.exchange import Alone
from fisher_ray.stages.minibatch import FILE, fit_minibatch
from tests.reference.linear import logistic_objective, standardised
from tests.stages.feature_runs import make_run
from tests.stages.test_gradnet import Ranks
from tests.stages.test_logistic import Threads, oracle
from tests.store.conftest import snapshot

QUICK = {"solver": "minibatch", "epochs": 3, "batch_size": 32, "checkpoint_steps": 4}


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch):
    monkeypatch.setattr(logistic, "LEAF_ROWS", 50)
    monkeypatch.setattr(planning, "STREAMED_ROWS", 48)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker; more wait for each other on batches so small
    yield
    torch.set_num_threads(threads)


def streamed(folder, **options):
    """A run that has the columns' sums in place of their Gram matrix."""
    run = make_run(folder, **{**QUICK, **options})
    shallow.remove_sums(run.bench.storage)
    sums = {}
    for part in ("fit", "validation"):
        sums[part] = ColumnSums.zeros(run.x.shape[1])
        for block in shallow.linear_rows(run.bench, run.bench.train_store, part):
            weights = run.bench.class_weights
            sums[part].add(block["x"], None if weights is None else weights[block["labels"]])
    shallow.save_column_sums(run.bench, *(item.to_arrays() for item in sums.values()))
    return run


def fit_on_threads(bench, size, last=None):
    """Fit on ``size`` ranks, cut off before exchange number ``last``; every one of them has to end."""
    shared = Threads(size)
    ranks = [Ranks(shared, rank) for rank in range(size)]
    for rank in ranks:
        rank.last = last
    with ThreadPoolExecutor(size) as pool:
        fits = [pool.submit(fit_minibatch, bench, rank) for rank in ranks]
    assert [item.result(0) for item in fits[1:] if last is None] == [None] * (size - 1 if last is None else 0)
    return fits[0].result(0)


def weights_of(run):
    return snapshot(str(run.bench.url("linear/weights.zarr")))


@pytest.mark.parametrize("size", [1, 3])
def test_it_reaches_the_full_batch_optimum(tmp_path, size):
    run = streamed(tmp_path, epochs=30, lr=0.05)
    found = fit_on_threads(run.bench, size)
    model = shallow.load_weights(run.bench.url("linear/weights.zarr"))
    best, (columns, _, _) = oracle(run.x, run.labels, found["penalty"]), standardised(run.x)
    reached = logistic_objective(run.x, run.labels, model.weight.numpy(), model.bias.numpy(), found["penalty"])
    least = logistic_objective(columns, run.labels, best.coef_, best.intercept_, found["penalty"])
    assert least <= reached * (1 + 1e-9)
    assert reached == pytest.approx(least, rel=1e-3)
    assert found["loss"] == pytest.approx(least, rel=2e-2)
    assert (found["num_rows"], found["num_columns"]) == run.x.shape
    assert model.penalty == found["penalty"]


def test_the_penalty_is_the_best_on_validation_rows_of_fits_to_the_others(tmp_path):
    run = streamed(tmp_path, validation=0.3, penalties=[3.0, 0.03, 300.0], epochs=30, lr=0.05)
    found = fit_minibatch(run.bench, Alone())
    _, mean, scale = standardised(run.x[~run.held])
    accuracies = [
        oracle(run.x[~run.held], run.labels[~run.held], penalty).score(
            (run.x[run.held] - mean) / scale, run.labels[run.held]
        )
        for penalty in run.config.linear.penalties
    ]
    assert [item["penalty"] for item in found["path"]] == list(run.config.linear.penalties)
    assert [item["accuracy"] for item in found["path"]] == pytest.approx(accuracies, abs=0.5 / run.held.sum())
    assert len(set(accuracies)) > 1
    assert found["penalty"] == run.config.linear.penalties[int(np.argmax(accuracies))]
    assert found["validation"] == max(accuracies)


def test_weighed_classes_are_as_rows_repeated(tmp_path):
    options = {"epochs": 30, "lr": 0.05, "penalties": [0.1]}
    run = streamed(tmp_path, class_weights={0: 3.0}, **options)
    fit_minibatch(run.bench, Alone())
    model = shallow.load_weights(run.bench.url("linear/weights.zarr"))
    times = np.where(run.labels == 0, 3, 1)
    x, labels = np.repeat(run.x, times, axis=0), np.repeat(run.labels, times)
    best, (columns, _, _) = oracle(x, labels, 0.1), standardised(x)
    reached = logistic_objective(x, labels, model.weight.numpy(), model.bias.numpy(), 0.1)
    assert reached == pytest.approx(logistic_objective(columns, labels, best.coef_, best.intercept_, 0.1), rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("last", [2, 7, 30, 62, 89, 110])
def test_a_fit_cut_off_anywhere_resumes_to_the_same_bits(tmp_path, size, last):
    undisturbed = streamed(tmp_path / "a", penalties=[0.3, 0.03, 0.1])
    expected = fit_on_threads(undisturbed.bench, size)
    run = streamed(tmp_path / "b", penalties=[0.3, 0.03, 0.1])
    with pytest.raises(WorkersLostError):
        fit_on_threads(run.bench, size, last)
    assert not (tmp_path / "b/linear/weights.zarr").exists()
    assert (tmp_path / "b" / FILE).exists() == (last > 5)
    assert fit_on_threads(run.bench, size) == expected
    assert weights_of(run) == weights_of(undisturbed)


def test_a_resumed_fit_takes_no_step_again(tmp_path):
    run = streamed(tmp_path, penalties=[0.1], checkpoint_steps=4)
    whole = Ranks(Threads(1), 0)
    fit_minibatch(run.bench, whole)
    shutil.rmtree(tmp_path / "linear/weights.zarr")
    minibatch.remove_checkpoint(run.bench.storage)
    with pytest.raises(WorkersLostError):
        fit_on_threads(run.bench, 1, 16)  # the start, 15 steps: 3 beyond the third checkpoint, within an epoch
    again = Ranks(Threads(1), 0)
    fit_minibatch(run.bench, again)
    assert again.gathered == whole.gathered - 12
    done = Ranks(Threads(1), 0)
    fit_minibatch(run.bench, done)
    assert done.gathered == 2  # the start and the choice


def test_another_fits_checkpoint_is_not_taken_up(tmp_path):
    run = streamed(tmp_path, penalties=[0.1])
    fit_on_threads(run.bench, 2)
    faster = run.config.linear.model_copy(update={"lr": 0.1})
    other = replace(run, config=run.config.model_copy(update={"linear": faster}))
    for bench in (run.bench, other.bench):
        rank = Ranks(Threads(1), 0)
        fit_minibatch(bench, rank)
        assert rank.gathered > 2 * 3 * 300 // 32


def test_the_gradients_of_an_epochs_batches_add_up_to_the_objectives(tmp_path):
    run = streamed(tmp_path, skipped=(0, 70))
    columns = _columns(run)
    params = torch.randn(columns.start().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, labels = torch.from_numpy(run.x), torch.from_numpy(run.labels)
    free = params.clone().requires_grad_(True)
    inner = (x - columns.mean) * columns.inverse @ free[:, :-1].mT + free[:, -1]
    loss = torch.nn.functional.cross_entropy(inner, labels) + 0.1 / 3 / 2 * (free[:, :-1] ** 2).sum()
    (expected,) = torch.autograd.grad(loss, free)
    total = torch.zeros_like(params)
    for unit in plan_units(len(x), 37):
        rows = slice(unit.start, unit.stop)
        _, by_weight, by_bias = loss_and_gradient(x[rows], labels[rows], *columns.raw(params))
        summed = torch.cat([by_weight, by_bias[:, None]], 1)
        total += columns.gradient(params, summed, len(unit), 37) * 37 / len(x)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


def _columns(run):
    sums = ColumnSums.zeros(run.x.shape[1])
    sums.add(torch.from_numpy(run.x))
    return StandardColumns.of(sums, 0.1, 3)


def test_raw_weights_are_put_back_into_standardised_columns(tmp_path):
    columns = _columns(streamed(tmp_path))
    params = torch.randn(columns.start().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params[:, :-1] *= columns.inverse > 0
    torch.testing.assert_close(columns.params(*columns.raw(params)), params, rtol=1e-9, atol=1e-9)
    with pytest.raises(RequestError, match="penalty -1"):
        StandardColumns.of(ColumnSums.zeros(2), -1, 3)


def test_columns_are_standardised_by_their_sums(tmp_path):
    run = streamed(tmp_path)
    _, mean, scale = standardised(run.x)
    columns = _columns(run)
    np.testing.assert_allclose(columns.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(columns.inverse.numpy(), 1 / scale, rtol=1e-9)
    with pytest.raises(DataError, match="on no rows"):
        ColumnSums.zeros(2).standardise()


def test_sums_of_other_rows_are_refused(tmp_path):
    run = streamed(tmp_path)
    shutil.rmtree(tmp_path / "linear/sums-fit.zarr")
    shutil.copytree(tmp_path / "linear/sums-all.zarr", tmp_path / "linear/sums-fit.zarr")
    with pytest.raises(DataError, match=rf"part 'fit' has {(~run.held).sum()} rows, its sums have 300"):
        fit_on_threads(run.bench, 2)


def test_a_diverging_fit_says_so(tmp_path):
    run = streamed(tmp_path, lr=1e200)
    with pytest.raises(ModelError, match=r"diverged.*linear\.lr"):
        fit_on_threads(run.bench, 2)


@pytest.mark.parametrize("failing", [0, 1])
def test_the_error_of_any_rank_is_rank_0s_and_all_ranks_end(tmp_path, failing):
    run = streamed(tmp_path)
    benches = [Workbench(run.config, run.facts) for _ in range(2)]

    class Broken(Workbench):
        @property
        def class_weights(self):
            raise StoreError("chunk 3 is damaged")

    benches[failing] = Broken(run.config, run.facts)
    shared = Threads(2)
    with ThreadPoolExecutor(2) as pool:
        fits = [pool.submit(fit_minibatch, benches[rank], Ranks(shared, rank)) for rank in range(2)]
    assert fits[1].result(0) is None
    with pytest.raises(StoreError, match="chunk 3 is damaged"):
        fits[0].result(0)


def test_no_rows_to_choose_by_is_an_error(tmp_path):
    run = streamed(tmp_path, num_rows=40, validation=1e-6)
    with pytest.raises(DataError, match=r"raise linear\.validation"):
        fit_on_threads(run.bench, 2)
