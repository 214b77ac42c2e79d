import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.data.keys import epoch_order, generator_seeds

MASK = 2**64 - 1


def splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**63 + 5, 10)])
def test_seeds_are_splitmix64_in_exact_integers(seed, epoch):
    state = splitmix(splitmix(splitmix(0 ^ seed) ^ epoch) ^ 2)
    expected = [splitmix((row * 0x9E3779B97F4A7C15 + state) & MASK) >> 1 for row in range(20)]
    assert generator_seeds(seed, epoch, 20).tolist() == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(1, 300))
def test_an_order_is_a_permutation(seed, epoch, num_rows):
    assert sorted(epoch_order(seed, epoch, num_rows)) == list(range(num_rows))


def test_orders_differ_between_seeds_and_epochs():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_row_comes_first_about_equally_often():
    """20,000 draws of 10 rows: a row's count is 2,000 ± 42; 6 of these are passed with probability < 2e-8."""
    first = [int(epoch_order(1, epoch, 10)[0]) for epoch in range(20_000)]
    counts = np.bincount(first, minlength=10)
    assert np.abs(counts - 2_000).max() < 6 * 42.5
