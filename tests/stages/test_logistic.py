from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fisher_ray.errors import DataError, StoreError, WorkersLostError
from fisher_ray.linear import preconditioner
from fisher_ray.stages import logistic, shallow
from fisher_ray.stages.logistic import Alone, fit_logistic, leaf_units
from tests.linear.test_sums import rows, summed
from tests.reference.linear import logistic_objective, standardised
from tests.stages.feature_runs import make_run
from tests.store.conftest import snapshot

TIGHT = 1e-7
"""A gradient that the loss in float64 still tells from zero."""


class Threads:
    """The exchange of ranks that are threads of this process."""

    def __init__(self, size):
        self.size, self.barrier, self.table = size, threading.Barrier(size, timeout=60), [None] * size

    def of(self, rank):
        return ThreadRank(self, rank)


class ThreadRank:
    def __init__(self, ranks, rank):
        self._ranks, self.rank, self.size = ranks, rank, ranks.size

    def share(self, order):
        assert (order is None) == bool(self.rank)
        return self._all(order)[0]

    def collect(self, reply):
        replies = self._all(reply)
        failed = [item for item in replies if isinstance(item, Exception)]
        return failed[0] if failed else replies if self.rank == 0 else []

    def _all(self, value):
        try:
            self._ranks.barrier.wait()
            self._ranks.table[self.rank] = value
            self._ranks.barrier.wait()
            return list(self._ranks.table)
        except threading.BrokenBarrierError:
            raise WorkersLostError("a thread is gone") from None


def fit_on_threads(run, size, **options):
    """Fit on ``size`` ranks; every one of them has to end, whatever happens."""
    ranks = Threads(size)
    with ThreadPoolExecutor(size) as pool:
        fits = [pool.submit(fit_logistic, run.bench, ranks.of(rank), **options) for rank in range(size)]
    assert [fit.result(0) for fit in fits[1:]] == [None] * (size - 1)
    return fits[0].result(0)


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch):
    monkeypatch.setattr(logistic, "LEAF_ROWS", 50)  # 64 rows with chunks of 16: five leaves of 300 rows


def oracle(x, labels, penalty):
    columns, _, _ = standardised(x)
    num_classes = len(np.unique(labels))
    fitted = LogisticRegression(C=num_classes / (penalty * len(x)), tol=1e-12, max_iter=100_000)
    return fitted.fit(columns, labels)


