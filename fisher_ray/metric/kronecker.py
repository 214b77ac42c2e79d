"""Kronecker-factored second moments of a network's factors, and the basis chosen from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError
from fisher_ray.records import LayerBasis


@dataclass
class KroneckerSums:
    """Per block ``Σ a aᵀ`` and ``Σ_c p_c Σ_t δ δᵀ`` over samples and positions, float64, mergeable by addition.

    Attributes:
        arrays: ``<block>:inputs`` ``(A, A)``, ``<block>:outputs`` ``(O, O)``, ``<block>:positions`` ``()``.
    """

    arrays: dict[str, Tensor] = field(default_factory=dict)

    def add(self, block: str, inputs: Tensor, deltas: Tensor) -> None:
        """Add one call's factors: ``inputs`` ``(B, A, T)``, ``deltas`` ``(S, B, O, T)``."""
        rows = inputs.transpose(0, 1).flatten(1)  # (A, B·T)
        outputs = deltas.permute(2, 0, 1, 3).flatten(1)  # (O, S·B·T)
        self._accumulate(f"{block}:inputs", rows @ rows.T)
        self._accumulate(f"{block}:outputs", outputs @ outputs.T)
        self._accumulate(f"{block}:positions", torch.tensor(float(rows.shape[1])))

    def _accumulate(self, key: str, value: Tensor) -> None:
        value = value.to(torch.float64)
        self.arrays[key] = self.arrays[key] + value if key in self.arrays else value

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the sums as NumPy arrays."""
        return {key: value.cpu().numpy() for key, value in self.arrays.items()}


def choose_bases(sums: dict[str, np.ndarray], shapes: dict[str, tuple[int, int]], dim: int) -> dict[str, LayerBasis]:
    """Keep the ``dim`` Kronecker products with the largest eigenvalue products, over all blocks together.

    The product of eigenvalues, divided by the number of positions, estimates the Fisher's diagonal in that coordinate
    (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions).

    Args:
        sums: merged :class:`KroneckerSums` arrays.
        shapes: ``(O, A)`` by block, in the network's order.
        dim: ``D``; fewer are kept when the network has fewer coordinates with a non-zero product.

    Returns:
        float32 bases by block name; a block with no kept coordinate is left out.

    Raises:
        DataError: if the sums are not finite or all zero.
    """
    decomposed = {}
    for name in shapes:
        if f"{name}:inputs" in sums:
            values_in, vectors_in = _eigh(sums[f"{name}:inputs"], name)
            values_out, vectors_out = _eigh(sums[f"{name}:outputs"], name)
            products = torch.outer(values_out, values_in) / float(sums[f"{name}:positions"])
            decomposed[name] = (vectors_in, vectors_out, products)
    flat = torch.cat([products.flatten() for _, _, products in decomposed.values()])
    order = torch.argsort(flat, descending=True, stable=True)[:dim]
    order = order[flat[order] > 0]
    if not len(order):
        raise DataError("every score is zero: the Fisher metric has no direction. Is the network's output constant?")
    bases, start = {}, 0
    for name, (vectors_in, vectors_out, products) in decomposed.items():
        mine = order[(order >= start) & (order < start + products.numel())] - start
        start += products.numel()
        if len(mine):
            bases[name] = _basis(name, vectors_in, vectors_out, mine)
    return bases


def _basis(name: str, vectors_in: Tensor, vectors_out: Tensor, flat: Tensor) -> LayerBasis:
    num_inputs = vectors_in.shape[1]
    outputs, inputs = flat // num_inputs, flat % num_inputs
    width_out, width_in = int(outputs.max()) + 1, int(inputs.max()) + 1  # eigenvalues descend: a leading block
    pairs = torch.stack([outputs, inputs], dim=1)
    return LayerBasis(name, vectors_in[:, :width_in].float(), vectors_out[:, :width_out].float(), pairs)


def _eigh(matrix: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and non-negative, and sign-fixed eigenvectors."""
    tensor = torch.tensor(matrix, dtype=torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"the factors of layer {name!r} sum to NaN or infinity: look for extreme inputs or weights")
    values, vectors = torch.linalg.eigh(tensor)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def identity_bases(shapes: dict[str, tuple[int, int]]) -> dict[str, LayerBasis]:
    """Bases that keep every gradient entry: ``D = P``."""
    bases = {}
    for name, (num_outputs, num_inputs) in shapes.items():
        grid = torch.meshgrid(torch.arange(num_outputs), torch.arange(num_inputs), indexing="ij")
        pairs = torch.stack([axis.flatten() for axis in grid], dim=1)
        bases[name] = LayerBasis(name, torch.eye(num_inputs), torch.eye(num_outputs), pairs)
    return bases
