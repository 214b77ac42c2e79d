import math
import os
import sys

import numpy as np
import pytest
import torch

from fisher_ray.errors import DataError, WorkersLostError
from fisher_ray.runtime import Session
from fisher_ray.stages import estimate, planning, rehearsal
from fisher_ray.stages.rehearsal import Asked, Found, Pace
from tests.stages.small_runs import small_bench, small_config, write_pictures

STAGES = ["base", "basis", "metric", "features/train", "features/test", "linear", "linear_probe", "trained_on"]


def dying(array: np.ndarray, generator: torch.Generator | None) -> torch.Tensor:
    if "dying" in os.environ:
        print("the end", file=sys.stderr)
        os._exit(7)
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
    assert list(found) == [*STAGES, "total", "workers", "device"]
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


def test_a_rehearsal_that_dies_is_told(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    config = small_config(tmp_path)
    facts = small_bench(tmp_path).facts
    data = config.data.model_copy(update={"transform": "tests.stages.test_estimate:dying"})
    monkeypatch.setenv("dying", "1")

    with pytest.raises(WorkersLostError, match=r"ended with code 7: the end"):
        estimate.estimate_run(config.model_copy(update={"data": data}), facts, Session("local").worker_environment())
