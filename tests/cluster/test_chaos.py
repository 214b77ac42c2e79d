"""Real runs on a real cluster that loses what it has; those of many faults are ``python -m tests.cluster.chaos``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.chaos import FAULTS, Bench, bench, survive, undisturbed
from tests.integration.processes import wait_for
from tests.integration.runs import bits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("chaos")) as found:
        yield found


@pytest.fixture(scope="module")
def whole(at: Bench) -> Path:
    return undisturbed(at, print)


def test_a_fault_of_every_kind_changes_no_byte(at, whole):
    tally = survive(at, whole, len(FAULTS), seed=1, stop_s=5.0, say=print)
    assert dict(tally.faults) == dict.fromkeys(FAULTS, 1)


def test_a_cluster_that_shrinks_to_nothing_and_comes_back_changes_no_byte(at, whole):
    output = at.folder / "shrunk"
    log, manifests = output.with_suffix(".log"), output / "features" / "train.zarr" / "manifest"
    at.lose(at.nodes[0])
    driver = at.start(output, "runtime.num_workers=auto")
    try:
        wait_for(lambda: any(manifests.glob("unit-*.json")), 120, "a finished unit")
        at.lose(at.nodes[0])
        wait_for(
            lambda: "waiting for workers: each needs 1 CPU, the cluster has 0 CPU" in log.read_text(), 60, "a note"
        )
        at.add()
        at.add()
        wait_for(lambda: "the cluster has grown: 2 workers instead of 1" in log.read_text(), 60, "growth")
        assert driver.wait(120) == 0, log.read_text()
    finally:
        driver.kill()
        driver.wait(30)
    assert bits(output) == bits(whole)


def test_without_a_worker_for_wait_s_the_run_stops_with_4_and_resumes(at, whole):
    output = at.folder / "waiting"
    log = output.with_suffix(".log")
    while at.nodes:
        at.lose(at.nodes[0])
    try:
        assert at.start(output, "runtime.wait_s=3").wait(90) == 4, log.read_text()
        assert "error: no worker could be had for" in log.read_text()
    finally:
        at.add()
        at.add()
    assert at.start(output, "runtime.wait_s=60").wait(120) == 0, log.read_text()
    assert bits(output) == bits(whole)
