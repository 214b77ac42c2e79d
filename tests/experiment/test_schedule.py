import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.experiment.schedule import computed_seconds, makespan, route_seconds

SECONDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


def test_units_go_to_the_worker_that_is_free_first():
    assert makespan([3, 1, 1, 1, 2], 1) == 8
    assert makespan([3, 1, 1, 1, 2], 2) == 5  # 3 and 2; 1, 1 and 1
    assert makespan([3, 1, 1, 1, 2], 5) == 3
    assert makespan([], 3) == 0
    with pytest.raises(ValueError, match="0 workers are none"):
        makespan([1], 0)


@given(SECONDS, st.integers(1, 9))
def test_no_schedule_is_shorter_than_its_longest_unit_or_its_share(seconds, num_workers):
    least = max(max(seconds), sum(seconds) / num_workers)
    assert least - 1e-9 <= makespan(seconds, num_workers) <= 2 * least + 1e-9  # Graham's bound


@given(SECONDS, st.floats(0, 50), st.integers(1, 9), st.integers(1, 9))
def test_what_is_no_units_time_stays_whatever_the_number_of_workers(seconds, rest, before, after):
    stages = {
        "metric": {"seconds": makespan(seconds, before) + rest, "units": seconds},
        "base": {"seconds": 1000.0, "units": []},  # not the shallow route's
    }
    assert computed_seconds(stages, after, before) == pytest.approx(makespan(seconds, after) + rest)
    assert computed_seconds(stages, before, before) == pytest.approx(route_seconds(stages))
