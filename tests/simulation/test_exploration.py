"""Runs under random trouble keep their invariants; a driver with a mistake does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simulation import __main__ as command
from tests.simulation.exploration import explore
from tests.simulation.invariants import ALL, BrokenError
from tests.simulation.planted import PLANTED, planted


@pytest.mark.parametrize("first", range(0, 500, 25))
def test_whatever_happens_the_invariants_hold(first):
    for seed in range(first, first + 25):
        explore(seed)


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_in_the_driver_breaks_its_invariant(name):
    broken = set[str]()
    with planted(name):
        for seed in range(200):
            try:
                explore(seed)
            except BrokenError as error:
                broken.add(error.invariant)
            if PLANTED[name][0] in broken:
                return
    pytest.fail(f"found {broken or 'nothing'}, not {PLANTED[name][0]}")


def test_there_is_a_mistake_for_every_invariant():
    assert {invariant for invariant, _ in PLANTED.values()} == set(ALL)


def test_a_seed_tells_the_same_events_whatever_the_order_of_hashes():
    def told(hash_seed: str) -> str:
        asked = [sys.executable, "-m", "tests.simulation", "--first", "3", "--seeds", "8", "-v"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(asked, env=environment, check=True, capture_output=True, text=True).stdout

    first, again = told("1"), told("2")
    assert first == again
    assert first.count("the sum is") > 5


def test_a_broken_seed_is_named_with_the_command_that_tells_its_events(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulation", "--first", "0", "--seeds", "40"])
    with planted("sums are merged in the order in which they came"):
        assert command.main() == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "python -m" in line)
    monkeypatch.setattr(sys, "argv", line.split()[2:])
    with planted("sums are merged in the order in which they came"):
        assert command.main() == 1
    out = capsys.readouterr().out
    assert "driver 1 starts" in out
    assert "1 broken" in out
