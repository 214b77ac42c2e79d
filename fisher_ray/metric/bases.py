"""Which compressed coordinates each layer gets, and how they are kept in arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from fisher_ray.config import CompressionConfig, Kind
from fisher_ray.errors import ConfigError, StoreError
from fisher_ray.records import Compression, LayerBasis, LayerSketch

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """What is known of a layer's compression before any data is seen.

    Attributes:
        kind: of the compression.
        dim: coordinates, at most; None for a ``kronecker`` layer that shares :attr:`Plans.shared` with others.
    """

    kind: Kind
    dim: int | None


@dataclass(frozen=True)
class Plans:
    """The plan of every layer.

    Attributes:
        layers: by name, in the network's order.
        shared: coordinates of the ``kronecker`` layers that have none of their own, together.
    """

    layers: Mapping[str, Plan]
    shared: int

    @property
    def dim(self) -> int:
        """``D``, at most."""
        return self.shared + sum(plan.dim or 0 for plan in self.layers.values())

    @property
    def with_moments(self) -> list[str]:
        """Layers whose factors' second moments have to be known first."""
        return [name for name, plan in self.layers.items() if plan.kind == "kronecker"]


def plan_compression(config: CompressionConfig, shapes: Shapes) -> Plans:
    """Spread ``compression.dim`` over the layers.

    What ``compression.layers`` fix for some, and the entries of ``identity`` layers, come first; the others share the
    rest by size, ``kronecker`` layers theirs together.

    Args:
        config: what is asked for.
        shapes: ``(O, A)`` by layer, in the network's order.

    Raises:
        ConfigError: if a glob matches no layer that is left to it, or the layers that are fixed leave nothing for the
            others.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    asked = {name: _asked(config, name) for name in shapes}
    _refuse_unmatched(config, shapes)
    fixed = {}
    for name, (kind, dim) in asked.items():
        if kind == "identity":
            fixed[name] = sizes[name]
        elif dim is not None:
            fixed[name] = min(dim, sizes[name])
    rest = {name: size for name, size in sizes.items() if name not in fixed}
    left = min(config.dim - sum(fixed.values()), sum(rest.values()))
    if (left < 1 if rest else left < 0) and any(kind != "identity" for kind, _ in asked.values()):
        raise ConfigError(
            f"compression.dim {config.dim}: the layers with a number of coordinates of their own take "
            f"{sum(fixed.values())}, and there are {len(rest)} others. Raise it, or lower theirs."
        )
    shares = spread(left, rest)
    together = {name for name in rest if asked[name][0] == "kronecker"}
    dims = {**shares, **fixed}
    layers = {name: Plan(kind, None if name in together else dims[name]) for name, (kind, _) in asked.items()}
    return Plans(layers, sum(shares[name] for name in together))


def _asked(config: CompressionConfig, name: str) -> tuple[Kind, int | None]:
    for pattern, layer in config.layers.items():
        if fnmatchcase(name, pattern):
            return layer.kind or config.kind, layer.dim
    return config.kind, None


def _refuse_unmatched(config: CompressionConfig, shapes: Shapes) -> None:
    left = list(shapes)
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise ConfigError(
                f"compression.layers: {pattern!r} matches none of the layers, which are {', '.join(shapes)}"
            )
        if not any(fnmatchcase(name, pattern) for name in left):
            raise ConfigError(
                f"compression.layers: what {pattern!r} matches, an earlier one has matched. Put the narrower one first."
            )
        left = [name for name in left if not fnmatchcase(name, pattern)]


def spread(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Spread ``total`` numbers in proportion to ``sizes``, none above its size, each at least one if there are enough.

    By largest remainders, the first of equals.
    """
    first = 1 if total >= len(sizes) else 0
    weights = {name: size - first for name, size in sizes.items()}
    whole, rest = sum(weights.values()), total - first * len(sizes)
    if not whole:
        return dict.fromkeys(sizes, first)
    found = {name: first + rest * weight // whole for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: -(rest * weights[name] % whole))  # stable
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found


def basis_arrays(bases: Mapping[str, Compression]) -> dict[str, np.ndarray]:
    """Return the arrays that hold ``bases``, named ``basis-<position>-<part>``."""
    arrays = {}
    for position, basis in enumerate(bases.values()):
        if isinstance(basis, LayerBasis):
            for part in ("inputs", "outputs", "pairs"):
                arrays[f"basis-{position}-{part}"] = getattr(basis, part).cpu().contiguous().numpy()
    return arrays


def basis_attributes(bases: Mapping[str, Compression]) -> list[dict[str, Any]]:
    """Return what :func:`basis_arrays` does not hold, in plain values."""
    found: list[dict[str, Any]] = []
    for basis in bases.values():
        rest = {} if isinstance(basis, LayerBasis) else {"dim": basis.dim, "seed": basis.seed, "share": basis.share}
        found.append({"name": basis.name, "shape": list(basis.shape), **rest})
    return found


def bases_from(arrays: Mapping[str, np.ndarray], attributes: Iterable[Mapping[str, Any]]) -> dict[str, Compression]:
    """Undo :func:`basis_arrays` and :func:`basis_attributes`.

    Raises:
        StoreError: if an array is missing.
    """
    bases: dict[str, Compression] = {}
    for position, entry in enumerate(attributes):
        name = entry["name"]
        if "dim" in entry:
            bases[name] = LayerSketch(name, tuple(entry["shape"]), entry["dim"], entry["seed"], entry["share"])
            continue
        try:
            parts = [torch.tensor(arrays[f"basis-{position}-{part}"]) for part in ("inputs", "outputs", "pairs")]
        except KeyError as error:
            raise StoreError(f"the basis of layer {name!r} lacks its array {error}") from None
        bases[name] = LayerBasis(name, *parts)
    return bases
