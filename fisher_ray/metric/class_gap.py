"""How much more alike rows of one class are than rows of two, coordinate by coordinate, from sums that merge."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_ray.errors import DataError, RequestError
from fisher_ray.metric.estimator import Arrays
from fisher_ray.metric.ranges import check_finite, check_sparse, check_width


class ClassGapSum:
    """``Σ n_j`` of every class, ``Σ n_j²`` and the rows of every class, float64, mergeable by addition.

    They are all that :func:`class_gaps` needs of the rows, so no pair of rows is ever formed.

    Args:
        dim: ``D``.
        num_classes: ``C``.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        """See the class."""
        self._sums = torch.zeros(num_classes, dim, dtype=torch.float64)
        self._squares = torch.zeros(dim, dtype=torch.float64)
        self._counts = torch.zeros(num_classes, dtype=torch.float64)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Add rows ``(K, D)``, normalised, of any float dtype, of the classes ``labels`` ``(K,)``.

        Raises:
            DataError: if a label is not in ``[0, C)``.
            ModelError: if ``D`` is another.
            RequestError: if there is not one label for each row.
        """
        check_width(rows, len(self._squares))
        self._count(rows, labels)
        exact = rows.double()
        for label in sorted(set(labels.tolist())):  # in order: index_add_ would add in any order on a GPU
            self._sums[label] += exact[labels.to(rows.device) == label].sum(0)
        self._squares += exact.square().sum(0)

    def add_sparse(self, values: Tensor, coordinates: Tensor, labels: Tensor) -> None:
        """Add rows of which all but some entries are zero: ``values`` and ``coordinates`` ``(K, W)``.

        Raises:
            DataError: if a label is not in ``[0, C)``.
            ModelError: if a coordinate is not in ``[0, D)``.
            RequestError: if the shapes do not fit.
        """
        check_sparse(values, coordinates, len(self._squares))
        self._count(values, labels)
        for row, places, label in zip(values.double(), coordinates.long(), labels.tolist(), strict=True):
            self._sums[label].index_add_(0, places, row)
            self._squares.index_add_(0, places, row.square())

    def _count(self, rows: Tensor, labels: Tensor) -> None:
        if rows.ndim != 2 or labels.shape != rows.shape[:1]:
            raise RequestError(f"rows {tuple(rows.shape)} and labels {tuple(labels.shape)} are not (K, ...) and (K,)")
        outside = labels[(labels < 0) | (labels >= len(self._counts))]
        if len(outside):
            raise DataError(f"label {int(outside[0])} is not in [0, {len(self._counts)})")
        self._counts += torch.bincount(labels.cpu().long(), minlength=len(self._counts))
        self._sums, self._squares = self._sums.to(rows.device), self._squares.to(rows.device)

    def to_arrays(self) -> Arrays:
        """Return ``sums`` ``(C, D)``, ``squares`` ``(D,)`` and ``counts`` ``(C,)``, copied."""
        found = {"sums": self._sums, "squares": self._squares, "counts": self._counts}
        return {name: value.clone().cpu().numpy() for name, value in found.items()}

    @staticmethod
    def merge(left: Arrays, right: Arrays) -> Arrays:
        """Return the arrays of the rows of both; neither argument is changed."""
        return {name: left[name] + right[name] for name in ("sums", "squares", "counts")}


def class_gaps(sums: Arrays) -> Tensor:
    """Return by how much the products of two rows of one class exceed those of rows of two classes.

    ``gap_j`` is the mean of ``n_j(x) n_j(x')`` over the unordered pairs ``x ≠ x'`` of one class, all classes together,
    minus its mean over the pairs of different classes (Rácz & Daróczy, *Gradient representations in ReLU networks as
    similarity functions*, 2021). With ``S_c = Σ n_j`` of class c and ``Q = Σ n_j²`` the sums of products are
    ``(Σ_c S_c² − Q) / 2`` and ``Σ_{c<c'} S_c S_c'``.

    Two means that agree to rounding, ``N ε`` of the larger one, have a gap of zero: so a coordinate that is the same in
    all rows has none.

    Args:
        sums: merged :class:`ClassGapSum` arrays.

    Returns:
        ``(D,)``, float64, in the unit of a product.

    Raises:
        DataError: if there is no pair of one class or none of two, or a sum is not finite; the message says where.
    """
    per_class, squares, counts = (torch.tensor(sums[name]) for name in ("sums", "squares", "counts"))
    num_rows = int(counts.sum())
    num_within = float((counts * (counts - 1)).sum()) / 2
    num_between = num_rows * (num_rows - 1) / 2 - num_within
    if not num_within:
        raise DataError(f"no two of {num_rows} rows are of one class: a gap needs such pairs, give more rows")
    if not num_between:
        raise DataError(f"all {num_rows} rows are of one class: a gap needs pairs of two, give rows of other classes")
    check_finite(squares, "the sum")
    within = (per_class.square().sum(0) - squares) / 2 / num_within
    before = per_class.cumsum(0) - per_class  # of the classes before each: no difference of large squares
    between = (per_class * before).sum(0) / num_between
    rounding = num_rows * torch.finfo(torch.float64).eps * torch.maximum(within.abs(), between.abs())
    gap = within - between
    return gap.masked_fill(gap.abs() <= rounding, 0)
