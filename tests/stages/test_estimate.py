import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fisher_ray.errors import DataError, WorkersLostError
from fisher_ray.runtime import Session
from fisher_ray.stages import estimate, planning, rehearsal
from fisher_ray.stages.rehearsal import Asked, Found, Pace
from tests.stages.small_runs import NUM_CLASSES, small_bench, small_config

LOUD = """
import os
import torch

def change(x, generator):
    os.write(1, b"a word")
    os.system("echo another")
    return torch.from_numpy(x)
"""
STAGES = ["base", "basis", "metric", "features/train", "features/test", "linear", "linear_probe", "trained_on"]


class Raising(torch.nn.Module):
    """Raises while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(12, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise KeyError("no such mode")
        return self.fc(x.flatten(1))


def sleeping(array: np.ndarray, generator: torch.Generator | None) -> torch.Tensor:
    if "SLEEPING" in os.environ:
        Path(os.environ["SLEEPING"]).write_text(str(os.getpid()))
        time.sleep(600)
    return torch.from_numpy(array)


def dying(array: np.ndarray, generator: torch.Generator | None) -> torch.Tensor:
    if "DYING" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.from_numpy(array)


def test_two_units_give_what_a_unit_and_what_a_row_takes():
    pace = rehearsal._pace([1.5, 2.5], (10, 30))
    assert (pace.unit_s, pace.row_s) == (pytest.approx(1.0), pytest.approx(0.05))
    assert pace.seconds(100) == pytest.approx(6.0)
    assert rehearsal._pace([1.5, 1.5], (30, 30)) == Pace(0.0, 0.05)
    assert rehearsal._pace([2.0, 1.5], (10, 30)) == Pace(0.0, 0.05)  # noise
    assert rehearsal._pace([0.1, 1.5], (10, 30)) == Pace(0.0, 0.05)  # rows that cost more together


@pytest.mark.parametrize(("exponent", "used"), [(2.5, 2.5), (1.0, 2.0), (4.0, 3.0)])
def test_a_solution_is_extrapolated_by_a_power_law(exponent, used):
    found = rehearsal._extrapolated([1.0, 2.0**exponent], [1024, 2048], 8192)
    assert found == pytest.approx(2.0**exponent * 4**used)
    assert rehearsal._extrapolated([3.0], [700], 700) == 3.0


def shares(tmp_path, workers, paces, **sections):
    bench = small_bench(tmp_path, **sections)
    rehearsed = [Found({"basis": 1.0, "metric": 2.0}, dict.fromkeys(NAMES, pace)) for pace in paces]
    alone = Found({"linear": 5.0}, {"probe": Pace(0.0, 0.01), "forward": Pace(0.0, 0.5)})
    return bench, estimate._Shares(bench.config, bench.facts, workers, alone, rehearsed), alone


NAMES = ("basis", "metric", "features", "write", "read", "gram")


def test_units_are_shared_out_and_the_last_one_counts(tmp_path):
    _, found, _ = shares(tmp_path, 2, [Pace(1.0, 0.1)])
    assert found._passes("metric", [10, 10, 10]) == pytest.approx(4.0)  # two, then one
    assert found._passes("metric", [10, 10, 10, 10]) == pytest.approx(4.0)
    assert found._passes("metric", [10]) == pytest.approx(2.0)


def test_the_stages_are_made_up_of_passes_and_of_what_is_done_once(tmp_path):
    bench, found, alone = shares(tmp_path, 2, [Pace(1.0, 0.0), Pace(1.0, 0.0)], trained_on={"seconds": "auto"})
    stages = found.stages()
    # 70 rows of units of 16 are 5 units: 3 s for two workers; of the test rows, 42, there are 3 units
    assert (bench.facts.num_rows["shallow"], bench.facts.num_rows["test"]) == (70, 42)
    assert stages["basis"] == pytest.approx(3.0 + 1.0)
    assert stages["metric"] == pytest.approx(3.0 + 2.0)
    assert stages["features/train"] == pytest.approx(3.0 + 3.0)
    assert stages["features/test"] == pytest.approx(2.0 + 2.0)
    parts = [planning.linear_units(bench.config, bench.facts, 1, part) for part in ("fit", "validation")]
    assert [len(units) for units in parts] == [1, 1]
    assert stages["linear"] == pytest.approx(2 * (1.0 + 1.0) + 5.0)
    fits = len(bench.config.linear.penalties) + 1
    assert stages["linear_probe"] == pytest.approx(fits * estimate.PROBE_LOOKS * 0.7)
    on = estimate._trained_on(bench.config, bench.facts, stages, alone.paces)
    assert on["trained_on"] == pytest.approx(4.0 + 5.0 + 6.0 + stages["linear"] + 42 * 0.5)


def test_a_rehearsal_tells_every_stage_and_leaves_nothing_behind(tmp_path):
    bench = small_bench(tmp_path, runtime={"unit_rows": 16, "micro_batch": 8, "num_workers": 2}, trained_on={})
    before = sorted(path.name for path in tmp_path.rglob("*"))
    threads, state = torch.get_num_threads(), torch.get_rng_state()

    planned = estimate.estimate_run(bench.config, bench.facts, Session("local").worker_environment())

    found = planned["seconds"]
    assert 2**26 < planned["worker_peak_bytes"] < 2**31
    assert list(found) == [*STAGES, "total", "workers", "device", "not_estimated"]
    assert all(math.isfinite(found[name]) and found[name] >= 0 for name in (*STAGES, "total"))
    assert found["total"] == pytest.approx(sum(found[name] for name in STAGES), abs=0.5)
    assert found["workers"] == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("part", ["alone", "passes"])
def test_what_a_rehearsal_times_took_time(tmp_path, part):
    bench = small_bench(tmp_path)
    config = bench.config.model_copy(update={"output": str(tmp_path / "rehearsed")})

    found = rehearsal.rehearse(Asked(config, bench.facts, part, torch.get_num_threads(), "cpu"))

    names = {"alone": ["linear"], "passes": ["basis", "metric"]}
    assert sorted(found.once) == names[part]
    expected = {"alone": ["base", "forward", "probe"], "passes": sorted(NAMES)}
    assert sorted(found.paces) == expected[part]
    assert all(seconds > 0 for seconds in found.once.values())
    assert all(pace.row_s > 0 and pace.unit_s >= 0 for pace in found.paces.values())


def test_a_bad_row_is_told_as_a_run_would_tell_it(tmp_path):
    bench = small_bench(tmp_path, bad=(5,))

    with pytest.raises(DataError, match=r"data\.shallow row 5"):
        estimate.estimate_run(bench.config, bench.facts, {})


def transformed(folder, name):
    config, facts = small_config(folder), small_bench(folder).facts
    data = config.data.model_copy(update={"transform": f"tests.stages.test_estimate:{name}"})
    return config.model_copy(update={"data": data}), facts


def test_a_rehearsal_that_is_killed_is_told(tmp_path, monkeypatch):
    config, facts = transformed(tmp_path, "dying")
    monkeypatch.setenv("DYING", "1")

    with pytest.raises(WorkersLostError, match=r"ended with code -9"):
        estimate.estimate_run(config, facts, {})


def test_an_error_that_nobody_foresaw_keeps_its_traceback(tmp_path):
    bench = small_bench(tmp_path)
    model = bench.config.model.model_copy(update={"factory": "tests.stages.test_estimate:Raising", "kwargs": {}})

    with pytest.raises(RuntimeError, match="ended with code 1: KeyError: 'no such mode'") as caught:
        estimate.estimate_run(bench.config.model_copy(update={"model": model}), bench.facts, {})
    assert "in forward" in caught.value.__notes__[0]


def test_modules_beside_the_script_are_found_and_what_they_print_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/beside.py").write_text(LOUD)
    config, facts = transformed(tmp_path, "sleeping")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    config = config.model_copy(update={"data": config.data.model_copy(update={"transform": "beside:change"})})
    assert estimate.estimate_run(config, facts, {})["seconds"]["total"] > 0


def test_where_the_first_rows_are_left_out_others_are_tried(tmp_path):
    bad = tuple(range(20))
    bench = small_bench(tmp_path, bad=bad, data={"on_error": "skip"}, runtime={"unit_rows": 16, "micro_batch": 4})
    assert estimate.estimate_run(bench.config, bench.facts, {})["seconds"]["features/train"] > 0


def test_a_short_training_is_rehearsed_no_longer_than_it_is(tmp_path):
    bench = small_bench(tmp_path, base={"steps": 2, "batch_size": 4, "lr": 0.1})
    seen = rehearsal.Rehearsal(Asked(bench.config, bench.facts, "alone", 1, "cpu"))
    assert [seen._trained(steps).steps for steps in (1, 3, 18)] == [1, 2, 2]
    assert seen.bench.config.base.steps == 2


def test_what_cannot_be_known_before_a_run_is_named(tmp_path):
    bench = small_bench(tmp_path, linear={"model": "logistic"}, trained_on={"convergence": {}}, gradnet={})
    found = estimate.estimate_run(bench.config, bench.facts, {})["seconds"]
    assert found["not_estimated"] == ["linear", "gradnet", "trained_on", "converged"]
    assert not set(found["not_estimated"]) & set(found)


@pytest.mark.parametrize(
    ("num_gpus", "asked", "places"),
    [
        (8, "auto", list(range(8))),
        (1, 0.25, [0, 0, 0, 0]),
        (8, 2, [0, 2, 4, 6]),
        (2, 4, None),
        (4, 0, None),
        (0, "auto", None),
    ],
)
def test_workers_are_put_where_the_run_would_put_them(tmp_path, monkeypatch, num_gpus, asked, places):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    config = small_config(tmp_path, runtime={"gpus_per_worker": asked, "cpus_per_worker": 2})
    assert estimate.worker_places(config) == (places or [None] * 3)


def test_a_gpu_is_named_as_it_is_outside(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert [estimate._visible(0), estimate._visible(1)] == ["5", "GPU-7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert estimate._visible(3) == "3"


def test_the_memory_of_who_asks_does_not_count(tmp_path):
    bench = small_bench(tmp_path)
    asked = (bench.config, bench.facts, "passes", 1, [None], {})
    (before,) = estimate._rehearse(*asked)
    held = np.ones(2**27)  # 1 GiB
    (after,) = estimate._rehearse(*asked)
    assert held.all()
    assert 2**26 < after.peak_bytes < before.peak_bytes + 2**28


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_plan_leaves_no_process(tmp_path, number):
    config, facts = transformed(tmp_path, "sleeping")
    with open(tmp_path / "asked", "wb") as file:
        pickle.dump((config, facts), file)
    script = (
        "import pickle, sys; from fisher_ray.stages import estimate; from fisher_ray.cli.exits import error_exits\n"
        "import typer\n"
        "try:\n"
        "    with error_exits(): estimate.estimate_run(*pickle.load(open(sys.argv[1], 'rb')), {})\n"
        "except typer.Exit as error: sys.exit(error.exit_code)"
    )
    environment = {**os.environ, "SLEEPING": str(tmp_path / "pid"), "TMPDIR": str(tmp_path)}
    started = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "asked")], env=environment)
    child = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    started.send_signal(number)
    assert started.wait(timeout=30) == (-9 if number == signal.SIGKILL else 4)
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])
    if number != signal.SIGKILL:
        assert not list(tmp_path.glob("fisher-ray-plan-*"))


def until(found):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("nothing came")
