import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.errors import DataError, ModelError, RequestError
from fisher_ray.metric import Normalisation, RangeSum
from tests.reference import normalisation as reference

DIM = 7
ENTRIES = st.sampled_from([-3.0, -1.5, -0.0, 0.0, 2.0**-100, 0.25, 2.0])
ROWS = st.lists(st.dictionaries(st.integers(0, DIM - 1), ENTRIES, min_size=3, max_size=3), max_size=12)
FULL_ROWS = st.lists(st.lists(ENTRIES, min_size=DIM, max_size=DIM), min_size=1, max_size=8)
POWERS = st.sampled_from([None, 0.5, 1.0, 2.0])


def entries_of(rows):
    """Values and coordinates ``(K, W)`` of rows given as dictionaries."""
    width = len(rows[0]) if rows else 3
    values = torch.tensor([list(row.values()) for row in rows]).reshape(len(rows), width)
    return values, torch.tensor([list(row) for row in rows], dtype=torch.int32).reshape(len(rows), width)


def sparse_ranges(rows):
    sums = RangeSum(DIM)
    sums.add_sparse(*entries_of(rows))
    return sums.to_arrays()


def dense_ranges(rows, dim=DIM):
    sums = RangeSum(dim)
    sums.add(torch.as_tensor(rows))
    return sums.to_arrays()


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape)
        assert actual[name].tobytes() == value.tobytes(), name


