"""Ranges of gradient coordinates, from dense rows and from rows with kept entries alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, ModelError, RequestError
from fisher_ray.metric.estimator import Arrays

_NAMED = 5
"""Coordinates that a message names."""


class RangeSum:
    """Each coordinate's smallest and largest entry, and how many there were, from rows in any order and any parts.

    A sparse row counts where it has an entry: what it leaves out is no zero, so a coordinate whose kept entries are all
    positive has a positive minimum. A dense row counts everywhere, its zeros too. NaN stays NaN, in every merge.

    Args:
        dim: ``D``.
    """

    def __init__(self, dim: int) -> None:
        """See the class."""
        self._minimum = torch.full((dim,), math.inf, dtype=torch.float64)
        self._maximum = torch.full((dim,), -math.inf, dtype=torch.float64)
        self._counts = torch.zeros(dim, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows ``(..., D)``, of any float dtype; what was found lives on their device.

        Raises:
            ModelError: if ``D`` is another.
        """
        check_width(rows, len(self._counts))
        if rows.numel():
            self._move(rows.device)
            flat = rows.reshape(-1, len(self._counts))
            self._minimum = torch.minimum(self._minimum, flat.amin(0).double())
            self._maximum = torch.maximum(self._maximum, flat.amax(0).double())
            self._counts += len(flat)

    def add_sparse(self, values: Tensor, coordinates: Tensor) -> None:
        """Add the kept entries of rows: ``values`` ``(..., W)`` at integer ``coordinates`` ``(..., W)``.

        Raises:
            ModelError: if a coordinate is not in ``[0, D)``.
            RequestError: if the shapes differ.
        """
        check_sparse(values, coordinates, len(self._counts))
        self._move(values.device)
        places, entries = coordinates.flatten().long(), values.flatten().double()
        self._minimum.scatter_reduce_(0, places, entries, "amin")
        self._maximum.scatter_reduce_(0, places, entries, "amax")
        self._counts += torch.bincount(places, minlength=len(self._counts))

    def _move(self, device: torch.device) -> None:
        self._minimum, self._maximum, self._counts = (
            found.to(device) for found in (self._minimum, self._maximum, self._counts)
        )

    def to_arrays(self) -> Arrays:
        """Return ``minimum``, ``maximum`` and ``counts``, each ``(D,)``, float64; of no entries ``∞``, ``−∞`` and 0."""
        found = {"minimum": self._minimum, "maximum": self._maximum, "counts": self._counts}
        return {name: (value + 0.0).cpu().numpy() for name, value in found.items()}  # -0.0 or 0.0 was first by chance

    @staticmethod
    def merge(left: Arrays, right: Arrays) -> Arrays:
        """Return the arrays of the rows of both, to the same bits in any order; neither argument is changed."""
        return {
            "minimum": np.minimum(left["minimum"], right["minimum"]),
            "maximum": np.maximum(left["maximum"], right["maximum"]),
            "counts": left["counts"] + right["counts"],
        }


def check_width(rows: Tensor, dim: int) -> None:
    """Check that dense rows are ``(..., D)``.

    Raises:
        ModelError: naming both numbers.
    """
    if not rows.ndim or rows.shape[-1] != dim:
        raise ModelError(
            f"rows of shape {tuple(rows.shape)} do not have {dim} coordinates: "
            "they come from another network or another compression"
        )


def check_sparse(values: Tensor, coordinates: Tensor, dim: int) -> None:
    """Check kept entries and their places in ``[0, D)``.

    Raises:
        ModelError: naming a coordinate outside.
        RequestError: if the shapes differ.
    """
    if values.shape != coordinates.shape:
        raise RequestError(f"values {tuple(values.shape)} and coordinates {tuple(coordinates.shape)} differ in shape")
    outside = coordinates[(coordinates < 0) | (coordinates >= dim)]
    if len(outside):
        raise ModelError(
            f"coordinate {int(outside[0])} is not in [0, {dim}): "
            "the rows come from another network or another compression"
        )


def check_finite(values: Tensor, what: str) -> None:
    """Check one number for each coordinate, ``(D,)``.

    Raises:
        DataError: naming ``what`` and the first coordinates that are NaN or infinite.
    """
    broken = (~values.isfinite()).nonzero()[:, 0].tolist()
    if broken:
        named = ", ".join(map(str, broken[:_NAMED])) + (", ..." if len(broken) > _NAMED else "")
        raise DataError(
            f"{what} of {len(broken)} of {len(values)} coordinates is NaN or infinite ({named}): "
            "look for extreme inputs or weights"
        )
