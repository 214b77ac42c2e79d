"""The sparse metric: the coordinates that tell classes apart, and the similarity of gradients in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisher_ray.errors import DataError, RequestError, StoreError
from fisher_ray.metric.class_gap import class_gaps
from fisher_ray.metric.estimator import Arrays
from fisher_ray.metric.normalisation import Normalisation
from fisher_ray.metric.ranges import check_sparse, check_width
from fisher_ray.store import load_arrays, save_arrays

SCHEMA = 1
OWN_ATTRIBUTES = ("kind", "schema", "dim", "blocks")
"""What :meth:`SparseMetric.save` keeps beside the metric's attributes; its values win over the same names there."""
_PREFIX = "normalisation-"


@dataclass(frozen=True, eq=False)
class SparseMetric:
    """``k(x, x') = Σ_j w_j n_j(x) n_j(x')`` over ``R`` chosen coordinates of a normalised gradient ``n``.

    It is the sparse metric of Rácz & Daróczy (*Gradient representations in ReLU networks as similarity functions*,
    2021). Being diagonal and positive, it is a dot product of features, ``√w_j n_j``.

    Attributes:
        dim: ``D``: coordinates of a gradient.
        coordinates: the chosen ones, ascending, ``(R,)``, int64.
        weights: ``w``, positive, ``(R,)``, float64.
        normalisation: makes ``n`` of a gradient, all its ``D`` coordinates together.
        blocks: by name, the coordinates ``[start, stop)`` that :meth:`kernels_by_block` takes together, such as a
            layer's; they may overlap, as adjacent layers joined do, and need not cover all.
        attributes: fingerprints and settings it was fitted with.

    Raises:
        RequestError: if these do not fit together.
    """

    dim: int
    coordinates: Tensor
    weights: Tensor
    normalisation: Normalisation
    blocks: Mapping[str, slice] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the attributes once."""
        inside = (self.coordinates >= 0) & (self.coordinates < self.dim)
        if not (len(inside) and bool(inside.all()) and bool((self.coordinates.diff() > 0).all())):
            raise RequestError(f"the chosen coordinates are none, or not ascending in [0, {self.dim})")
        if self.weights.shape != self.coordinates.shape or not bool((self.weights > 0).all()):
            raise RequestError(f"{len(self.coordinates)} chosen coordinates need as many positive weights")
        if self.normalisation.minimum is not None and len(self.normalisation.minimum) != self.dim:
            raise RequestError(f"the normalisation has {len(self.normalisation.minimum)} coordinates, not {self.dim}")
        for name, block in self.blocks.items():
            if block.step not in (None, 1) or not 0 <= (block.start or 0) < (block.stop or 0) <= self.dim:
                raise RequestError(f"block {name!r}, {block}, is not slice(start, stop) inside [0, {self.dim})")

    @classmethod
    def from_sums(
        cls,
        sums: Arrays,
        normalisation: Normalisation,
        *,
        keep: int | None = None,
        weighted: bool = True,
        blocks: Mapping[str, slice] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> SparseMetric:
        """Choose the coordinates whose :func:`fisher_ray.metric.class_gaps` is positive.

        Args:
            sums: merged :class:`fisher_ray.metric.ClassGapSum` arrays of rows that ``normalisation`` made.
            normalisation: as the attribute.
            keep: how many at most, those with the largest gaps (the first of equals); all by default. A gap that is
                not positive is never chosen, or similarity would fall where two gradients agree.
            weighted: whether a coordinate's weight is its gap; otherwise it is one.
            blocks: as the attribute.
            attributes: as the attribute.

        Raises:
            DataError: if no gap is positive, or as :func:`fisher_ray.metric.class_gaps` does.
            RequestError: if ``keep`` is below one, or the parts do not fit together.
        """
        if keep is not None and keep < 1:
            raise RequestError(f"keep {keep} leaves no coordinate: give at least 1, or None for all positive gaps")
        gaps = class_gaps(sums)
        order = torch.argsort(gaps, descending=True, stable=True)[:keep]
        chosen = order[gaps[order] > 0].sort().values
        if not len(chosen):
            raise DataError("rows of one class are nowhere more alike than others: train the network for longer")
        weights = gaps[chosen] if weighted else torch.ones(len(chosen), dtype=torch.float64)
        return cls(len(gaps), chosen, weights, normalisation, blocks or {}, attributes or {})

    def transform(self, rows: Tensor) -> Tensor:
        """Turn gradients ``(..., D)``, not yet normalised, into features ``(..., R)``, in their dtype.

        Raises:
            ModelError: if ``D`` is not the metric's.
        """
        check_width(rows, self.dim)
        return self._weigh(self.normalisation.apply(rows)[..., self.coordinates.to(rows.device)])

    def transform_sparse(self, values: Tensor, coordinates: Tensor) -> Tensor:
        """Turn kept entries ``(..., W)``, not yet normalised, at ``coordinates`` ``(..., W)`` into ``(..., R)``.

        Raises:
            ModelError: if a coordinate is not in ``[0, D)``.
            RequestError: if the shapes differ.
        """
        check_sparse(values, coordinates, self.dim)
        chosen, wanted = self.coordinates.to(values.device), coordinates.long()
        places = torch.searchsorted(chosen, wanted).clamp(max=len(chosen) - 1)
        entries = self.normalisation.apply_sparse(values, coordinates).masked_fill(chosen[places] != wanted, 0)
        features = entries.new_zeros(*entries.shape[:-1], len(chosen))
        return self._weigh(features.scatter_add(-1, places, entries))

    def _weigh(self, chosen: Tensor) -> Tensor:
        return chosen * self.weights.sqrt().to(chosen)

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarity of gradients that are not yet normalised: ``(..., M, D)``, ``(..., N, D)`` -> ``(..., M, N)``."""
        return self.transform(a) @ self.transform(b).transpose(-1, -2)

    def kernels_by_block(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Return by block the part of :meth:`kernel` that the block's coordinates have, zero if none is chosen.

        Raises:
            RequestError: if the metric has no blocks.
        """
        if not self.blocks:
            raise RequestError("the metric has no blocks: name some when it is made, or use kernel")
        first, second = self.transform(a), self.transform(b)
        kernels = {}
        for name, block in self.blocks.items():
            ends = torch.tensor([block.start or 0, block.stop], device=self.coordinates.device)
            start, stop = torch.searchsorted(self.coordinates, ends).tolist()
            kernels[name] = first[..., start:stop] @ second[..., start:stop].transpose(-1, -2)
        return kernels

    def block_kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum :meth:`kernels_by_block`: the metric with those blocks on its diagonal, ``(..., M, N)``.

        Blocks that cover every chosen coordinate once give :meth:`kernel` itself. A product of the blocks' kernels
        would be no metric of this form.
        """
        return torch.stack(list(self.kernels_by_block(a, b).values())).sum(0)

    def save(self, url: str) -> None:
        """Write a sealed Zarr group with checksums to ``url`` (a local path or ``s3://``)."""
        arrays = {"coordinates": self.coordinates.cpu().numpy(), "weights": self.weights.cpu().numpy()}
        arrays |= {_PREFIX + name: value for name, value in self.normalisation.to_arrays().items()}
        blocks = [[name, block.start or 0, block.stop] for name, block in self.blocks.items()]  # in order
        own = {"kind": "sparse metric", "schema": SCHEMA, "dim": self.dim, "blocks": blocks}
        save_arrays(url, arrays, {**self.attributes, **own})

    @classmethod
    def load(cls, url: str) -> SparseMetric:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: if it is unsealed, damaged, or not a sparse metric of this schema.
        """
        arrays, attributes = load_arrays(url)
        if attributes.get("kind") != "sparse metric" or attributes.get("schema") != SCHEMA:
            raise StoreError(f"{url} is not a sparse metric of schema {SCHEMA}")
        parts = {name.removeprefix(_PREFIX): value for name, value in arrays.items() if name.startswith(_PREFIX)}
        coordinates, weights = torch.tensor(arrays["coordinates"]), torch.tensor(arrays["weights"])
        blocks = {name: slice(start, stop) for name, start, stop in attributes["blocks"]}
        rest = {key: value for key, value in attributes.items() if key not in OWN_ATTRIBUTES}
        return cls(attributes["dim"], coordinates, weights, Normalisation.from_arrays(parts), blocks, rest)
