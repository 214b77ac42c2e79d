"""Checking a finished run, and having what is damaged of it written again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fisher_ray import pipeline, upkeep
from fisher_ray.cli.commands import _app
from fisher_ray.errors import ClaimedError, StoreError
from fisher_ray.runtime import Claim
from tests.integration.runs import Listening, bits, digits


@pytest.fixture
def run(undisturbed, tmp_path) -> Path:
    """A copy of a whole run, which may be damaged."""
    return Path(shutil.copytree(undisturbed[0], tmp_path / "run"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


def fisher_ray(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(_app(), list(arguments))
    return done.exit_code, done.output


def test_every_store_of_a_run_is_checked(run):
    code, text = fisher_ray("verify", str(run))
    assert code == 0
    assert text.count(": whole") == sum((run / name).exists() for name in upkeep.STAGES) > 0
    flip(next(path for path in sorted((run / "metric.zarr").rglob("0")) if path.is_file()))
    (run / "features/test.zarr/labels/c/0").unlink()
    code, text = fisher_ray("verify", str(run))
    assert code == 3
    assert "features/test.zarr: labels/c/0: missing" in text
    assert "metric.zarr: " in text
    assert "2 problem(s)" in text


@pytest.mark.slow
def test_what_is_damaged_is_written_again_by_the_next_start_and_nothing_else(run, undisturbed):
    store = run / "features/train.zarr"
    flip(store / "features/c/2/0/0")
    (store / "manifest/unit-000003.json").write_text("{")
    (run / "features/test.zarr/seal.json").write_text("{}")
    shutil.rmtree(run / "linear/weights.zarr")
    (run / "features/test.zarr/notes.txt").write_text("mine")

    code, text = fisher_ray("verify", str(run), "--repair")
    assert code == 0, text
    assert "units 1, 3 will be written again" in text
    assert "test.zarr: the seal will be written again" in text
    assert "notes.txt is left alone" in text
    assert "weights.zarr: all of it will be written again" in text
    (run / "features/test.zarr/notes.txt").unlink()

    heard = Listening()
    pipeline.run(digits(run, "runtime.num_workers=2"), progress=heard)
    assert heard.stages == ["features/train", "features/test", "linear"]
    assert bits(run)["linear/predictions.zarr/seal.json"] == bits(undisturbed[0])["linear/predictions.zarr/seal.json"]
    features = [receipt.unit.index for stage, receipt in heard.receipts if stage == "features/train"]
    assert sorted(features) == [1, 3]
    assert "features/test" not in [stage for stage, _ in heard.receipts]
    assert bits(run) == bits(undisturbed[0])
    assert fisher_ray("verify", str(run))[0] == 0
    assert fisher_ray("verify", str(run), "--repair") == (0, "nothing to repair\n")


def test_one_store_of_a_run_is_repaired_by_its_own_url(run):
    flip(run / "metric.zarr/zarr.json")
    flip(run / "features/train.zarr/features/c/0/0/0")
    found = upkeep.repair(f"{run}/metric.zarr/", print)
    assert [done.units for done in found.values()] == [None]
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [name for name, record in stages.items() if not record["sealed"]] == ["metric"]


def test_a_foreign_file_alone_has_no_stage_done_again(run):
    (run / "metric.zarr/notes.txt").write_text("mine")
    (run / "linear/predictions.zarr/seal.json").unlink()
    found = upkeep.repair(str(run), print)
    assert {url.removeprefix(f"{run}/"): done.needed for url, done in found.items()} == {
        "metric.zarr": False,
        "linear/predictions.zarr": True,
    }
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [name for name, record in stages.items() if not record["sealed"]] == ["report"]


def test_a_run_at_work_is_not_repaired(run):
    flip(run / "features/train.zarr/features/c/0/0/0")
    with Claim(str(run), print), pytest.raises(ClaimedError, match="works on this run"):
        upkeep.repair(str(run), print)
    assert (run / "features/train.zarr/seal.json").exists()


def test_a_store_that_belongs_to_no_run_is_not_taken_apart(run, tmp_path):
    alone = Path(shutil.copytree(run / "features/train.zarr", tmp_path / "alone.zarr"))
    assert upkeep.repair(str(alone), print) == {}
    flip(alone / "features/c/0/0/0")
    with pytest.raises(StoreError, match="belongs to no run folder"):
        upkeep.repair(str(alone), print)
    assert (alone / "seal.json").exists()
