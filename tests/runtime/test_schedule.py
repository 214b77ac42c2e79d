import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.data import plan_units
from fisher_ray.errors import DataError, StoppedError, WorkersLostError
from fisher_ray.records import Unit
from fisher_ray.runtime.schedule import Part, Schedule
from fisher_ray.runtime.tree import Node


def work_through(
    num_units: int, seed: int, num_workers: int, trouble: float, storage: dict[Node, str] | None = None, stop: float = 0
) -> str | None:
    """Run a schedule with random completion orders, failures, losses and work that is done twice.

    Results are the expressions that make them. What is in ``storage`` is kept there, as some merges' results are; with
    the chance ``stop`` the run ends after a piece of work, and returns None.
    """
    chance, storage = random.Random(seed), {} if storage is None else storage
    schedule = Schedule(plan_units(num_units, 1), 10**6, merge=True, kept=list(storage))
    running: list[tuple[Node, tuple[str, str] | None]] = []  # with the inputs, which are as they were when it began
    while not schedule.finished:
        if chance.random() < stop:
            return None
        for leftover in [item for item in running if not schedule.wants(item[0])]:
            schedule.release(leftover[0])
            running.remove(leftover)
        while len(running) < num_workers:
            if (work := schedule.take()) is None and running and chance.random() < trouble:
                node = chance.choice(running)[0]
                work = schedule.copy(node) if schedule.num_running(node) == 1 else None
            if work is None:
                break
            merges = work[0].level and not schedule.is_kept(work[0])
            running.append((work[0], schedule.inputs(work[0]) if merges else None))
        assert running, "nothing runs, nothing is ready, and it is not finished"
        node, inputs = running.pop(chance.randrange(len(running)))
        if chance.random() < trouble:
            how = chance.choice(["failed", "died", "returned", "lost"])
            if inputs is not None and how == "lost":
                schedule.lost(node)
            elif schedule.is_kept(node) and how == "lost":
                storage.pop(node, None)
                schedule.unkept(node)
            elif how == "returned":
                schedule.returned(node)
            else:
                getattr(schedule, "failed" if how == "lost" else how)(node, "bad luck")
            continue
        if inputs is not None:
            result = f"({inputs[0]}+{inputs[1]})"
        else:
            result = storage[node] if schedule.is_kept(node) else str(schedule.unit(node).index)
        kept = node.level >= 2 and stop > 0
        if schedule.done(node, result, kept=kept) and kept:
            storage[node] = result
            for below in schedule.superseded(node):
                del storage[below]
    return str(schedule.result)


@given(st.integers(1, 23), st.integers(0, 2**32), st.integers(1, 6))
def test_the_tree_is_the_same_whatever_the_order_the_workers_and_the_losses(num_units, seed, num_workers):
    undisturbed = work_through(num_units, 0, 1, 0.0)

    assert work_through(num_units, seed, num_workers, 0.3) == undisturbed
    found = [int(word) for word in undisturbed.replace("(", " ").replace(")", " ").replace("+", " ").split()]
    assert found == list(range(num_units))


@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(1, 4))
def test_the_tree_is_the_same_whatever_was_kept_when_the_run_stopped(num_units, seed, num_workers):
    storage: dict[Node, str] = {}
    result = None
    for start in range(1000):
        result = work_through(num_units, seed + start, num_workers, 0.1, storage, stop=0.02)
        if result is not None:
            break
    assert result == work_through(num_units, 0, 1, 0.0)


