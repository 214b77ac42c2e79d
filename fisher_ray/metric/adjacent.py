"""The Fisher of neighbouring layers: block tridiagonal, and positive semi-definite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_ray.metric.estimator import Arrays
from fisher_ray.metric.exact import Exact


class Adjacent(Exact):
    """The blocks of each layer and of its neighbours, the latter tapered so that the matrix has no negative eigenvalue.

    Cutting a positive semi-definite matrix to its block tridiagonal part can make it indefinite. Multiplied entry by
    entry with a tapering matrix that is itself positive semi-definite, it stays so (Schur's product theorem; covariance
    tapering: Furrer, Genton & Nychka, 2006). The tridiagonal taper of ``L`` layers with ones on its diagonal and ``t``
    beside it has the smallest eigenvalue ``1 − 2 t cos(π / (L + 1))``, so the largest ``t`` allowed is
    ``1 / (2 cos(π / (L + 1)))``: 1 for two layers, which are then kept whole, ``0.71`` for three, towards ½ for many.

    Args:
        dims: coordinates of each layer, in the network's order.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        """See the class."""
        edges = [sum(dims[:number]) for number in range(len(dims) + 1)]
        ends = [*edges[2:], edges[-1]]
        super().__init__(edges[-1], list(zip(edges[:-1], edges[1:], ends, strict=True)))
        self.taper = taper(len(dims))
        self._edges = edges

    def dense(self, arrays: Arrays) -> Tensor:
        """Return the tapered matrix, ``(D, D)``, float64."""
        matrix = super().dense(arrays)
        layers = torch.bucketize(torch.arange(self.dim), torch.tensor(self._edges[1:]), right=True)
        matrix[layers[:, None] != layers] *= self.taper
        return matrix


def taper(num_layers: int) -> float:
    """Return the factor of neighbours' products, see :class:`Adjacent`."""
    return 1.0 if num_layers < 2 else 1 / (2 * math.cos(math.pi / (num_layers + 1)))