def random_rows(num_rows, seed=0, dtype=torch.float32):
    """Rows whose coordinates lie far from zero on both sides, at many sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, DIM, generator=generator, dtype=dtype)
    return rows * torch.logspace(-6, 3, DIM, dtype=dtype) + torch.linspace(-2, 2, DIM, dtype=dtype)


@given(rows=ROWS)
def test_the_ranges_of_kept_entries_equal_a_search_through_them(rows):
    arrays = sparse_ranges(rows)
    smallest, largest, counts = reference.ranges(rows, DIM)

    assert all(value.dtype == np.float64 for value in arrays.values())
    assert arrays["counts"].tolist() == counts
    seen = np.array(counts) > 0
    assert arrays["minimum"][seen].tolist() == np.array(smallest)[seen].tolist()
    assert arrays["maximum"][seen].tolist() == np.array(largest)[seen].tolist()
    assert (arrays["minimum"][~seen] == math.inf).all()
    assert (arrays["maximum"][~seen] == -math.inf).all()


@given(rows=FULL_ROWS)
def test_rows_with_all_entries_kept_have_the_ranges_of_dense_rows(rows):
    dense = torch.tensor(rows)
    sums = RangeSum(DIM)
    sums.add_sparse(dense.flip(1), torch.arange(DIM).flip(0).expand(len(rows), DIM))
    assert_same_bits(sums.to_arrays(), dense_ranges(dense))


@given(parts=st.lists(ROWS, min_size=1, max_size=5), order=st.randoms(use_true_random=False))
def test_merging_any_parts_in_any_order_gives_the_bits_of_the_whole(parts, order):
    whole = sparse_ranges([row for part in parts for row in part])
    arrays = [sparse_ranges(part) for part in parts]
    order.shuffle(arrays)

    assert_same_bits(reduce(RangeSum.merge, arrays), whole)
    assert_same_bits(reduce(lambda left, right: RangeSum.merge(right, left), reversed(arrays)), whole)


@given(a=ROWS, b=ROWS, c=ROWS)
def test_merging_read_only_arrays_is_associative_and_commutative(a, b, c):
    a, b, c = (sparse_ranges(rows) for rows in (a, b, c))
    for value in (*a.values(), *b.values(), *c.values()):
        value.flags.writeable = False
    merge = RangeSum.merge

    assert_same_bits(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same_bits(merge(a, b), merge(b, a))
    assert_same_bits(merge(a, sparse_ranges([])), a)


def test_ranges_can_be_read_and_added_to_again_in_batches_of_scores():
    rows, sums = random_rows(24), RangeSum(DIM)
    sums.add(rows[:8])
    first = sums.to_arrays()
    kept = {name: value.copy() for name, value in first.items()}
    sums.add(rows[8:].reshape(4, 4, DIM))
    sums.add(rows[:0])

    assert_same_bits(sums.to_arrays(), dense_ranges(rows))
    assert_same_bits(first, kept)


def test_the_minimum_is_not_found_from_the_maximum():
    descending = torch.tensor([[5.0, -1.0], [3.0, -2.0], [4.0, -9.0]])
    arrays = dense_ranges(descending, 2)
    assert arrays["minimum"].tolist() == [3.0, -9.0]
    assert arrays["maximum"].tolist() == [5.0, -1.0]


def test_entries_left_out_do_not_draw_a_range_to_zero():
    sums = RangeSum(2)
    sums.add_sparse(torch.tensor([[2.0], [3.0], [-4.0]]), torch.tensor([[0], [0], [1]]))
    arrays = sums.to_arrays()
    assert (arrays["minimum"].tolist(), arrays["maximum"].tolist()) == ([2.0, -4.0], [3.0, -4.0])


@given(rows=ROWS.filter(len), power=POWERS, l2=st.booleans())
def test_normalised_kept_entries_equal_the_formula_entry_by_entry(rows, power, l2):
    values, coordinates = entries_of(rows)
    fitted = rows[: len(rows) // 2 + 1]  # the others leave the ranges, or have coordinates never seen
    actual = Normalisation.from_ranges(sparse_ranges(fitted), power, l2).apply_sparse(values.double(), coordinates)

    smallest, largest, _ = reference.ranges(fitted, DIM)
    expected = [list(reference.normalised(row, smallest, largest, power, l2).values()) for row in rows]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-30)


@given(rows=FULL_ROWS, power=POWERS, l2=st.booleans(), clip=st.booleans())
def test_rows_with_all_entries_kept_are_normalised_as_dense_rows(rows, power, l2, clip):
    dense = torch.tensor(rows)
    normalisation = Normalisation.from_ranges(dense_ranges(dense[:3]), power, l2, clip)
    flipped = normalisation.apply_sparse(dense.flip(1), torch.arange(DIM).flip(0).expand(len(rows), DIM))
    torch.testing.assert_close(flipped.flip(1), normalisation.apply(dense), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_dense_rows_equal_the_formula_in_every_dtype_and_batch_shape(dtype, tolerance):
    rows = random_rows(12).to(dtype)
    dense = [dict(enumerate(row)) for row in rows.double().tolist()]
    smallest, largest, _ = reference.ranges(dense[:8], DIM)
    expected = [list(reference.normalised(row, smallest, largest, 0.5, True).values()) for row in dense]

    before = rows.clone()
    actual = Normalisation.from_ranges(dense_ranges(rows[:8]), 0.5, l2=True).apply(rows.reshape(3, 4, DIM))

    assert actual.dtype == dtype
    assert torch.equal(rows, before)
    expected = torch.tensor(expected, dtype=torch.float64).reshape(3, 4, DIM)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_rows_that_were_fitted_fill_the_unit_interval_exactly(dtype):
    rows = random_rows(30, dtype=dtype)
    scaled = Normalisation.from_ranges(dense_ranges(rows)).apply(rows)
    assert scaled.amin(0).tolist() == [0.0] * DIM
    assert scaled.amax(0).tolist() == [1.0] * DIM


def test_rows_outside_the_ranges_are_cut_only_where_asked_for():
    ranges = dense_ranges(torch.tensor([[0.0, 1.0], [4.0, 3.0]]), 2)
    rows = torch.tensor([[-1.0, 9.0]], dtype=torch.float64)
    assert Normalisation.from_ranges(ranges).apply(rows).tolist() == [[-0.5, 2.0]]
    assert Normalisation.from_ranges(ranges, clip=True).apply(rows).tolist() == [[0.0, 1.0]]


def test_a_range_of_zero_counts_as_one_and_a_coordinate_never_seen_is_left_as_it_is():
    sums = RangeSum(2)
    sums.add_sparse(torch.tensor([[3.0], [3.0]]), torch.tensor([[0], [0]]))
    normalisation = Normalisation.from_ranges(sums.to_arrays(), power=None)
    assert normalisation.minimum.tolist() == [3.0, 0.0]
    assert normalisation.scale.tolist() == [1.0, 1.0]
    assert normalisation.apply(torch.tensor([[5.0, -2.0]])).tolist() == [[2.0, -2.0]]


def test_lengths_are_one_however_small_the_gradient_and_rows_of_zeros_stay():
    rows = torch.tensor([[3e-30, -4e-30], [0.0, 0.0], [3e30, 4e30]])
    expected = torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(Normalisation(l2=True).apply(rows), expected, rtol=1e-6, atol=0)


def test_without_arguments_it_is_the_identity():
    rows = random_rows(3)
    assert torch.equal(Normalisation().apply(rows), rows)
    assert torch.equal(Normalisation().apply_sparse(rows, torch.arange(DIM).expand(3, DIM)), rows)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("broken_first", [False, True])
def test_nan_and_infinity_are_kept_by_every_merge_and_refused_with_their_coordinates(broken, sparse, broken_first):
    parts = []
    for row in (2, 5):
        rows, sums = random_rows(6), RangeSum(DIM)
        rows[row, 4] = broken if row == 2 else rows[row, 4]
        coordinates = torch.arange(DIM).expand(6, DIM)
        sums.add_sparse(rows, coordinates) if sparse else sums.add(rows)
        sums.add(random_rows(2, seed=1))
        parts.append(sums.to_arrays())
    merged = RangeSum.merge(*(parts if broken_first else reversed(parts)))
    if math.isnan(broken):
        for name in ("minimum", "maximum"):
            assert np.isnan(merged[name]).nonzero()[0].tolist() == [4]

    with pytest.raises(DataError, match=rf"the range of 1 of {DIM} coordinates is NaN or infinite \(4\)"):
        Normalisation.from_ranges(merged)


def test_a_message_names_the_first_few_of_many_coordinates():
    with pytest.raises(DataError, match=r"of 20 of 20 coordinates .* \(0, 1, 2, 3, 4, \.\.\.\)"):
        Normalisation.from_ranges(dense_ranges(torch.full((2, 20), math.nan), 20))


def test_nan_in_a_row_stays_in_that_row():
    rows = random_rows(3)
    rows[1, 2] = math.nan
    for clip in (False, True):
        actual = Normalisation.from_ranges(dense_ranges(random_rows(9)), 0.5, clip=clip).apply(rows)
        assert actual.isnan().nonzero().tolist() == [[1, 2]]


def test_ranges_of_nothing_are_refused():
    with pytest.raises(DataError, match="no entries"):
        Normalisation.from_ranges(RangeSum(3).to_arrays())


def test_rows_of_another_network_are_refused():
    sums, normalisation = RangeSum(DIM), Normalisation.from_ranges(dense_ranges(random_rows(3)))
    for use in (sums.add, normalisation.apply):
        with pytest.raises(ModelError, match="do not have 7 coordinates"):
            use(torch.zeros(2, DIM + 1))
    for use in (sums.add_sparse, normalisation.apply_sparse):
        for outside in (-1, DIM):
            with pytest.raises(ModelError, match=rf"coordinate {outside} is not in \[0, 7\)"):
                use(torch.zeros(2, 2), torch.tensor([[0, 1], [outside, 2]]))
        with pytest.raises(RequestError, match="differ in shape"):
            use(torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"minimum": torch.zeros(3)},
        {"scale": torch.ones(3)},
        {"clip": True},
        {"minimum": torch.zeros(3), "scale": torch.ones(2)},
        {"minimum": torch.zeros(2), "scale": torch.tensor([1.0, 0.0])},
        {"minimum": torch.zeros(2), "scale": torch.tensor([1.0, math.nan])},
        {"power": 0.0},
        {"power": -1.0},
        {"power": math.nan},
        {"power": math.inf},
    ],
    ids=str,
)
def test_attributes_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(RequestError):
        Normalisation(**wrong)


@pytest.mark.parametrize("power", [None, 0.5])
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("scaled", [None, False, True])
def test_arrays_bring_back_the_same_normalisation(power, l2, scaled):
    rows = random_rows(9)
    normalisation = (
        Normalisation(power=power, l2=l2)
        if scaled is None
        else Normalisation.from_ranges(dense_ranges(rows[:5]), power, l2, clip=scaled)
    )
    arrays = normalisation.to_arrays()
    for value in arrays.values():
        value.flags.writeable = False  # as stores return them
    again = Normalisation.from_arrays(arrays)

    assert_same_bits(again.to_arrays(), arrays)
    assert (again.power, again.l2, again.clip) == (power, l2, bool(scaled))
    assert torch.equal(again.apply(rows), normalisation.apply(rows))


@pytest.mark.gpu
def test_rows_on_a_gpu_are_ranged_and_normalised_there_to_the_same():
    rows, coordinates = random_rows(9), torch.arange(DIM).expand(9, DIM)
    sums = RangeSum(DIM)
    sums.add(rows[:4].cuda())
    sums.add_sparse(rows[4:].cuda(), coordinates[4:].cuda())
    assert_same_bits(sums.to_arrays(), dense_ranges(rows))
    normalisation = Normalisation.from_ranges(sums.to_arrays(), l2=True)
    expected = normalisation.apply(rows)
    for actual in (normalisation.apply(rows.cuda()), normalisation.apply_sparse(rows.cuda(), coordinates.cuda())):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-7)
