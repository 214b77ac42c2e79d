"""Which piece of work is slow: durations are told apart by kind."""

import pytest

from fisher_ray.data import plan_units
from fisher_ray.runtime.passing import STRAGGLER_RATIO, STRAGGLER_S, STRAGGLING_MERGE_S, Pass
from fisher_ray.runtime.schedule import Schedule


def nothing_done() -> Pass:
    return Pass("metric", Schedule(plan_units(4, 1), 3, merge=True), lambda: None, {}, lambda receipt: None)


def test_as_long_as_no_duration_is_known_nothing_is_slow():
    assert nothing_done().slow_s("unit") == float("inf")


def test_each_kind_is_held_against_its_own():
    given = nothing_done()
    for _ in range(50):
        given.took("unit", 0.1)  # very many, and short
    for seconds in (100.0, 120.0, 140.0):
        given.took("merge", seconds)
    assert given.slow_s("merge") == STRAGGLER_RATIO * 120.0
    assert given.slow_s("unit") == STRAGGLER_S


def test_a_kind_of_which_none_has_ended_is_held_against_all_others():
    given = nothing_done()
    for seconds in (10.0, 20.0, 30.0):
        given.took("unit", seconds)
    given.took("kept", 40.0)
    assert given.slow_s("merge") == STRAGGLER_RATIO * 25.0


@pytest.mark.parametrize("kind", ["unit", "merge"])
def test_only_the_last_hundred_count(kind):
    given = nothing_done()
    for _ in range(1000):
        given.took(kind, 1000.0)
    for _ in range(101):
        given.took(kind, 20.0)
    assert given.slow_s(kind) == STRAGGLER_RATIO * 20.0


def test_a_merge_has_longer():
    given = nothing_done()
    given.took("merge", 0.1)
    assert given.slow_s("merge") == STRAGGLING_MERGE_S > STRAGGLER_S
