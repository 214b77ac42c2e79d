"""Kronecker-factored second moments of a network's factors, and the basis chosen from them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError
from fisher_ray.metric.symmetric import add_gram, eigh_descending, mirror, num_above_noise
from fisher_ray.records import LayerBasis

MAX_SIDE = 8192
"""A side of a block that is longer has the diagonal of its second moment summed alone, and coordinates as its basis."""
BLOCK_POSITIONS = 65536
"""Positions of backpropagated factors multiplied at a time: bounds the copy that a convolution's layout needs."""
MIN_POSITIONS = 64
"""Of a sample, with which its products are taken by themselves: with fewer, one product of all samples is faster."""


class KroneckerSums:
    """Per block ``Σ a aᵀ`` and ``Σ_c p_c Σ_t δ δᵀ`` over samples and positions, float64, mergeable by addition.

    For gradients that are no outer products the two are ``Σ Gᵀ G`` and ``Σ G Gᵀ``, and ``Σ |G|²`` stands in the place
    of the number of positions. A call's products are taken in the factors' dtype, which is sound for float32: both are
    sums of squares, without cancellation, so an entry's rounding is about 1e-6 of its rows' own sizes, and the sums
    only choose a basis. What the metric measures in that basis is summed by :class:`fisher_ray.metric.FisherSum`.
    """

    def __init__(self) -> None:
        """See the class."""
        self._sums: dict[str, Tensor] = {}

    def add(self, block: str, inputs: Tensor, deltas: Tensor) -> None:
        """Add one call's factors: ``inputs`` ``(B, A, T)`` and, weighted by ``√p_c``, ``deltas`` ``(S, B, O, T)``."""
        self._add(f"{block}:inputs", inputs.transpose(0, 1).flatten(1).T)
        self._add_outputs(block, deltas)

    def add_products(self, block: str, products: Tensor, deltas: Tensor) -> None:
        """Add one call's ``Σ a aᵀ`` ``(A, A)`` over samples and positions, and ``deltas`` as in :meth:`add`."""
        size = len(products)
        if size > MAX_SIDE:
            self._total(f"{block}:inputs", products, size).add_(products.diagonal())
        else:
            self._total(f"{block}:inputs", products, size, size).add_(products)
        self._add_outputs(block, deltas)

    def add_tokens(self, block: str, tokens: Tensor, deltas: Tensor, num_tokens: int) -> None:
        """Add an embedding's factors: ``tokens`` ``(B, T)`` in ``[0, num_tokens)`` and ``deltas`` ``(S, B, T, A)``."""
        counts = torch.bincount(tokens.flatten(), minlength=num_tokens).double()
        outputs = self._total(f"{block}:outputs", deltas, *[num_tokens] * (1 if num_tokens > MAX_SIDE else 2))
        (outputs if outputs.ndim == 1 else outputs.diagonal()).add_(counts)
        self._add(f"{block}:inputs", deltas.flatten(0, 2))
        self._total(f"{block}:positions", deltas).add_(tokens.numel())

    def add_gradient(self, block: str, gradient: Tensor) -> None:
        """Add gradients that are no outer products, ``(B, S, O, A)``: both sides' products, and the sum of squares."""
        self._add(f"{block}:inputs", gradient.flatten(0, 2))
        self._add(f"{block}:outputs", gradient.transpose(2, 3).flatten(0, 2))
        self._total(f"{block}:positions", gradient).add_(gradient.double().square().sum())

    def _add_outputs(self, block: str, deltas: Tensor) -> None:
        _, batch, size, num_positions = deltas.shape
        apart = num_positions >= MIN_POSITIONS and size <= MAX_SIDE
        for part in torch.split(deltas, max(1, BLOCK_POSITIONS // max(1, batch * num_positions))):
            if apart:
                each = part.flatten(0, 1)
                total = self._total(f"{block}:outputs", part, size, size)
                total += torch.addbmm(part.new_zeros(size, size), each, each.transpose(1, 2))
            else:
                self._add(f"{block}:outputs", part.permute(2, 0, 1, 3).flatten(1).T)
        self._total(f"{block}:positions", deltas).add_(batch * num_positions)

    def _add(self, key: str, rows: Tensor) -> None:
        size = rows.shape[1]
        if size > MAX_SIDE:
            self._total(key, rows, size).add_(rows.square().sum(0))
        else:
            add_gram(self._total(key, rows, size, size), rows)

    def _total(self, key: str, like: Tensor, *shape: int) -> Tensor:
        if key not in self._sums:
            self._sums[key] = torch.zeros(shape, dtype=torch.float64, device=like.device)
        return self._sums[key]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return ``<block>:inputs`` ``(A, A)``, ``<block>:outputs`` ``(O, O)`` and ``<block>:positions`` ``()``.

        A side longer than :data:`MAX_SIDE` has its diagonal alone. Adding the arrays of several sums element by element
        merges the sums.
        """
        for total in self._sums.values():
            if total.ndim == 2:
                mirror(total)
        return {key: value.cpu().numpy() for key, value in self._sums.items()}


def zero_sums(shapes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Return the arrays of sums over no samples, for blocks of the shapes ``(O, A)``."""
    found = {}
    for name, (num_outputs, num_inputs) in shapes.items():
        for side, size in (("inputs", num_inputs), ("outputs", num_outputs)):
            found[f"{name}:{side}"] = np.zeros((size,) if size > MAX_SIDE else (size, size))
        found[f"{name}:positions"] = np.zeros(())
    return found


def choose_bases(
    sums: dict[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], dim: int, own: Mapping[str, int] | None = None
) -> dict[str, LayerBasis]:
    """Keep the ``dim`` Kronecker products with the largest eigenvalue products, over all blocks together.

    The product of eigenvalues, divided by the number of positions, estimates the Fisher's diagonal in that coordinate
    times the number of samples (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions).

    Args:
        sums: merged :class:`KroneckerSums` arrays.
        shapes: ``(O, A)`` by block, in the network's order.
        dim: ``D``; fewer are kept when the network has fewer coordinates with a non-zero product.
        own: blocks with a number of products of their own, which are not among the ``dim``.

    Returns:
        float32 bases by block name, the coordinates of each in descending order of their products; eigenvectors have
        their signs fixed as in :func:`fisher_ray.metric.symmetric.eigh_descending`. A block with no kept coordinate is
        left out.

    Raises:
        DataError: if the sums hold no rows, are not finite or are all zero.
    """
    if not sums:
        raise DataError("the Kronecker sums have no rows: all were skipped, or there are none")
    decomposed = {}
    for name in shapes:
        if sums.get(f"{name}:positions", 0) > 0:  # some row's logits depend on it
            values_in, vectors_in = _eigh(sums[f"{name}:inputs"], name)
            values_out, vectors_out = _eigh(sums[f"{name}:outputs"], name)
            products = torch.outer(values_out, values_in) / float(sums[f"{name}:positions"])
            decomposed[name] = (vectors_in, vectors_out, products)
    own = own or {}
    kept = _largest({name: products for name, (*_, products) in decomposed.items() if name not in own}, dim)
    for name, number in own.items():
        if name in decomposed:
            kept |= _largest({name: decomposed[name][2]}, number)
    if not any(len(chosen) for chosen in kept.values()):
        raise DataError("every score is zero: the Fisher metric has no direction. Is the network's output constant?")
    vectors = {name: (vectors_in, vectors_out) for name, (vectors_in, vectors_out, _) in decomposed.items()}
    return {name: _basis(name, *vectors[name], kept[name]) for name in vectors if len(kept[name])}


def _largest(products: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return where the ``count`` largest products stand in each block, flattened; zeros are never kept."""
    if not products:
        return {}
    flat = torch.cat([block.flatten() for block in products.values()])
    order = torch.argsort(flat, descending=True, stable=True)[:count]
    order = order[flat[order] > 0]
    kept, start = {}, 0
    for name, block in products.items():
        kept[name] = order[(order >= start) & (order < start + block.numel())] - start
        start += block.numel()
    return kept


def _basis(name: str, vectors_in: Tensor, vectors_out: Tensor, flat: Tensor) -> LayerBasis:
    num_inputs = vectors_in.shape[-1]
    outputs, inputs = flat // num_inputs, flat % num_inputs
    width_out, width_in = int(outputs.max()) + 1, int(inputs.max()) + 1  # eigenvalues descend: a leading block
    pairs = torch.stack([outputs, inputs], dim=1)
    return LayerBasis(name, _columns(vectors_in, width_in), _columns(vectors_out, width_out), pairs)


def _columns(vectors: Tensor, width: int) -> Tensor:
    if vectors.ndim == 2:
        return vectors[:, :width].float().contiguous()
    columns = torch.zeros(len(vectors), width)
    columns[vectors[:width], torch.arange(width)] = 1
    return columns


def _eigh(matrix: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, those of rounding alone set to zero, and sign-fixed eigenvectors.

    Of a diagonal, the eigenvectors' places.
    """
    tensor = torch.tensor(matrix, dtype=torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"the factors of layer {name!r} sum to NaN or infinity: look for extreme inputs or weights")
    values, vectors = tensor.sort(descending=True, stable=True) if tensor.ndim == 1 else eigh_descending(tensor)
    values[num_above_noise(values) :] = 0
    return values, vectors
