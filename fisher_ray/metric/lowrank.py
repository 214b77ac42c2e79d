"""The low-rank Fisher metric: what maps compressed scores to features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import ModelError, StoreError
from fisher_ray.records import LayerBasis
from fisher_ray.store import load_arrays, save_arrays

SCHEMA = 1
OWN_ATTRIBUTES = ("kind", "schema", "blocks", "damping")
"""What :meth:`LowRankMetric.save` keeps beside the metric's attributes; its values win over the same names there."""


@dataclass(frozen=True, eq=False)
class LowRankMetric:
    """``F ≈ U Λ Uᵀ`` in the ``D`` compressed coordinates, with damping ``δ``.

    Attributes:
        bases: the compression, by block, in the order of the coordinates.
        eigvals: ``Λ``, descending, non-negative, ``(R,)``, float64.
        eigvecs: orthonormal ``U``, ``(D, R)``, float64.
        damping: ``δ``, in the eigenvalues' unit.
        attributes: fingerprints and settings it was fitted with.
    """

    bases: dict[str, LayerBasis]
    eigvals: Tensor
    eigvecs: Tensor
    damping: float
    attributes: dict[str, Any]
    _whitenings: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[type[LowRankMetric], tuple[Any, ...]]:
        """Pickle without the whitening matrices made so far."""
        return type(self), (self.bases, self.eigvals, self.eigvecs, self.damping, self.attributes)

    @property
    def dim(self) -> int:
        """``D``."""
        return len(self.eigvecs)

    @property
    def rank(self) -> int:
        """``R``."""
        return len(self.eigvals)

    @property
    def whitening(self) -> Tensor:
        """``U (Λ + δI)^(−½)``, ``(D, R)``, float64."""
        return self.eigvecs * (self.eigvals + self.damping).rsqrt()

    @property
    def feature_rms(self) -> float:
        """Root mean square of a feature summed over classes, as the metric expects it: at most 1."""
        return float((self.eigvals / (self.eigvals + self.damping)).mean().sqrt())

    def transform(self, compressed: Tensor) -> Tensor:
        """Whiten compressed scores ``(..., D)`` to features ``(..., R)``, in the dtype of ``compressed``.

        Raises:
            ModelError: if ``D`` is not the metric's.
        """
        if compressed.shape[-1] != self.dim:
            raise ModelError(
                f"scores have {compressed.shape[-1]} coordinates, the metric {self.dim}: "
                "it was fitted on another network or with another compression"
            )
        return compressed @ self._whitening_like(compressed)

    def _whitening_like(self, compressed: Tensor) -> Tensor:
        """Return :attr:`whitening` in the dtype and on the device of ``compressed``, made once and kept."""
        key = compressed.dtype, compressed.device
        if key not in self._whitenings:
            with torch.inference_mode(False):  # a tensor made in that mode could never take part in a gradient
                self._whitenings[key] = self.whitening.to(compressed).contiguous()
        return self._whitenings[key]

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Damped Fisher kernel of compressed scores: ``(..., M, D)``, ``(..., N, D)`` -> ``(..., M, N)``."""
        return self.transform(a) @ self.transform(b).transpose(-1, -2)

    def save(self, url: str) -> None:
        """Write a sealed Zarr group with checksums to ``url`` (a local path or ``s3://``)."""
        arrays = {"eigvals": self.eigvals.cpu().numpy(), "eigvecs": self.eigvecs.cpu().numpy()}
        own = {"kind": "metric", "schema": SCHEMA, "blocks": list(self.bases), "damping": self.damping}
        save_arrays(url, arrays | basis_arrays(self.bases), {**self.attributes, **own})

    @classmethod
    def load(cls, url: str) -> LowRankMetric:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: if it is unsealed, damaged, or not a metric of this schema.
        """
        arrays, attributes = load_arrays(url)
        if attributes.get("kind") != "metric" or attributes.get("schema") != SCHEMA:
            raise StoreError(f"{url} is not a metric of schema {SCHEMA}")
        eigvals, eigvecs = torch.tensor(arrays["eigvals"]), torch.tensor(arrays["eigvecs"])
        bases, damping = bases_from(arrays, attributes["blocks"]), float(attributes["damping"])
        rest = {key: value for key, value in attributes.items() if key not in OWN_ATTRIBUTES}
        return cls(bases, eigvals, eigvecs, damping, rest)


def basis_arrays(bases: dict[str, LayerBasis]) -> dict[str, np.ndarray]:
    """Return the arrays that hold ``bases``, named ``basis-<position>-<part>``."""
    arrays = {}
    for position, basis in enumerate(bases.values()):
        for part in ("inputs", "outputs", "pairs"):
            arrays[f"basis-{position}-{part}"] = getattr(basis, part).cpu().contiguous().numpy()
    return arrays


def bases_from(arrays: dict[str, np.ndarray], blocks: list[str]) -> dict[str, LayerBasis]:
    """Undo :func:`basis_arrays` for the block names ``blocks``, in order."""
    bases = {}
    for position, name in enumerate(blocks):
        parts = [torch.tensor(arrays[f"basis-{position}-{part}"]) for part in ("inputs", "outputs", "pairs")]
        bases[name] = LayerBasis(name, *parts)
    return bases
