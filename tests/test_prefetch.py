import threading

import pytest

from fisher_ray.prefetch import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fisher-ray-prefetch")]


def numbers(count, started, fail_at=None, ended=None):
    try:
        for i in range(count):
            started.append(i)
            if i == fail_at:
                raise OSError(f"item {i}")
            yield i
    finally:
        if ended is not None:
            ended.append(True)


def test_all_items_come_in_order_and_the_thread_ends():
    assert list(prefetch(numbers(50, []), depth=3)) == list(range(50))
    assert threads() == []


def test_no_more_than_depth_items_are_computed_ahead():
    started = []
    ahead = prefetch(numbers(50, started), depth=2)
    for taken in range(1, 20):
        next(ahead)
        assert len(started) <= taken + 2
    ahead.close()


def test_closing_ends_the_thread_and_closes_the_items():
    ended = []
    ahead = prefetch(numbers(50, [], ended=ended))
    next(ahead)
    assert threads() != []
    ahead.close()
    assert threads() == []
    assert ended == [True]


def test_an_exception_is_raised_at_its_place_and_ends_the_thread():
    ahead, seen = prefetch(numbers(9, [], fail_at=4)), []
    with pytest.raises(OSError, match="item 4"):
        seen.extend(iter(ahead.__next__, None))
    with pytest.raises(StopIteration):
        next(ahead)
    assert threads() == []


def test_nothing_starts_before_the_first_item_is_asked_for():
    started = []
    ahead = prefetch(numbers(9, started))
    assert (started, threads()) == ([], [])
    ahead.close()


def test_a_forgotten_iterator_ends_its_thread():
    ahead = prefetch(numbers(50, []))
    next(ahead)
    del ahead
    assert threads() == []