@given(st.integers(1, 12), st.integers(0, 2**32), st.integers(1, 5), st.sets(st.integers(0, 95), max_size=5))
def test_the_rows_that_a_unit_fails_by_are_found_and_all_others_are_cleared(num_units, seed, num_workers, poison):
    chance = random.Random(seed)
    schedule = Schedule(plan_units(8 * num_units, 8), 3, merge=True, isolate=True)
    found: dict[int, str] = {}
    running: list[Node | Part] = []
    while not schedule.finished:
        while len(running) < num_workers and (work := schedule.take()) is not None:
            running.append(work[0])
        work = running.pop(chance.randrange(len(running)))
        unit = work.unit if isinstance(work, Part) else schedule.unit(work) if not work.level else None
        excluded = dict(unit.excluded) if unit is not None else {}
        bad = poison & set(range(unit.start, unit.stop)) - set(excluded) if unit is not None else set()
        if bad:
            chance.choice([schedule.failed, schedule.died])(work, f"row {min(bad)}")
        elif chance.random() < 0.1:
            schedule.returned(work)
        else:
            schedule.done(work, None)
        for node, isolation in schedule.concluded():
            assert not isolation.hopeless
            found |= isolation.rows
            schedule.resume(node, isolation.cleared())
    assert set(found) == {row for row in poison if row < 8 * num_units}


def test_a_unit_whose_every_row_fails_is_given_up_before_all_are_tried():
    schedule, tried = Schedule([Unit(0, 0, 2048)], 1, merge=False, isolate=True), 0
    while not (ended := schedule.concluded()):
        work, _ = schedule.take()
        schedule.failed(work, "no memory")
        tried += 1
    assert ended[0][1].hopeless
    assert tried < 50


def test_a_unit_that_fails_although_each_of_its_rows_does_not_is_an_error():
    schedule = Schedule([Unit(0, 0, 4)], 2, merge=False, isolate=True)
    for _ in range(2):
        node, _ = schedule.take()
        schedule.failed(node, "out of luck")
    while not (ended := schedule.concluded()):
        schedule.done(schedule.take()[0], None)
    (node, isolation), rows = ended[0], ended[0][1].rows
    assert rows == {}
    schedule.resume(node, isolation.cleared())
    schedule.failed(schedule.take()[0], "out of luck")
    with pytest.raises(DataError, match="failed 2 times"):
        schedule.failed(schedule.take()[0], "out of luck")


def test_a_copy_of_what_is_done_is_not_wanted_any_more():
    schedule = Schedule(plan_units(2, 1), 3, merge=True)
    for _ in range(2):
        schedule.done(schedule.take()[0], "unit")
    merge, _ = schedule.take()
    schedule.copy(merge)
    assert schedule.wants(merge)
    schedule.done(merge, "sum")
    assert not schedule.wants(merge)
    schedule.release(merge)
    assert schedule.num_running(merge) == 0


@pytest.mark.parametrize("how", ["failed", "died"])
def test_a_unit_under_suspicion_may_fail_once_more_in_other_hands(how):
    schedule = Schedule([Unit(0, 0, 8)], 1, merge=True, isolate=True)
    node, _ = schedule.take()
    schedule.copy(node)
    getattr(schedule, how)(node, "first")
    getattr(schedule, how)(node, "second")
    part, _ = schedule.take()
    assert part == Part(node, Unit(0, 0, 4))


def test_a_part_that_two_have_is_handed_out_again_when_neither_has_it():
    schedule = Schedule([Unit(0, 0, 8)], 1, merge=True, isolate=True)
    node, _ = schedule.take()
    schedule.failed(node, "no")
    part, _ = schedule.take()
    assert schedule.may_copy(part)
    assert schedule.copy(part) == (part, 1)
    assert not schedule.may_copy(part)
    schedule.returned(part)
    assert schedule.take()[0].unit == Unit(0, 4, 8)
    assert schedule.take() is None
    schedule.returned(part)
    assert schedule.take()[0] == part
    assert not schedule.may_copy(node)
    schedule.copy(part)
    schedule.failed(part, "no")
    schedule.died(part, "late")
    assert [schedule.take()[0].unit for _ in range(2)] == [Unit(0, 0, 2), Unit(0, 2, 4)]
    assert schedule.take() is None


def test_a_row_is_not_blamed_for_one_machine_that_was_lost():
    schedule = Schedule([Unit(0, 0, 2)], 2, merge=True, isolate=True)
    for _ in range(2):
        schedule.died(schedule.take()[0], "lost")
    tried = [schedule.take()[0] for _ in range(2)]
    schedule.died(tried[0], "lost")
    schedule.done(tried[1], None)
    again, _ = schedule.take()
    assert again == tried[0]
    schedule.done(again, None)
    ((_, isolation),) = schedule.concluded()
    assert isolation.rows == {}


