import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.data import choose_units, plan_units


@given(st.integers(0, 500), st.integers(1, 70))
def test_units_tile_the_rows(num_rows, unit_rows):
    units = plan_units(num_rows, unit_rows)
    assert [row for unit in units for row in range(unit.start, unit.stop)] == list(range(num_rows))
    assert [unit.index for unit in units] == list(range(len(units)))
    assert all(len(unit) == unit_rows for unit in units[:-1])


@pytest.mark.parametrize(
    ("num_units", "fraction", "num_chosen"), [(100, 0.07, 7), (100, 0.1, 10), (3, 0.1, 1), (7, 0.5, 4), (5, 1.0, 5)]
)
def test_the_fraction_of_units_is_rounded_up(num_units, fraction, num_chosen):
    assert len(choose_units(plan_units(num_units, 1), fraction)) == num_chosen


@given(st.integers(1, 200), st.floats(1e-6, 1.0))
def test_chosen_units_are_different_in_order_and_evenly_spread(num_units, fraction):
    chosen = [unit.index for unit in choose_units(plan_units(num_units, 1), fraction)]
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert 0 <= chosen[0] <= chosen[-1] < num_units


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match="not in"):
        choose_units(plan_units(4, 1), fraction)


@pytest.mark.parametrize(("num_rows", "unit_rows"), [(-1, 3), (3, 0)])
def test_impossible_units_are_refused(num_rows, unit_rows):
    with pytest.raises(ValueError, match="cannot cut"):
        plan_units(num_rows, unit_rows)
