from __future__ import annotations

import json
from pathlib import Path

import pytest

import fisher_ray
from fisher_ray.errors import ResumeMismatchError
from fisher_ray.store import open_features
from fisher_ray.upkeep import verify
from tests.integration.runs import bits, digits


def stacked(output: Path, num_workers: int):
    linear = "linear={views: 2, view_mode: stack}"
    return digits(output, "trained_on=null", f"runtime.num_workers={num_workers}", linear)


@pytest.mark.slow
def test_stacked_views_are_the_same_bytes_with_one_worker_and_two(ray_session, tmp_path):
    results = [fisher_ray.run(stacked(tmp_path / str(number), number)) for number in (1, 2)]
    assert bits(tmp_path / "1") == bits(tmp_path / "2")
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["accuracy"]["fisher_linear"] > results[0]["accuracy"]["base"] + 0.1
    assert (results[0]["views"], results[0]["view_mode"]) == (2, "stack")

    store = open_features(str(tmp_path / "1/features/train.zarr"))
    assert store.attributes["views"] == "stacked"
    assert store.layout("features").shape[:2] == (store.num_rows, 2)
    fitted = json.loads((tmp_path / "1/run.json").read_text())["stages"]["linear"]["result"]
    assert fitted["num_rows"] == 2 * store.num_rows
    assert not any(verify(str(tmp_path / "1")).values())
    assert "as a row of its own" in (tmp_path / "1/report/report.html").read_text()

    test = open_features(str(tmp_path / "1/features/test.zarr"))
    assert test.layout("hidden").dims == ("sample", "view", "hidden")
    averaged = digits(tmp_path / "1", "trained_on=null", "linear={views: 2}")
    with pytest.raises(ResumeMismatchError, match=r'linear\.view_mode was "stack", now "average"'):
        fisher_ray.run(averaged)