@given(st.integers(1, 23))
def test_a_whole_sum_that_is_lost_is_made_again_and_given_up_at_the_last_attempt(num_units):
    schedule = Schedule(plan_units(num_units, 1), 3, merge=True)
    for attempt in range(3):
        while not schedule.finished:
            node, _ = schedule.take()
            result = "({}+{})".format(*schedule.inputs(node)) if node.level else str(schedule.unit(node).index)
            schedule.done(node, result)
        assert schedule.result == work_through(num_units, 0, 1, 0.0)
        if attempt == 2:
            with pytest.raises(WorkersLostError, match="3 times: it was lost with the machine"):
                schedule.lost_result()
        else:
            assert len(schedule.lost_result()) == num_units


def test_work_that_is_done_twice_counts_once():
    schedule = Schedule(plan_units(2, 1), 3, merge=True)
    first, second = schedule.take()[0], schedule.take()[0]
    assert schedule.copy(first) == (first, 2)
    assert schedule.done(first, "a")
    assert not schedule.done(first, "a again")
    assert schedule.take() is None
    schedule.done(second, "b")
    merge, _ = schedule.take()
    assert schedule.inputs(merge) == ("a", "b")


def pairwise_tree(words: list[str]) -> str:
    """Join neighbours until one is left: the oracle of the tree's shape."""
    while len(words) > 1:
        pairs = [words[place : place + 2] for place in range(0, len(words), 2)]
        words = [f"({pair[0]}+{pair[1]})" if len(pair) == 2 else pair[0] for pair in pairs]
    return words[0]


@given(st.integers(1, 70))
def test_the_trees_shape_is_given_by_the_number_of_units(num_units):
    assert work_through(num_units, 0, 3, 0.0) == pairwise_tree([str(index) for index in range(num_units)])


@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(1, 6))
def test_few_results_are_held_at_a_time(num_units, seed, num_workers):
    chance, schedule, running = random.Random(seed), Schedule(plan_units(num_units, 1), 1, merge=True), []
    while not schedule.finished:
        while len(running) < num_workers and (work := schedule.take()) is not None:
            running.append(work[0])
        schedule.done(running.pop(chance.randrange(len(running))), object())
        assert len(schedule._results) <= num_workers * (num_units.bit_length() + 1)


