"""Rows to sum, and estimators fed with them in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

import numpy as np
import torch
from torch import Tensor

from fisher_ray.metric.estimator import Arrays, Estimator


def random_rows(num_rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integer_rows(num_rows: int, dim: int, seed: int = 0) -> Tensor:
    """Rows of which sums of products, in any order, are exact."""
    return torch.randint(-9, 10, (num_rows, dim), generator=torch.Generator().manual_seed(seed)).double()


def summed(estimator: Estimator, *parts: Tensor) -> Arrays:
    """Sum rows to arrays, read-only as a store of objects gives them."""
    for part in parts:
        estimator.add(part)
    return read_only(estimator.to_arrays())


def read_only(arrays: Arrays) -> Arrays:
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def merged_in_any_order(make: Callable[[], Estimator], rows: Tensor, cuts: Sequence[int], order: Random) -> Arrays:
    """Sum parts of the rows apart, and merge any two until one is left."""
    edges = sorted([0, *cuts, len(rows)])
    sums = [summed(make(), rows[a:b]) for a, b in pairwise(edges)]
    while len(sums) > 1:
        order.shuffle(sums)
        left, right = sums.pop(), sums.pop()
        sums.append(read_only(make().merge(left, right)))
    return sums[0]


def assert_equal(actual: Arrays, expected: Arrays) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (np.float64, array.shape)
        np.testing.assert_array_equal(actual[name], array)


def assert_close(actual: Tensor, expected: np.ndarray | Tensor, atol: float) -> None:
    expected = torch.tensor(expected) if isinstance(expected, np.ndarray) else expected
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