def test_the_fit_is_scikit_learns_optimum_on_all_rows_with_the_penalty_it_chose(tmp_path):
    run = make_run(tmp_path)
    found = fit_logistic(run.bench, Alone(), tolerance=TIGHT)
    model = shallow.load_weights(run.bench.url("linear/weights.zarr"))
    best = oracle(run.x, run.labels, found["penalty"])
    columns, mean, scale = standardised(run.x)
    expected = best.coef_ / scale
    np.testing.assert_allclose(model.weight.numpy(), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    bias = best.intercept_ - expected @ mean
    np.testing.assert_allclose(model.bias.numpy() - model.bias.numpy().mean(), bias - bias.mean(), rtol=1e-4, atol=1e-5)
    reached = logistic_objective(run.x, run.labels, model.weight.numpy(), model.bias.numpy(), found["penalty"])
    least = logistic_objective(columns, run.labels, best.coef_, best.intercept_, found["penalty"])
    assert reached == pytest.approx(least, rel=1e-9)
    assert model.penalty == found["penalty"]
    assert model.temperature == found["temperature"]


def test_the_penalty_is_the_best_on_validation_rows_of_fits_to_the_others(tmp_path):
    run = make_run(tmp_path, validation=0.3, penalties=[3.0, 0.03, 300.0])
    found = fit_logistic(run.bench, Alone(), tolerance=TIGHT)
    fit, held = ~run.held, run.held
    assert 60 < held.sum() < 120
    _, mean, scale = standardised(run.x[fit])
    accuracies = [
        oracle(run.x[fit], run.labels[fit], penalty).score((run.x[held] - mean) / scale, run.labels[held])
        for penalty in run.config.linear.penalties
    ]
    assert [item["penalty"] for item in found["path"]] == list(run.config.linear.penalties)
    assert [item["accuracy"] for item in found["path"]] == pytest.approx(accuracies, abs=1e-12)
    assert len(set(accuracies)) > 1
    assert found["validation"] == max(accuracies)
    assert found["penalty"] == run.config.linear.penalties[int(np.argmax(accuracies))]
    assert all(item["converged"] for item in found["path"])
    assert found["converged"]
    assert (found["num_rows"], found["num_columns"]) == run.x.shape


def test_of_equally_good_penalties_the_largest_is_taken(tmp_path):
    run = make_run(tmp_path, penalties=[0.01, 0.0101, 0.0100001])
    found = fit_logistic(run.bench, Alone(), tolerance=TIGHT)
    assert len({item["accuracy"] for item in found["path"]}) == 1
    assert found["penalty"] == 0.0101


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_any_number_of_ranks_gives_the_same_bits(tmp_path, dtype):
    run = make_run(tmp_path, dtype=dtype)
    assert len(leaf_units(run.config, run.facts)) == 5
    results, files = [], []
    for size in (1, 2, 3, 7):
        results.append(fit_on_threads(run, size))
        files.append(snapshot(str(tmp_path / "linear/weights.zarr")))
        shutil.rmtree(tmp_path / "linear/weights.zarr")
    assert results == results[:1] * 4
    assert files == files[:1] * 4
    assert "weight/c/0/0" in files[0]


def test_rows_that_were_skipped_have_no_say(tmp_path):
    run = make_run(tmp_path / "a", skipped=(0, 70, 71, 299))
    found = fit_logistic(run.bench, Alone(), tolerance=TIGHT)
    assert found["num_rows"] == 296
    model = shallow.load_weights(run.bench.url("linear/weights.zarr"))
    best = oracle(run.x, run.labels, found["penalty"])
    expected = best.coef_ / standardised(run.x)[2]
    np.testing.assert_allclose(model.weight.numpy(), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_a_fit_that_runs_out_of_steps_says_so(tmp_path):
    run = make_run(tmp_path, max_steps=1)
    found = fit_logistic(run.bench, Alone(), tolerance=TIGHT)
    assert [(item["steps"], item["converged"]) for item in found["path"]] == [(1, False)] * 3
    assert (found["steps"], found["converged"]) == (1, False)


def test_a_fit_starts_where_the_one_with_a_larger_penalty_ended(tmp_path):
    near = make_run(tmp_path / "near", penalties=[0.1, 0.0999999])
    steps = [item["steps"] for item in fit_logistic(near.bench, Alone())["path"]]
    assert steps[0] > 3
    assert steps[1] == 0


def test_the_start_of_a_fit_is_the_model_that_it_is_given():
    x, labels = rows(80, 6, dtype=torch.float64)
    x[:, 2] = 7.0
    coordinates = preconditioner(summed(x * 3 + 1, labels), 0.2)
    params = torch.randn(coordinates.start().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, bias = coordinates.raw(params)
    again = coordinates.raw(logistic._params(coordinates, (weight, bias)))
    torch.testing.assert_close(again[0], weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again[1], bias, rtol=1e-12, atol=1e-12)
    assert not weight[:, 2].any()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_error_of_any_rank_is_rank_0s_and_all_ranks_end(tmp_path, failing):
    run = make_run(tmp_path)
    chunk = tmp_path / f"features/train.zarr/features/c/{4 * failing}/0/0"
    raw = bytearray(chunk.read_bytes())
    raw[5] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(StoreError, match=f"features/c/{4 * failing}/0/0"):
        fit_on_threads(run, 3)


def test_a_failure_that_is_not_ours_names_the_rows_and_all_ranks_end(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    real = shallow.linear_rows

    def broken(bench, store, part, rows=None):
        if rows is not None and rows.start == 128 and part == "validation":
            raise ZeroDivisionError("by nought")
        return real(bench, store, part, rows)

    monkeypatch.setattr(shallow, "linear_rows", broken)
    with pytest.raises(RuntimeError, match=r"rows \[128, 192\): ZeroDivisionError: by nought"):
        fit_on_threads(run, 2)


def test_rank_0_alone_failing_lets_the_others_go(tmp_path):
    run = make_run(tmp_path)
    shutil.rmtree(tmp_path / "linear/sums-all.zarr")
    with pytest.raises(StoreError, match=r"sums-all\.zarr"):
        fit_on_threads(run, 3)
    assert not (tmp_path / "linear/weights.zarr").exists()


def test_a_broken_exchange_is_not_used_again(tmp_path):
    class Broken(Alone):
        shared = 0

        def share(self, order):
            self.shared += 1
            return super().share(order)

        def collect(self, reply):
            raise WorkersLostError("gone")

    exchange = Broken()
    with pytest.raises(WorkersLostError, match="gone"):
        fit_logistic(make_run(tmp_path).bench, exchange)
    assert exchange.shared == 1


def test_sums_of_other_rows_are_refused(tmp_path):
    run = make_run(tmp_path)
    shutil.rmtree(tmp_path / "linear/sums-fit.zarr")
    shutil.copytree(tmp_path / "linear/sums-all.zarr", tmp_path / "linear/sums-fit.zarr")
    with pytest.raises(DataError, match=rf"part 'fit' has {(~run.held).sum()} rows, its sums have 300"):
        fit_logistic(run.bench, Alone())


def test_no_rows_to_choose_by_is_an_error(tmp_path):
    run = make_run(tmp_path, num_rows=40, validation=1e-6)
    assert not run.held.any()
    with pytest.raises(DataError, match=r"raise linear\.validation"):
        fit_logistic(run.bench, Alone())


def test_leaves_are_whole_chunks_whatever_the_chunks_size(tmp_path):
    run = make_run(tmp_path)
    for chunk_rows, expected in [(16, 64), (50, 50), (60, 60), (64, 64)]:
        store = run.config.store.model_copy(update={"chunk_rows": chunk_rows})
        units = leaf_units(run.config.model_copy(update={"store": store}), run.facts)
        assert [len(unit) for unit in units[:-1]] == [expected] * (len(units) - 1)
        assert (units[0].start, units[-1].stop) == (0, 300)
