"""The low-rank Fisher metric: what maps compressed scores to features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import ModelError, RequestError, StoreError
from fisher_ray.metric.bases import bases_from, basis_arrays, basis_attributes
from fisher_ray.records import Compression
from fisher_ray.store import load_arrays, save_arrays

SCHEMA = 2
_OWN = ("kind", "schema", "bases", "parts", "layers")
"""What :meth:`LowRankMetric.save` keeps beside the metric's attributes; its values win over the same names there."""


@dataclass(frozen=True, eq=False)
class Part:
    """Coordinates that are whitened together, and the eigenvectors of their Fisher.

    Attributes:
        name: the layer's with ``structure: block``, else ``all``.
        start: first coordinate.
        stop: last coordinate, exclusive.
        eigvals: ``Λ``, descending, non-negative, ``(R,)``, float64.
        eigvecs: orthonormal ``U``, ``(D, R)``, float64.
        damping: ``δ``, in the eigenvalues' unit.
    """

    name: str
    start: int
    stop: int
    eigvals: Tensor
    eigvecs: Tensor
    damping: float

    @property
    def whitening(self) -> Tensor:
        """``U (Λ + δI)^(−½)``, ``(D, R)``, float64."""
        return self.eigvecs * (self.eigvals + self.damping).rsqrt()


@dataclass(frozen=True)
class LayerTrace:
    """How much of the Fisher a layer has.

    Attributes:
        name: the layer's.
        num_coordinates: that the compression gives it.
        trace: of its compressed coordinates' Fisher.
        kept: share of its scores' squared norm that these hold, estimated on the first few samples of each unit; about
            1, and sometimes above, where the compression is random.
    """

    name: str
    num_coordinates: int
    trace: float
    kept: float


