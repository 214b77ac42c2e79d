import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.data import plan_units
from fisher_ray.errors import DataError
from fisher_ray.runtime.schedule import Node, Schedule


def work_through(num_units: int, seed: int, num_workers: int, trouble: float) -> str:
    """Run a schedule with random completion orders, failures and losses; results are the expressions that make them."""
    chance, schedule = random.Random(seed), Schedule(plan_units(num_units, 1), 10**6, merge=True)
    running: list[Node] = []
    while not schedule.finished:
        while len(running) < num_workers and (work := schedule.take()) is not None:
            running.append(work[0])
        assert running, "nothing runs, nothing is ready, and it is not finished"
        node = running.pop(chance.randrange(len(running)))
        if chance.random() < trouble:
            if node.level and chance.random() < 0.5:
                schedule.lost(node)
            else:
                schedule.failed(node, "bad luck")
        elif node.level:
            left, right = schedule.inputs(node)
            schedule.done(node, f"({left}+{right})")
        else:
            schedule.done(node, str(schedule.unit(node).index))
    assert schedule.take() is None
    return str(schedule.result)


@given(st.integers(1, 23), st.integers(0, 2**32), st.integers(1, 6))
def test_the_tree_is_the_same_whatever_the_order_the_workers_and_the_losses(num_units, seed, num_workers):
    undisturbed = work_through(num_units, 0, 1, 0.0)

    assert work_through(num_units, seed, num_workers, 0.3) == undisturbed
    found = [int(word) for word in undisturbed.replace("(", " ").replace(")", " ").replace("+", " ").split()]
    assert found == list(range(num_units))


def test_the_tree_joins_neighbours_level_by_level():
    assert work_through(5, 0, 1, 0.0) == "(((0+1)+(2+3))+4)"


def test_merges_come_before_further_units():
    schedule = Schedule(plan_units(4, 1), 3, merge=True)
    taken = [schedule.take(), schedule.take()]
    for item in taken:
        assert item is not None
        schedule.done(item[0], item[0].position)

    assert schedule.take() == (Node(1, 0), 1)
    assert schedule.take() == (Node(0, 2), 1)


def test_without_merging_no_result_is_kept():
    schedule = Schedule(plan_units(2, 1), 3, merge=False)
    for position in range(2):
        assert schedule.take() == (Node(0, position), 1)
        schedule.done(Node(0, position), object())

    assert schedule.finished
    assert schedule.take() is None
    assert schedule._results == {}


def test_no_units_are_finished_at_once():
    assert Schedule([], 3, merge=False).finished


def test_a_unit_that_fails_too_often_is_named_with_its_rows():
    schedule = Schedule(plan_units(20, 8), 2, merge=True)
    for attempt in (1, 2):
        assert schedule.take() == (Node(0, 0), attempt)
        if attempt == 1:
            schedule.failed(Node(0, 0), "first")
    with pytest.raises(DataError, match=r"unit 0 with rows \[0, 8\) failed 2 times; the last time: second"):
        schedule.failed(Node(0, 0), "second")


def test_what_a_lost_merge_was_made_of_is_computed_again():
    schedule = Schedule(plan_units(4, 1), 5, merge=True)
    for position in (0, 1):
        schedule.take()
        schedule.done(Node(0, position), position)
    assert schedule.take() == (Node(1, 0), 1)

    assert [unit.index for unit in schedule.lost(Node(1, 0))] == [0, 1]
    assert sorted(schedule.take()[0].position for _ in range(4)) == [0, 1, 2, 3]
