"""The Nyström sketch of a Fisher matrix: one pass over the rows, ``D ℓ`` numbers instead of ``D²``."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import RequestError
from fisher_ray.metric.estimator import Arrays, added, float64_rows, refuse_non_finite
from fisher_ray.metric.symmetric import fix_signs, num_above_noise


class Nystrom:
    """``Y = M Ω`` for a random ``Ω`` ``(D, ℓ)``, float64, mergeable by addition; its estimate is ``Y (ΩᵀY)⁺ Yᵀ``.

    The estimate, ``M̂``, is never above ``M``, and is ``M`` itself if that has rank ``ℓ`` or less. For every rank
    ``r < ℓ − 1``, the error in the trace norm of its ``r`` leading eigenpairs is in expectation over the seed at most
    ``1 + r / (ℓ − r − 1)`` times that of ``M``'s own, the least there is (Tropp, Yurtsever, Udell & Cevher, 2017,
    "Fixed-rank approximation of a positive-semidefinite matrix from streaming data", theorem 4.1).

    Args:
        dim: ``D``.
        size: ``ℓ``, columns of the sketch; more than ``D`` are as good as ``D``.
        seed: of ``Ω``; sketches merge only if they have it in common.

    Raises:
        RequestError: if the size is below 1.
    """

    def __init__(self, dim: int, size: int, seed: int) -> None:
        """See the class."""
        if size < 1:
            raise RequestError(f"a Nyström sketch of {size} columns was asked for: give at least 1")
        self.dim, self.size, self.seed = dim, min(size, dim), seed
        self._trace = 0.0

    @functools.cached_property
    def _test(self) -> Tensor:
        return random_orthonormal(self.dim, self.size, self.seed)

    @functools.cached_property
    def _sketch(self) -> Tensor:
        return torch.zeros(self.dim, self.size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows ``(K, D)``; the sketch lives on their device.

        Raises:
            RequestError: if ``D`` is not the estimator's.
        """
        rows = float64_rows(rows, self.dim)
        self._test, self._sketch = self._test.to(rows.device), self._sketch.to(rows.device)
        self._sketch.addmm_(rows.T, rows @ self._test)
        self._trace += float(rows.square().sum())

    def to_arrays(self) -> Arrays:
        """Return ``sketch`` ``(D, ℓ)``, ``Y``, and ``trace`` ``(1,)``, that of ``M`` itself."""
        return {"sketch": self._sketch.cpu().numpy().copy(), "trace": np.array([self._trace])}

    def merge(self, left: Arrays, right: Arrays) -> Arrays:
        """Return the arrays of the rows of both."""
        return added(left, right)

    def trace(self, arrays: Arrays) -> float:
        """Return ``tr M``, not the estimate's."""
        return float(arrays["trace"][0])

    def eigendecompose(self, arrays: Arrays, rank: int) -> tuple[Tensor, Tensor]:
        """Return leading eigenvalues ``(r,)`` of the estimate, descending, and orthonormal columns ``(D, r)``, float64.

        There are at most ``ℓ``, and none below the sketch's rounding, taken as ``D ε`` times the first or more.

        Raises:
            DataError: if the sums are not finite.
        """
        refuse_non_finite(arrays)
        sketch = torch.tensor(arrays["sketch"])
        scale = sketch.abs().max()
        if scale == 0:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(self.dim, 0, dtype=torch.float64)
        values, vectors = _eigendecompose(sketch / scale, self._test.cpu())
        keep = min(rank, num_above_noise(values, self.dim))
        return values[:keep] * scale, fix_signs(vectors[:, :keep]).contiguous()

    def quadratic_forms(self, arrays: Arrays, vectors: Tensor) -> Tensor:
        """Return ``v_iᵀ M̂ v_i`` of columns ``(D, R)``, ``(R,)``, float64.

        From the eigendecomposition, so that none is negative.

        Raises:
            DataError: if the sums are not finite.
        """
        eigvals, eigvecs = self.eigendecompose(arrays, self.size)
        return eigvals @ (eigvecs.T @ vectors).square()


@functools.lru_cache(maxsize=4)  # to make one takes longer than a batch on a GPU, and every unit needs the same
def random_orthonormal(dim: int, size: int, seed: int) -> Tensor:
    """Return ``size ≤ dim`` orthonormal columns ``(dim, size)``, uniformly distributed, float64. Not to be written to.

    Drawn and orthonormalised on the CPU, with the signs that make the factorisation unique (Mezzadri, 2007): any
    machine comes to the same columns, but for rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    columns, triangle = torch.linalg.qr(torch.randn(dim, size, generator=generator, dtype=torch.float64))
    unique: Tensor = columns * triangle.diagonal().sign()
    return unique


def _eigendecompose(sketch: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecompose ``Y (ΩᵀY)⁺ Yᵀ``: eigenvalues ``(ℓ,)``, descending and non-negative, and columns ``(D, ℓ)``.

    Algorithm 3 of Tropp et al. (2017): ``M + νI``, whose sketch is ``Y + νΩ``, can be factorised where ``M`` cannot.
    ``ν``, the rounding, is theirs, ``√D ε ‖Y‖``, or more where many sums have left more of it: ``ΩᵀY`` is symmetric but
    for that, and positive semidefinite. What comes out below ``ν`` is made zero.
    """
    core = test.T @ sketch
    rounding = math.sqrt(len(sketch)) * torch.finfo(sketch.dtype).eps * float(torch.linalg.matrix_norm(sketch, ord=2))
    rounding = max(rounding, float(torch.linalg.matrix_norm(core - core.T)))
    while True:
        shifted = sketch + rounding * test
        core = test.T @ shifted
        triangle, info = torch.linalg.cholesky_ex((core + core.T) / 2, upper=True)
        if not int(info):
            break
        rounding *= 10
    root = torch.linalg.solve_triangular(triangle, shifted, upper=True, left=False)
    vectors, roots, _ = torch.linalg.svd(root, full_matrices=False)
    values = roots.square() - rounding
    return values.where(values > rounding, 0.0), vectors
