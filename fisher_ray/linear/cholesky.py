"""Cholesky factors of regularised Gram matrices, in the memory of these."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError


def factorise(gram: np.ndarray, penalty: float, num_rows: float) -> Tensor:
    """Replace ``gram`` (upper triangle) by the Cholesky factor of ``gram + penalty · n · I``.

    Returns:
        The lower factor ``L``, float64 ``(F, F)``, in the memory of ``gram``.

    Raises:
        DataError: if the matrix is not positive definite.
    """
    matrix = torch.from_numpy(gram).mT  # column-major, as LAPACK has it: so nothing is copied
    matrix.diagonal().add_(penalty * num_rows)
    info = torch.zeros((), dtype=torch.int32)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if int(info):
        raise DataError(
            f"with penalty {penalty} the standardised Gram matrix of {len(gram)} columns and {num_rows:g} rows is not "
            "positive definite: columns are collinear. Raise linear.penalties."
        )
    return matrix


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solve ``factor · X = right`` for a triangular factor ``(F, F)``, column-major if lower, row-major if upper."""
    solved: Tensor = torch.linalg.solve_triangular(factor, right, upper=factor.stride(0) != 1)
    return solved