@given(st.integers(1, 20), st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_a_unit_is_given_up_when_it_failed_so_often_and_not_before(num_units, seed, num_workers, max_attempts, merge):
    chance, schedule = random.Random(seed), Schedule(plan_units(5 * num_units, 5), max_attempts, merge=merge)
    failures: Counter[Node] = Counter()
    running: list[Node] = []
    while not schedule.finished:
        while len(running) < num_workers and (work := schedule.take()) is not None:
            node, attempt = work
            assert attempt == failures[node] + 1
            running.append(node)
        node = running.pop(chance.randrange(len(running)))
        if chance.random() > 0.4:
            schedule.done(node, None)
            continue
        failures[node] += 1
        if failures[node] < max_attempts:
            schedule.failed(node, "bad luck")
            continue
        name = "merging sums"
        if not node.level:
            unit = schedule.unit(node)
            name = rf"unit {unit.index} with rows \[{unit.start}, {unit.stop}\)"
        with pytest.raises(DataError, match=rf"{name}.* failed {max_attempts} times; the last time: bad luck"):
            schedule.failed(node, "bad luck")
        return


@given(st.integers(1, 20), st.integers(0, 2**32), st.integers(1, 4))
def test_without_merging_every_unit_is_done_once_in_order_but_for_failures(num_units, seed, num_workers):
    chance, schedule = random.Random(seed), Schedule(plan_units(5 * num_units, 5), 10**6, merge=False)
    running: list[Node] = []
    started: list[int] = []
    done: list[int] = []
    while not schedule.finished:
        while len(running) < num_workers and (work := schedule.take()) is not None:
            running.append(work[0])
            started += [work[0].position] if work[1] == 1 else []
        node = running.pop(chance.randrange(len(running)))
        if chance.random() < 0.3:
            schedule.failed(node, "bad luck")
        else:
            schedule.done(node, object())
            done.append(schedule.unit(node).index)
            assert schedule._results == {}
    assert started == sorted(done) == list(range(num_units))


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


def test_a_single_lost_side_takes_nothing_else_with_it():
    schedule = Schedule(plan_units(8, 1), 5, merge=True)
    while (work := schedule.take()) != (Node(2, 0), 1):
        assert work is not None
        node = work[0]
        schedule.done(node, str(node) if node.level == 0 else "+".join(schedule.inputs(node)))
    assert set(schedule._results) == {Node(1, 0), Node(1, 1)}
    assert schedule.take() == (Node(0, 4), 1)

    assert sorted(unit.index for unit in schedule.lost(Node(2, 0))) == [0, 1, 2, 3]
    schedule.done(Node(0, 4), "kept")
    assert schedule._results == {Node(0, 4): "kept"}
    assert not schedule.finished
    again = [schedule.take() for _ in range(5)]
    assert sorted(work[0].position for work in again[:4]) == [0, 1, 2, 3]  # before the units that are new
    assert again[4] == (Node(0, 5), 1)


def test_a_last_result_that_had_moved_up_is_lost_down_to_its_unit():
    schedule = Schedule(plan_units(3, 1), 5, merge=True)
    while (work := schedule.take()) != (Node(2, 0), 1):
        assert work is not None
        schedule.done(work[0], "")

    assert sorted(unit.index for unit in schedule.lost(Node(2, 0))) == [0, 1, 2]


def until_merge(schedule: Schedule) -> Node:
    while True:
        work = schedule.take()
        assert work is not None
        if work[0].level:
            return work[0]
        schedule.done(work[0], "")


def test_a_loss_is_no_failure_of_the_units_that_are_computed_again():
    schedule = Schedule(plan_units(2, 1), 3, merge=True)
    for _ in range(2):
        schedule.lost(until_merge(schedule))
    work = schedule.take()
    assert work is not None
    schedule.failed(work[0], "its first failure")
    schedule.done(until_merge(schedule), "sum")
    assert schedule.finished


def test_sums_that_are_lost_again_and_again_stop_the_run_and_blame_no_data():
    schedule = Schedule(plan_units(2, 1), 3, merge=True)
    for _ in range(2):
        schedule.lost(until_merge(schedule))
    with pytest.raises(StoppedError, match=r"level 1, position 0.* tried 3 times: its inputs were lost.*[Rr]un again"):
        schedule.lost(until_merge(schedule))


def test_a_worker_that_dies_is_no_failure_of_the_unit_and_too_many_are_lost_workers():
    schedule = Schedule(plan_units(8, 8), 3, merge=False)
    for _ in range(2):
        node, _ = schedule.take()
        schedule.failed(node, "torn")
        node, _ = schedule.take()
        schedule.died(node, "preempted")
    node, attempt = schedule.take()
    assert attempt == 5
    with pytest.raises(
        WorkersLostError, match=r"unit 0 with rows \[0, 8\) was tried 3 times: its worker died; .*: preempted"
    ):
        schedule.died(node, "preempted")


def test_a_kept_sum_that_two_could_not_read_is_merged_anew():
    """The second says so when its parts are computed already."""
    kept = Node(1, 0)
    schedule = Schedule(plan_units(2, 1), 3, merge=True, kept=[kept])
    assert schedule.take() == (kept, 1)
    schedule.copy(kept)
    schedule.unkept(kept)
    while (work := schedule.take()) is not None:
        schedule.done(work[0], "part")
    schedule.give_back(kept)
    assert schedule.take()[0] == kept
    schedule.done(kept, "sum")
    assert schedule.finished
