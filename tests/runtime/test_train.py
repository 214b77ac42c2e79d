from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist

from fisher_ray.errors import DataError, StoreError, WorkersLostError
from fisher_ray.runtime import Session, train
from fisher_ray.runtime.exchange import TorchExchange, choose_backend
from fisher_ray.runtime.train import fit_logistic
from fisher_ray.stages.logistic import Order, leaf_units
from tests.integration.processes import descendants, wait_for
from tests.stages.feature_runs import make_run
from tests.store.conftest import snapshot

STARTED = "Started training worker group"
"""What Ray Train's controller writes into its own log once the workers are at work."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where Ray Train may put temporary things; a home and a working folder that it has to leave alone."""
    for name in ("home", "work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def make_large_run(path, **options):
    """Three leaves of rows on the real grid of leaves; long enough a fit for something to happen in it."""
    return make_run(path, num_rows=10_000, rank=options.pop("rank", 8), chunk_rows=1024, dtype="float16", **options)


def make_long_run(path, **options):
    return make_large_run(path, rank=80, penalties=[10.0**-power for power in range(1, 6)], **options)


@contextmanager
def once_at_work(act, starts=1):
    """Call ``act`` when Ray Train has started workers ``starts`` times since, from a thread."""
    node = ray._private.worker._global_node
    logs, deadline, failures = Path(node.get_session_dir_path(), "logs/train"), time.monotonic() + 120, []
    before, done = set(logs.glob("ray-train-sys-controller*")), threading.Event()

    def count():
        return sum(path.read_text().count(STARTED) for path in set(logs.glob("ray-train-sys-controller*")) - before)

    def watch():
        while count() < starts and not done.is_set():
            if time.monotonic() > deadline:
                failures.append("the workers did not start")
                return
            time.sleep(0.05)
        if not done.is_set():
            act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not failures


def train_workers():
    """The processes that Ray Train's workers are in, all of them descendants of this one."""
    return [pid for pid in descendants(os.getpid()) if _title(pid).startswith("ray::RayTrainWorker")]


def _title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill_one():
    workers = train_workers()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_one_worker_and_two_fit_the_same_bits_and_leave_nothing_behind(folder, capfd):
    run, notes, results, files = make_large_run(folder / "run"), [], [], []
    assert len(leaf_units(run.config, run.facts)) == 3
    handler, environment = signal.getsignal(signal.SIGINT), dict(os.environ)
    for num_workers in (1, 2):
        results.append(fit_logistic(Session(), run.config, run.facts, num_workers, 0.0, notes.append))
        files.append(snapshot(str(folder / "run/linear/weights.zarr")))
        shutil.rmtree(folder / "run/linear/weights.zarr")
    assert results[0] == results[1]
    assert files[0] == files[1]
    assert results[0]["num_rows"] == 10_000
    assert results[0]["validation"] > 0.9
    assert not notes
    assert capfd.readouterr() == ("", "")
    assert not [*(folder / "home").iterdir(), *(folder / "work").iterdir(), *(folder / "temporary").iterdir()]
    assert signal.getsignal(signal.SIGINT) is handler
    assert dict(os.environ) == environment


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_workers_own_error_comes_back_as_it_is_and_is_not_tried_again(folder):
    run, notes = make_large_run(folder), []
    chunk = folder / "features/train.zarr/features/c/4/0/0"  # the second leaf's, which is rank 1's
    raw = bytearray(chunk.read_bytes())
    raw[5] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(StoreError, match="features/c/4/0/0"):
        fit_logistic(Session(), run.config, run.facts, 2, 0.0, notes.append)
    assert not notes


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_lost_worker_starts_the_fit_again_with_the_same_result(folder):
    run, notes = make_long_run(folder, runtime={"max_attempts": 2}), []
    with once_at_work(kill_one):
        result = fit_logistic(Session(), run.config, run.facts, 2, 0.0, notes.append)
    files = snapshot(str(folder / "linear/weights.zarr"))
    assert len(notes) == 1
    assert re.search(r"fit ended: Actor(Died|Unavailable)Error", notes[0])
    assert result == fit_logistic(Session(), run.config, run.facts, 1, 0.0, notes.append)
    assert files == snapshot(str(folder / "linear/weights.zarr"))
    assert len(notes) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_lost_too_often_stop_the_fit(folder):
    run, notes = make_long_run(folder, runtime={"max_attempts": 1}), []
    with (
        once_at_work(kill_one),
        pytest.raises(WorkersLostError, match=r"lost workers 1 times.*Actor(Died|Unavailable)Error"),
    ):
        fit_logistic(Session(), run.config, run.facts, 2, 0.0, notes.append)
    assert len(notes) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_failure_that_is_not_ours_is_tried_again_and_then_a_data_error(folder):
    run, notes = make_large_run(folder, runtime={"max_attempts": 2}), []
    facts = replace(run.facts, num_rows={"shallow": None})
    with pytest.raises(DataError, match=r"failed 2 times \(runtime.max_attempts\); the last time: TypeError"):
        fit_logistic(Session(), run.config, facts, 1, 0.0, notes.append)
    assert len(notes) == 2
    assert notes[0].startswith("an attempt at the logistic fit ended: TypeError: ")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_with_places_for_fewer_workers_the_fit_goes_on_with_those(folder, monkeypatch):
    monkeypatch.setattr(train, "START_TIMEOUT_S", 3.0)
    run, notes = make_large_run(folder), []
    assert fit_logistic(Session(), run.config, run.facts, 5, 0.0, notes.append)["num_rows"] == 10_000
    assert len(notes) == 1
    assert notes[0].endswith("tried with workers: 2")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_without_a_place_for_any_worker_the_fit_stops_after_wait_s(folder):
    run, notes = make_large_run(folder, runtime={"gpus_per_worker": 1, "wait_s": 2}), []
    with pytest.raises(WorkersLostError, match="each needs 1 GPU, the cluster has 2 CPU, 0 GPU"):
        fit_logistic(Session(), run.config, run.facts, 1, 1.0, notes.append)
    assert not notes


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_interrupt_is_a_keyboard_interrupt_and_ends_the_workers(folder):
    run, handler = make_long_run(folder), signal.getsignal(signal.SIGINT)
    with once_at_work(lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        fit_logistic(Session(), run.config, run.facts, 2, 0.0, lambda _: None)
    assert signal.getsignal(signal.SIGINT) is handler
    wait_for(lambda: not train_workers(), 60, "the workers' end")


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [([None], "gloo"), (["a"], "nccl"), (["a", "b"], "nccl"), (["a", "a"], "gloo"), (["a", None], "gloo")],
)
def test_nccl_carries_tensors_where_every_rank_has_a_gpu_of_its_own(gpus, backend):
    assert choose_backend(gpus) == backend


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "gloo"), pytest.param("cuda:0", "nccl", marks=pytest.mark.gpu)]
)
def test_orders_and_replies_pass_the_exchange_unchanged(tmp_path, device, backend):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        exchange = TorchExchange(torch.device(device))
        assert exchange.backend == backend
        order = Order("score", "fit", torch.randn(6, 5).double()[::2], torch.randn(3).double())
        found = exchange.share(order)
        assert (found.task, found.part) == ("score", "fit")
        assert torch.equal(found.weight, order.weight)
        assert torch.equal(found.bias, order.bias)
        for shape in [(3, 4), (0, 4), (0,)]:
            (reply,) = exchange.collect(torch.ones(shape, dtype=torch.float64))
            assert torch.equal(reply, torch.ones(shape, dtype=torch.float64))
        error = exchange.collect(DataError("no", 7))
        assert isinstance(error, DataError)
        assert error.row == 7
    finally:
        dist.destroy_process_group()
