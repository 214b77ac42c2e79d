"""Gradients normalised by the ranges of their coordinates, as Daróczy et al. (2018) do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError, RequestError
from fisher_ray.metric.estimator import Arrays
from fisher_ray.metric.ranges import check_finite, check_sparse, check_width


@dataclass(frozen=True, eq=False)
class Normalisation:
    """``n_j = (g_j − min_j) / scale_j``, then ``sign(n) |n|^power``, then ``n / ‖n‖``, each where it is asked for.

    The first two are the protocol of Daróczy et al. (2018), with the power ½; signed root and length one together are
    those of Fisher vectors (Perronnin, Sánchez & Mensink, 2010). Without arguments it is the identity.

    Rows that the ranges were not fitted on may leave them: ``n`` is then below 0 or above 1, and stays so but for
    ``clip``. Everything is computed in float64 and returned in the rows' dtype. NaN stays NaN.

    Attributes:
        minimum: ``min``, ``(D,)``, float64, or none.
        scale: positive, ``(D,)``, float64; none exactly where ``minimum`` is.
        power: positive, or none.
        l2: whether a row is divided by its Euclidean length, over all its entries; a row of zeros stays as it is.
        clip: whether ``n`` is cut to ``[0, 1]`` before the power.

    Raises:
        RequestError: if these do not fit together.
    """

    minimum: Tensor | None = None
    scale: Tensor | None = None
    power: float | None = None
    l2: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        """Check the attributes once."""
        if self.minimum is None or self.scale is None:
            if self.minimum is not self.scale or self.clip:
                raise RequestError("minimum, scale and clip go together: give RangeSum arrays to from_ranges")
        elif self.minimum.ndim != 1 or self.minimum.shape != self.scale.shape or not bool((self.scale > 0).all()):
            shapes = f"{tuple(self.minimum.shape)} and {tuple(self.scale.shape)}"
            raise RequestError(f"a minimum and a scale of {shapes} are not two vectors (D,), the second positive")
        if self.power is not None and not 0 < self.power < math.inf:
            raise RequestError(f"the power {self.power} of a normalisation is not a positive number")

    @classmethod
    def from_ranges(
        cls, ranges: Arrays, power: float | None = 0.5, l2: bool = False, clip: bool = False
    ) -> Normalisation:
        """Scale every coordinate's range to ``[0, 1]``.

        A range of zero counts as one, as in the protocol; a coordinate without entries has minimum zero and range one.

        Args:
            ranges: merged :class:`RangeSum` arrays.
            power: as the attribute.
            l2: as the attribute.
            clip: as the attribute.

        Raises:
            DataError: if there was no entry at all, or a coordinate's range is not finite; the message names it.
            RequestError: if the power is not positive.
        """
        seen = torch.tensor(ranges["counts"]) > 0
        if not bool(seen.any()):
            raise DataError("the ranges have no entries: all rows were skipped, or there are none")
        minimum = torch.tensor(ranges["minimum"]).masked_fill(~seen, 0)
        scale = torch.tensor(ranges["maximum"]).masked_fill(~seen, 0) - minimum
        check_finite(scale, "the range")
        return cls(minimum, scale.masked_fill(scale == 0, 1), power, l2, clip)

    def apply(self, rows: Tensor) -> Tensor:
        """Normalise dense rows ``(..., D)``, none of whose entries was left out.

        Raises:
            ModelError: if ``D`` is another than that of the ranges.
        """
        if self.minimum is not None:
            check_width(rows, len(self.minimum))
        return self._normalise(rows, self.minimum, self.scale)

    def apply_sparse(self, values: Tensor, coordinates: Tensor) -> Tensor:
        """Normalise kept entries ``(..., W)`` at integer ``coordinates`` ``(..., W)``, all different in a row.

        What was left out stays zero, and counts as zero in the length.

        Raises:
            ModelError: if a coordinate is none of the ranges'.
            RequestError: if the shapes differ.
        """
        if self.minimum is None or self.scale is None:
            return self._normalise(values, None, None)
        check_sparse(values, coordinates, len(self.minimum))
        places = coordinates.long()
        return self._normalise(values, *(each.to(values.device)[places] for each in (self.minimum, self.scale)))

    def _normalise(self, rows: Tensor, minimum: Tensor | None, scale: Tensor | None) -> Tensor:
        n = rows.double()  # in float32 a length would vanish with entries below 1e-23
        if minimum is not None and scale is not None:
            n = (n - minimum.to(n.device)) / scale.to(n.device)
        if self.clip:
            n = n.clamp(0, 1)
        if self.power is not None:
            n = n.abs().pow(self.power).copysign(n)
        if self.l2:
            length = torch.linalg.vector_norm(n, dim=-1, keepdim=True)
            n = n / length.masked_fill(length == 0, 1)
        return n.to(rows.dtype)

    def to_arrays(self) -> Arrays:
        """Return the attributes by name, those that are none left out: vectors ``(D,)``, and numbers ``()``."""
        arrays = {"l2": np.array(self.l2), "clip": np.array(self.clip)}
        if self.power is not None:
            arrays["power"] = np.array(float(self.power))
        if self.minimum is not None and self.scale is not None:
            arrays |= {"minimum": self.minimum.cpu().numpy(), "scale": self.scale.cpu().numpy()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Normalisation:
        """Undo :meth:`to_arrays`; the arrays are copied."""
        minimum, scale = (torch.tensor(arrays[name]) if name in arrays else None for name in ("minimum", "scale"))
        power = float(arrays["power"]) if "power" in arrays else None
        return cls(minimum, scale, power, bool(arrays["l2"]), bool(arrays["clip"]))
