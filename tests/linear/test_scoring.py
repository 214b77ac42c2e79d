import pytest
import torch
from scipy.stats import binomtest

from fisher_ray.errors import DataError
from fisher_ray.linear import accuracy, best_penalty, wilson_interval


def test_accuracy_is_the_share_of_rows_whose_largest_score_is_their_labels():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [1.0, 1.0]])
    assert accuracy(scores, torch.tensor([1, 1, 1, 0])) == 0.75


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(2, 2), torch.tensor([0])),
        (torch.full((1, 2), float("nan")), torch.tensor([0])),
    ],
)
def test_scores_that_cannot_be_counted_are_refused(scores, labels):
    with pytest.raises(DataError):
        accuracy(scores, labels)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (7, 10), (693, 1000), (1, 1)])
def test_wilsons_interval_is_scipys(correct, n):
    expected = binomtest(correct, n).proportion_ci(0.95, "wilson")
    assert wilson_interval(correct, n, z=1.959963984540054) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_what_is_not_a_share_has_no_interval(correct, n):
    with pytest.raises(DataError, match="is not a share"):
        wilson_interval(correct, n)


def test_the_most_accurate_penalty_is_chosen_and_of_equals_the_largest():
    labels = torch.tensor([0, 1, 1])
    right, one_wrong = torch.eye(2)[labels], torch.eye(2)[torch.tensor([0, 1, 0])]

    assert best_penalty([0.1, 10.0, 1.0], [right, one_wrong, right], labels) == (2, [1.0, pytest.approx(2 / 3), 1.0])
    assert best_penalty([3.0, 1.0], [right, right], labels)[0] == 0
