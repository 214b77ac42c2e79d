from functools import reduce

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.stages.attribution.best import NUM_BINS, Best, count_cosines, merge_best
from tests.reference import attribution as reference

SIGNS = {"highest": -1, "lowest": 1}


def dense(scores, rows, labels, top, left_out=None):
    meant = scores.astype(np.float64)
    if left_out is not None:
        meant = np.where(left_out, np.nan, meant)
    found = {end: reference.best(meant, rows, labels, top, sign) for end, sign in SIGNS.items()}
    return {f"{end}-{name}": value for end, one in found.items() for name, value in one.items()}


def best_of(scores, rows, labels, top, left_out=None, blocks=None):
    found = Best(len(scores), top)
    for block in blocks or [slice(None)]:
        left = None if left_out is None else torch.from_numpy(left_out[:, block])
        found.add(*(torch.from_numpy(value) for value in (scores[:, block], rows[block], labels[block])), left)
    return found.to_arrays()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def merged_at_random(parts, draw):
    while len(parts) > 1:
        one, other = (parts.pop(draw(st.integers(0, len(parts) - 1))) for _ in range(2))
        parts.append(merge_best(one, other))
    return parts[0]


def drawn(draw, scores):
    """Rows with scores, some left out, and their blocks."""
    num_queries, num_rows = scores.shape
    rows = np.array(sorted(draw(st.sets(st.integers(0, 99), min_size=num_rows, max_size=num_rows))), np.int64)
    left_out = np.array(draw(st.lists(st.booleans(), min_size=scores.size, max_size=scores.size)), bool)
    cuts = sorted(draw(st.sets(st.integers(1, max(num_rows - 1, 1)), max_size=4)))
    blocks = [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, num_rows], strict=True)]
    return rows, rows % 3, left_out.reshape(num_queries, num_rows), blocks


@given(st.data())
def test_any_blocks_merged_in_any_order_give_the_same(data):
    num_queries, num_rows, top = (data.draw(st.integers(1, most)) for most in (3, 14, 5))
    places = data.draw(st.permutations(range(num_queries * num_rows)))
    scores = (np.array(places, np.float32).reshape(num_queries, num_rows) - 7) / 4  # all different
    rows, labels, left_out, blocks = drawn(data.draw, scores)

    one_by_one = best_of(scores, rows, labels, top, left_out, blocks)
    parts = [best_of(scores, rows, labels, top, left_out, [block]) for block in blocks]

    expected = dense(scores, rows, labels, top, left_out)
    assert_same(one_by_one, expected)
    assert_same(reduce(merge_best, parts), expected)
    assert_same(merged_at_random(parts, data.draw), expected)


@given(st.data())
def test_of_equal_scores_the_lower_row_wins_whatever_the_blocks(data):
    num_queries, num_rows, top = (data.draw(st.integers(1, most)) for most in (2, 24, 5))
    levels = st.lists(
        st.sampled_from([-1.0, 0.0, 2.0]), min_size=num_queries * num_rows, max_size=num_queries * num_rows
    )
    scores = np.array(data.draw(levels), np.float32).reshape(num_queries, num_rows)
    rows, labels, left_out, blocks = drawn(data.draw, scores)
    parts = [best_of(scores, rows, labels, top, left_out, [block]) for block in blocks]

    assert_same(merged_at_random(parts, data.draw), dense(scores, rows, labels, top, left_out))


def test_of_equal_scores_in_two_blocks_the_lower_row_wins():
    rows = np.array([2, 8, 5, 1], np.int64)
    scores = np.array([[3.0, 1.0, 3.0, 3.0]], np.float32)
    found = best_of(scores, rows, rows, 2, blocks=[slice(0, 2), slice(2, 3), slice(3, 4)])
    assert found["highest-rows"].tolist() == [[1, 2]]


def test_of_many_equal_scores_in_one_block_the_lowest_rows_win():
    rows, scores = np.arange(5000), np.zeros((2, 5000), np.float32)
    scores[1, 4000] = 1
    found = best_of(scores, rows, rows, 3)
    assert found["highest-rows"].tolist() == [[0, 1, 2], [4000, 0, 1]]
    assert found["lowest-rows"].tolist() == [[0, 1, 2]] * 2


def test_what_is_not_there_has_the_row_minus_one():
    scores, rows, labels = np.array([[0.5, -2.0]], np.float32), np.array([7, 4]), np.array([1, 0])
    found = best_of(scores, rows, labels, 3)
    assert found["highest-rows"].tolist() == [[7, 4, -1]]
    assert found["lowest-labels"].tolist() == [[0, 1, -1]]
    assert found["highest-scores"].tolist() == [[0.5, -2.0, -np.inf]]
    assert found["lowest-scores"].tolist() == [[-2.0, 0.5, np.inf]]
    assert {found[f"{end}-scores"].dtype for end in SIGNS} == {np.dtype(np.float32)}
    assert {found[f"{end}-{what}"].dtype for end in SIGNS for what in ("rows", "labels")} == {np.dtype(np.int64)}
    assert_same(merge_best(found, Best(1, 3).to_arrays()), found)


def test_all_left_out_is_as_nothing_added():
    scores, rows = np.ones((2, 3), np.float32), np.arange(3)
    assert_same(best_of(scores, rows, rows, 2, np.ones((2, 3), bool)), Best(2, 2).to_arrays())


@given(st.data())
def test_cosines_are_counted_as_a_histogram_counts_them(data):
    num_queries, num_rows = (data.draw(st.integers(1, most)) for most in (3, 20))
    size = num_queries * num_rows
    inside = st.tuples(st.integers(0, NUM_BINS - 1), st.floats(0.01, 0.99)).map(
        lambda item: 2 * sum(item) / NUM_BINS - 1
    )
    values = data.draw(st.lists(inside | st.sampled_from([-1.0, 1.0]), min_size=size, max_size=size))
    masks = [data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) for _ in range(2)]
    cosines = np.array(values, np.float32).reshape(num_queries, num_rows)
    alike, left_out = (np.array(mask, bool).reshape(num_queries, num_rows) for mask in masks)

    found = count_cosines(torch.from_numpy(cosines), torch.from_numpy(alike), torch.from_numpy(left_out))

    counted = [np.histogram(cosines[pairs & ~left_out], NUM_BINS, (-1, 1))[0] for pairs in (alike, ~alike)]
    np.testing.assert_array_equal(found, counted)
    assert count_cosines(torch.from_numpy(cosines), torch.from_numpy(alike)).sum(1).tolist() == [
        *(alike.sum(), (~alike).sum())
    ]


def test_a_cosine_beyond_the_ends_by_rounding_is_counted_there():
    cosines = torch.tensor([[1.0000001, -1.0000001, 1.0]])
    found = count_cosines(cosines, torch.tensor([[True, True, False]]))
    assert (found.shape, found.dtype) == ((2, NUM_BINS), np.int64)
    assert (found[0, 0], found[0, -1], found[1, -1], found.sum()) == (1, 1, 1, 3)
