import numpy as np
import pytest
import torch

from fisher_ray.errors import RequestError
from fisher_ray.linear import feature_columns, grid

EIGVALS = torch.tensor([8.0, 2.0, 0.5, 4.0, 1.0], dtype=torch.float64)  # two layers with a spectrum each
MEAN = torch.tensor([3.5, 3.5, 3.5, 2.5, 2.5], dtype=torch.float64)


def test_the_leading_directions_of_every_score_are_kept_and_all_of_the_hidden_layer():
    columns = feature_columns(EIGVALS, 2, 3, rank=3, relative_damping=None, mean=MEAN)
    assert columns.index.tolist() == [0, 1, 3, 5, 6, 8, 10, 11, 12]
    assert (columns.scales == 1).all()
    assert columns.num_columns == 13


def test_a_damping_scales_columns_as_the_metric_of_that_damping_would():
    columns = feature_columns(EIGVALS, 2, 1, rank=None, relative_damping=0.5, mean=MEAN)
    expected = (EIGVALS / (EIGVALS + 0.5 * MEAN)).sqrt().numpy()
    np.testing.assert_allclose(columns.scales, [*expected, *expected, 1.0])


def test_without_damping_every_direction_counts_the_same():
    columns = feature_columns(EIGVALS, 1, 0, rank=None, relative_damping=0.0, mean=MEAN)
    np.testing.assert_allclose(columns.scales, 1.0)


def test_a_direction_without_any_eigenvalue_keeps_a_positive_scale():
    columns = feature_columns(torch.tensor([1.0, 0.0]), 1, 0, rank=None, relative_damping=0.1, mean=torch.ones(2))
    assert 0 < columns.scales[1] < 1e-5


def test_a_rank_that_the_metric_does_not_have_is_refused():
    with pytest.raises(RequestError, match=r"linear\.ranks has 6, and the metric has rank 5"):
        feature_columns(EIGVALS, 2, 3, rank=6, relative_damping=None, mean=MEAN)


def test_the_grid_has_every_pair():
    assert grid(None, [None, 0.1]) == [(None, None), (None, 0.1)]
    assert grid([2, 3], [None]) == [(2, None), (3, None)]