@dataclass(frozen=True, eq=False)
class LowRankMetric:
    """``F ≈ U Λ Uᵀ`` in the ``D`` compressed coordinates, with damping ``δ``.

    Attributes:
        bases: the compression, by layer, in the order of the coordinates.
        parts: what is whitened together, in the order of the coordinates; their features follow each other.
        layers: each layer's part in the Fisher's trace.
        attributes: fingerprints and settings it was fitted with.
    """

    bases: dict[str, Compression]
    parts: tuple[Part, ...]
    layers: tuple[LayerTrace, ...]
    attributes: dict[str, Any]
    _whitenings: dict[tuple[torch.dtype, torch.device], list[Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __reduce__(self) -> tuple[type[LowRankMetric], tuple[Any, ...]]:
        """Pickle without the whitening matrices made so far."""
        return type(self), (self.bases, self.parts, self.layers, self.attributes)

    @property
    def dim(self) -> int:
        """``D``."""
        return sum(basis.dim for basis in self.bases.values())

    @property
    def rank(self) -> int:
        """``R``."""
        return sum(len(part.eigvals) for part in self.parts)

    @property
    def eigvals(self) -> Tensor:
        """``Λ``, ``(R,)``, float64: descending within each part."""
        return torch.cat([part.eigvals for part in self.parts])

    @property
    def eigvecs(self) -> Tensor:
        """``U``, ``(D, R)``, float64: zero outside each part's coordinates."""
        return self._spread([part.eigvecs for part in self.parts])

    @property
    def whitening(self) -> Tensor:
        """``U (Λ + δI)^(−½)``, ``(D, R)``, float64."""
        return self._spread([part.whitening for part in self.parts])

    def _spread(self, columns: list[Tensor]) -> Tensor:
        out, place = torch.zeros(self.dim, self.rank, dtype=torch.float64), 0
        for part, block in zip(self.parts, columns, strict=True):
            out[part.start : part.stop, place : place + block.shape[1]] = block
            place += block.shape[1]
        return out

    @property
    def dampings(self) -> Tensor:
        """Each feature's damping ``(R,)``, float64."""
        return torch.cat([torch.full_like(part.eigvals, part.damping) for part in self.parts])

    @property
    def damping(self) -> float:
        """``δ`` of a metric of one part.

        Raises:
            RequestError: if there are several, each with its own.
        """
        if len(self.parts) > 1:
            raise RequestError(f"the metric has {len(self.parts)} parts with a damping each: see dampings")
        return self.parts[0].damping

    @property
    def feature_rms(self) -> float:
        """Root mean square of a feature summed over classes, as the metric expects it: at most 1."""
        return float((self.eigvals / (self.eigvals + self.dampings)).mean().sqrt())

    def transform(self, compressed: Tensor) -> Tensor:
        """Whiten compressed scores ``(..., D)`` to features ``(..., R)``, in the dtype of ``compressed``.

        Raises:
            ModelError: if ``D`` is not the metric's.
        """
        parts = [values for _, values in self._transformed(compressed)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _transformed(self, compressed: Tensor) -> Iterator[tuple[str, Tensor]]:
        if compressed.shape[-1] != self.dim:
            raise ModelError(
                f"scores have {compressed.shape[-1]} coordinates, the metric {self.dim}: "
                "it was fitted on another network or with another compression"
            )
        for part, matrix in zip(self.parts, self._whitening_like(compressed), strict=True):
            yield part.name, compressed[..., part.start : part.stop] @ matrix

    def _whitening_like(self, compressed: Tensor) -> list[Tensor]:
        """Return each part's whitening in the dtype and on the device of ``compressed``, made once and kept."""
        key = compressed.dtype, compressed.device
        if key not in self._whitenings:
            with torch.inference_mode(False):  # a tensor made in that mode could never take part in a gradient
                self._whitenings[key] = [part.whitening.to(compressed).contiguous() for part in self.parts]
        return self._whitenings[key]

    def inverse_transform(self, features: Tensor) -> Tensor:
        """Return the compressed scores in the span of ``U`` that have these features, ``(..., R)`` to ``(..., D)``.

        Raises:
            ModelError: if ``R`` is not the metric's.
        """
        self._check_features(features)
        out, place = features.new_zeros(*features.shape[:-1], self.dim), 0
        for part in self.parts:
            matrix = part.eigvecs * (part.eigvals + part.damping).sqrt()
            out[..., part.start : part.stop] = features[..., place : place + matrix.shape[1]] @ matrix.T.to(features)
            place += matrix.shape[1]
        return out

    def fold(self, weights: Tensor) -> Tensor:
        """Return what weighs compressed scores as ``weights`` weigh their features, ``(..., R)`` to ``(..., D)``.

        The adjoint of :meth:`transform`: ``fold(w) · s`` is ``w · transform(s)``.

        Raises:
            ModelError: if ``R`` is not the metric's.
        """
        self._check_features(weights)
        out, place = weights.new_zeros(*weights.shape[:-1], self.dim), 0
        for part in self.parts:
            matrix = part.whitening.to(weights)
            out[..., part.start : part.stop] = weights[..., place : place + matrix.shape[1]] @ matrix.T
            place += matrix.shape[1]
        return out

    def _check_features(self, features: Tensor) -> None:
        if features.shape[-1] != self.rank:
            raise ModelError(f"there are {features.shape[-1]} features, and the metric has rank {self.rank}")

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Damped Fisher kernel of compressed scores: ``(..., M, D)``, ``(..., N, D)`` -> ``(..., M, N)``."""
        return self.transform(a) @ self.transform(b).transpose(-1, -2)

    def kernels_by_block(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Each part's kernel, by name: they add up to :meth:`kernel`."""
        pairs = zip(self._transformed(a), self._transformed(b), strict=True)
        return {name: left @ right.transpose(-1, -2) for (name, left), (_, right) in pairs}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that features depend on, the network aside."""
        arrays, values = self.to_arrays()
        told: list[Any] = [values["bases"], values["parts"]]
        if self.attributes.get("precision", "float32") != "float32":
            told.append(self.attributes["precision"])
        if self.attributes.get("class_buckets") is not None:
            told.append(self.attributes["class_buckets"])
        digest = hashlib.sha256(json.dumps(told).encode())
        for name in sorted(arrays):
            digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return what the spectrum says, in plain values.

        ``trace`` of the Fisher in the ``D`` coordinates; ``captured``, the eigenvalues' share of it; ``effective_dim``,
        ``Σ λ / (λ + δ)``, the directions that the damping leaves (MacKay, 1992); ``condition``, that of the damped
        Fisher on the kept directions; ``parts`` with the eigenvalues and damping of each; ``layers`` with the trace,
        the share of their scores' squared norm that the compression keeps, and their leading eigenvalues.
        """
        eigvals, damped, trace = self.eigvals, self.eigvals + self.dampings, sum(layer.trace for layer in self.layers)
        parts = [
            {"name": part.name, "eigvals": part.eigvals.tolist(), "damping": part.damping} for part in self.parts
        ]  # fmt: skip
        layers = [{**asdict(layer), "eigvals": self.layer_eigvals(layer.name).tolist()} for layer in self.layers]
        return {
            "dim": self.dim,
            "trace": trace,
            "captured": float(eigvals.sum()) / trace,
            "effective_dim": float((eigvals / damped).sum()),
            "condition": float(damped.max() / damped.min()),
            "parts": parts,
            "layers": layers,
        }

    def layer_eigvals(self, name: str) -> Tensor:
        """Eigenvalues of one layer's diagonal block of ``U Λ Uᵀ``, descending and above rounding, float64.

        Raises:
            RequestError: if the metric has no such layer.
        """
        if name not in self.bases:
            raise RequestError(f"the metric has no layer {name!r}; it has {', '.join(self.bases)}")
        start = 0
        for layer, basis in self.bases.items():
            if layer == name:
                break
            start += basis.dim
        for part in self.parts:
            if part.start <= start < part.stop:
                rows = part.eigvecs[start - part.start :][: self.bases[name].dim] * part.eigvals.sqrt()
                values: Tensor = torch.linalg.svdvals(rows).square()
                return values[values > self.dim * torch.finfo(values.dtype).eps * float(self.eigvals.max())]
        return torch.zeros(0, dtype=torch.float64)  # all its eigenvalues are zero, or smaller than the kept ones

    def save(self, url: str) -> None:
        """Write a sealed Zarr group with checksums to ``url`` (a local path or ``s3://``)."""
        arrays, rest = self.to_arrays()
        save_arrays(url, arrays, {**self.attributes, **rest, "kind": "metric", "schema": SCHEMA})

    @classmethod
    def load(cls, url: str) -> LowRankMetric:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: if it is unsealed, damaged, or not a metric of this schema.
        """
        arrays, attributes = load_arrays(url)
        if attributes.get("kind") != "metric" or attributes.get("schema") != SCHEMA:
            raise StoreError(f"{url} is not a metric of schema {SCHEMA}")
        rest = {key: value for key, value in attributes.items() if key not in _OWN}
        return cls.from_arrays(arrays, attributes, rest)

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the arrays, and the plain values beside them, that :meth:`from_arrays` takes."""
        arrays, parts = basis_arrays(self.bases), []
        for position, part in enumerate(self.parts):
            arrays[f"part-{position}-eigvals"] = part.eigvals.cpu().numpy()
            arrays[f"part-{position}-eigvecs"] = part.eigvecs.cpu().contiguous().numpy()
            parts.append({"name": part.name, "start": part.start, "stop": part.stop, "damping": part.damping})
        layers = [asdict(layer) for layer in self.layers]
        return arrays, {"bases": basis_attributes(self.bases), "parts": parts, "layers": layers}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any], attributes: dict[str, Any]
    ) -> LowRankMetric:
        """Undo :meth:`to_arrays`."""
        parts = []
        for position, entry in enumerate(values["parts"]):
            eigvals, eigvecs = (torch.tensor(arrays[f"part-{position}-{key}"]) for key in ("eigvals", "eigvecs"))
            parts.append(Part(entry["name"], entry["start"], entry["stop"], eigvals, eigvecs, float(entry["damping"])))
        layers = tuple(LayerTrace(**entry) for entry in values["layers"])
        return cls(bases_from(arrays, values["bases"]), tuple(parts), layers, attributes)
