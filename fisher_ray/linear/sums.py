"""The mergeable sums that every linear fit starts from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, RequestError
from fisher_ray.linear.columns import Columns

TILE = 1024
"""Columns of one tile of the Gram matrix: its float32 product stays in the processor's cache."""
BLOCK_ROWS = 2048
"""Rows of one float32 product: enough to pay for the float64 sum, few enough to bound rounding and memory."""
SQUARE_ROWS = 64
"""Rows whose squares are summed in float32, before float64 takes over: to 1e-7, and quicker than float64 alone."""
CONSTANT = 1e-10
"""A column whose variance is at most this share of its mean square counts as constant: float32 resolves no more."""
TINY = float(np.finfo(np.float64).tiny)


class GramSum:
    """``Σ x xᵀ``, ``Σ onehot(y) xᵀ`` and class counts over rows of ``F`` columns, float64, mergeable by addition.

    Only the upper triangle of the Gram matrix is kept up; below it stands whatever the tiles on the diagonal left
    there, mostly zeros.

    Attributes:
        gram: ``Σ x xᵀ``, upper triangle, ``(F, F)``.
        cross: ``Σ onehot(y) xᵀ``, ``(C, F)``; its columns' sums are ``Σ x``.
        counts: rows of each class, or their weights, ``(C,)``.
    """

    def __init__(self, gram: np.ndarray, cross: np.ndarray, counts: np.ndarray) -> None:
        """Keep the arrays themselves, without copying; read-only ones can be merged from and fitted, not added to.

        Raises:
            DataError: if shapes do not fit together or a dtype is not float64.
        """
        num_classes, num_columns = cross.shape if cross.ndim == 2 else (-1, -1)
        arrays = (gram, cross, counts)
        fit = gram.shape == (num_columns, num_columns) and counts.shape == (num_classes,)
        if not fit or any(array.dtype != np.float64 for array in arrays):
            given = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
            raise DataError(f"sums of {given} are not float64 gram (F, F), cross (C, F) and counts (C,)")
        self.gram, self.cross, self.counts = arrays

    @classmethod
    def zeros(cls, num_columns: int, num_classes: int) -> GramSum:
        """Start with no rows; pages below the Gram matrix's diagonal take memory only when something is merged in."""
        return cls(np.zeros((num_columns, num_columns)), np.zeros((num_classes, num_columns)), np.zeros(num_classes))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> GramSum:
        """Take back what :meth:`to_arrays` gave, without copying.

        Raises:
            DataError: as the constructor.
        """
        return cls(arrays["gram"], arrays["cross"], arrays["counts"])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays themselves; adding those of several sums element by element merges the sums."""
        return {"gram": self.gram, "cross": self.cross, "counts": self.counts}

    @property
    def num_columns(self) -> int:
        """``F``."""
        return len(self.gram)

    @property
    def num_classes(self) -> int:
        """``C``."""
        return len(self.counts)

    @property
    def num_rows(self) -> float:
        """Rows added so far, or the sum of their weights."""
        return float(self.counts.sum())

    def add(self, x: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows.

        Products are taken in float32 (in float64 for float64 rows), in blocks of :data:`BLOCK_ROWS` rows about the
        block's own mean, which is added back in float64: so columns far from zero lose nothing. How rows are cut into
        calls changes only float32 rounding (1e-6 of the columns' deviations). Calls of at least
        :data:`BLOCK_ROWS` rows, or of multiples of it, are the fastest.

        Args:
            x: ``(B, F)``, float32 or float64, on any device.
            labels: integers in ``[0, C)``, ``(B,)``.
            weights: as how many rows each class's rows count, ``(C,)``, not negative; 1 if left out.

        Raises:
            DataError: if the shapes do not fit, a label is out of range, or a feature is NaN or infinite.
            RequestError: if the sums are read-only.
        """
        self._check_writeable()
        check_rows(x, labels, self.num_columns, self.num_classes)
        for start in range(0, len(x), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            self._add_block(
                x[part], labels[part], None if weights is None else weights[labels[part].to(weights.device)]
            )

    def merge(self, other: GramSum) -> None:
        """Add the rows of ``other``.

        Raises:
            DataError: if ``F`` or ``C`` differ.
            RequestError: if these sums are read-only.
        """
        self._check_writeable()
        if other.cross.shape != self.cross.shape:
            raise DataError(f"sums of {other.cross.shape} (classes, columns) do not merge with {self.cross.shape}")
        for mine, theirs in zip(self.to_arrays().values(), other.to_arrays().values(), strict=True):
            np.add(mine, theirs, out=mine)

    def _check_writeable(self) -> None:
        if not all(array.flags.writeable for array in self.to_arrays().values()):
            raise RequestError("these sums are read-only; start from GramSum.zeros and merge them into it")

    def _add_block(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Add rows ``(B, F)`` of these weights ``(B,)``."""
        onehot = torch.nn.functional.one_hot(labels.long(), self.num_classes).to(x.device, torch.float64)
        if weights is not None:
            onehot *= weights.to(onehot)[:, None]
        cross = torch.cat([onehot.T @ x[:, tile].double() for tile in tiles(self.num_columns)], 1).cpu()
        total = cross.sum(0)
        if not bool(total.isfinite().all()):
            row = int((~x.isfinite()).any(1).nonzero()[0])
            raise DataError(f"a feature of row {row} of these {len(x)} is NaN or infinite: verify the feature store")
        num_rows = len(x) if weights is None else float(onehot.sum())
        mean = (total / max(num_rows, TINY)).to(x.dtype)  # rows that all weigh nothing have no mean, and add nothing
        centred = x - mean.to(x.device)
        self._add_products(centred if weights is None else centred * weights.sqrt().to(x)[:, None])
        self._add_means(mean.double(), total, num_rows)
        self.cross += cross.numpy()
        self.counts += onehot.sum(0).cpu().numpy()

    def _add_products(self, centred: Tensor) -> None:
        for rows, columns in tile_pairs(self.num_columns):
            tile = self.gram[rows, columns]
            product = (centred[:, rows].T @ centred[:, columns]).cpu().numpy()
            if rows == columns:
                # The columns' variances, which scale everything, do not hang on float32 kernels; an overflow stays.
                product, rounded = product.astype(np.float64), product.diagonal()
                parts = [part.square().sum(0) for part in torch.split(centred[:, rows], SQUARE_ROWS)]
                squares = torch.stack(parts).double().sum(0).cpu().numpy()
                np.fill_diagonal(product, np.where(np.isfinite(rounded), squares, rounded))
            np.add(tile, product, out=tile)

    def _add_means(self, mean: Tensor, total: Tensor, num_rows: float) -> None:
        """Add ``m sᵀ + (s − B m) mᵀ``: what ``Σ (x − m)(x − m)ᵀ`` lacks of ``Σ x xᵀ``, for any ``m``."""
        left = torch.stack([mean, total - num_rows * mean], 1)
        right = torch.stack([total, mean])
        gram = torch.from_numpy(self.gram)
        for rows, columns in tile_pairs(self.num_columns):
            gram[rows, columns].addmm_(left[rows], right[:, columns])


def tiles(num_columns: int) -> list[slice]:
    """Cut the columns into tiles of :data:`TILE`."""
    return [slice(start, min(start + TILE, num_columns)) for start in range(0, num_columns, TILE)]


def tile_pairs(num_columns: int) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles on and above the diagonal as (rows, columns)."""
    cuts = tiles(num_columns)
    return ((rows, columns) for i, rows in enumerate(cuts) for columns in cuts[i:])


def check_rows(x: Tensor, labels: Tensor, num_columns: int, num_classes: int) -> None:
    """Check features and labels against ``F`` and ``C``.

    Raises:
        DataError: naming the shape or the label at fault.
    """
    if x.ndim != 2 or x.shape[1] != num_columns or labels.shape != x.shape[:1]:
        raise DataError(f"features {tuple(x.shape)} and labels {tuple(labels.shape)} are not (B, {num_columns}), (B,)")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise DataError(f"label {int(outside[0])} is not in [0, {num_classes})")


def standardise(sums: GramSum, columns: Columns | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardise columns through the sums alone.

    Args:
        sums: of ``F`` columns.
        columns: which of them, and what each is multiplied by afterwards; by default all, as they are.

    Returns:
        The Gram matrix ``Σ x̃ x̃ᵀ``, ``x̃ = s (x − μ) / σ``, upper triangle, ``(F', F')``: its diagonal is the number of
        rows times ``s²``, or 0 for a constant column; ``μ``, ``(F',)``; and ``s / σ``, ``(F',)``, 0 for a constant
        column.

    Raises:
        DataError: if there are no rows, or the sums are not finite.
    """
    num_rows, columns = sums.num_rows, columns or Columns.all(sums.num_columns)
    if num_rows == 0:
        raise DataError("a linear model was asked for on no rows: all were skipped, or the split is empty")
    total, square = sums.cross.sum(0)[columns.index], sums.gram.diagonal()[columns.index] / num_rows
    if not (np.isfinite(total).all() and np.isfinite(square).all()):
        raise DataError("the sums hold NaN or infinity: the features overflow float32 products, scale them")
    mean = total / num_rows
    variance = square - mean**2
    varies = variance > CONSTANT * square
    inverse = np.where(varies, columns.scales / np.sqrt(np.where(varies, variance, 1)), 0.0)
    gram = np.zeros(2 * [len(columns.index)])
    for rows, across in tile_pairs(len(columns.index)):
        tile = gram[rows, across]
        np.multiply(total[rows, None], mean[across], out=tile)
        np.subtract(sums.gram[np.ix_(columns.index[rows], columns.index[across])], tile, out=tile)
        tile *= inverse[rows, None]
        tile *= inverse[across]
    return gram, mean, inverse
