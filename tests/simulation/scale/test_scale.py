"""The simulated world costs what it says, the same each time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from tests.simulation.scale import __main__ as command
from tests.simulation.scale.costs import Costs, Scenario
from tests.simulation.scale.lines import Line, Network, move
from tests.simulation.scale.running import run_scenario

FREE = replace(
    Costs(), wobble=0.0, slow_share=0.0, loss_each_s=0.0, sum_bytes=0.0, input_bytes=0.0, feature_bytes=0.0,
    storage_latency_s=0.0, machine_latency_s=0.0, call_s=0.0, get_s=0.0, ref_s=0.0, scan_s=0.0, decide_s=0.0,
)  # fmt: skip


def test_two_runs_of_a_scenario_find_the_same():
    scenario = Scenario("any", 64, 2_000_000, 4096, 8, Costs(), zone_lost_s=18.0, zone_back_s=5.0)
    first, again = run_scenario(scenario)[0], run_scenario(scenario)[0]
    assert first == again
    assert first.lost_machines > 0
    assert run_scenario(scenario, seed=1)[0] != first


def test_where_only_computing_costs_a_pass_takes_as_long_as_it_has_to():
    found, _ = run_scenario(Scenario("free", 16, 16 * 10 * 4096, 4096, None, FREE))
    assert found.efficiency == pytest.approx(1.0, abs=0.02)
    assert found.driver_load == 0
    assert found.wasted == 0


def test_a_slow_driver_is_what_limits():
    slow = replace(FREE, call_s=0.05)
    found, _ = run_scenario(Scenario("slow driver", 64, 64 * 10 * 4096, 4096, None, slow))
    assert found.driver_load > 0.9
    assert found.metric_s == pytest.approx((640 + 639) * 0.05, rel=0.01)  # as many units and merges


def test_throttled_storage_is_what_limits():
    slow = replace(FREE, input_bytes=1000.0, storage_bytes_s=1e7)
    found, _ = run_scenario(Scenario("slow storage", 16, 655_360, 4096, None, slow))
    assert found.features_s == pytest.approx(655_360 * 1000 / 1e7, rel=0.05)


def test_what_is_lost_is_computed_again_and_counted():
    scenario = Scenario("zone", 48, 4_000_000, 4096, 8, Costs(), zone_lost_s=20.0, zone_back_s=30.0)
    found, _ = run_scenario(scenario)
    assert found.lost_machines == 2
    assert found.wasted > 0


def test_lines_carry_one_thing_after_the_other():
    line = Line(10.0)
    assert [line.take(0.0, 20.0), line.take(1.0, 10.0), line.take(9.0, 10.0)] == [2.0, 3.0, 10.0]
    one, other, third = Network(1.0), Network(1.0), Network(1.0)
    assert [move(0.0, 5.0, one, other), move(0.0, 5.0, third, other), move(0.0, 1.0, one, third)] == [5.0, 10.0, 6.0]


def test_the_command_writes_a_table_a_figure_and_the_numbers(tmp_path, monkeypatch, capsys):
    arguments = ["--workers", "1,4", "--rows", "2e5", "--unit-rows", "4096", "--growing-only", "--samples-s", "5000"]
    monkeypatch.setattr(sys, "argv", ["scale", *arguments, "--output", str(tmp_path)])
    command.main()
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [line["num_workers"] for line in found["found"]] == [1, 4]
    assert found["costs"]["samples_s"] == 5000
    assert capsys.readouterr().out.count("\n| 2e5 rows |") == 2
    assert (tmp_path / "scale.svg").read_text().startswith("<?xml")
    assert (tmp_path / "scale.png").stat().st_size > 0
