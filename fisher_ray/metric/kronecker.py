"""Kronecker-factored second moments of a network's factors, and the basis chosen from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisher_ray.errors import DataError
from fisher_ray.metric.symmetric import add_gram, fix_signs, mirror, num_above_noise
from fisher_ray.records import LayerBasis

MAX_SIDE = 8192
"""A side of a block that is longer has the diagonal of its second moment summed alone, and coordinates as its basis."""
BLOCK_POSITIONS = 65536
"""Positions of backpropagated factors multiplied at a time: bounds the copy that a convolution's layout needs."""
MIN_POSITIONS = 64
"""Of a sample, with which its products are taken by themselves: with fewer, one product of all samples is faster."""
MARGIN = 1e-6
"""By which a bound of an eigenvalue is raised, relative to itself: far more than rounding takes."""


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
        self._num_rows = 0

    def count(self, num_rows: int) -> None:
        """Take note of so many samples, whether or not they reach a block."""
        self._num_rows += num_rows

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
        """Return ``<block>:inputs`` ``(A, A)``, ``<block>:outputs`` ``(O, O)``, ``<block>:positions``, ``num_rows``.

        A side longer than :data:`MAX_SIDE` has its diagonal alone. Adding the arrays of several sums element by element
        merges the sums.
        """
        for total in self._sums.values():
            if total.ndim == 2:
                mirror(total)
        arrays = {key: value.cpu().numpy() for key, value in self._sums.items()}
        return {"num_rows": np.array(float(self._num_rows)), **arrays}


def zero_sums(shapes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Return the arrays of sums over no samples, for blocks of the shapes ``(O, A)``."""
    found = {"num_rows": np.zeros(())}
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
        left out, and all of them are where every score is zero.

    Raises:
        DataError: if the sums hold no rows or are not finite.
    """
    if not sums["num_rows"] > 0:
        raise DataError("the Kronecker sums have no rows: all were skipped, or there are none")
    own, found, floor = own or {}, {}, _Floor(dim)
    sides = {name: _Sides.of(name, sums) for name in shapes if sums.get(f"{name}:positions", 0) > 0}
    for name in sorted(sides, key=lambda name: max(shapes[name])):  # the quick ones may save the slow ones
        if name in own:
            found[name] = _candidates(sides[name], own[name], 0.0)
        else:
            found[name] = _candidates(sides[name], dim, floor.value)
            floor.add(found[name].products)
    found = {name: found[name] for name in shapes if name in found}
    kept = _largest({name: block for name, block in found.items() if name not in own}, dim)
    for name, number in own.items():
        if name in found:
            kept |= _largest({name: found[name]}, number)
    return {name: _basis(name, block, kept[name]) for name, block in found.items() if len(kept[name])}


@dataclass(frozen=True)
class _Sides:
    """A block's moments, of which some row's logits depend on it.

    Attributes:
        moments: of ``inputs`` and of ``outputs``.
        bounds: what no eigenvalue of them is above.
        positions: what products of eigenvalues are divided by.
    """

    moments: dict[str, np.ndarray]
    bounds: dict[str, float]
    positions: float

    @classmethod
    def of(cls, name: str, sums: Mapping[str, np.ndarray]) -> _Sides:
        moments = {side: sums[f"{name}:{side}"] for side in ("inputs", "outputs")}
        if not all(np.isfinite(moment).all() for moment in moments.values()):
            raise DataError(f"the factors of layer {name!r} sum to NaN or infinity: look for extreme inputs or weights")
        bounds = {}
        for side, moment in moments.items():
            bounds[side] = float(moment.max() if moment.ndim == 1 else np.linalg.norm(moment)) * (1 + MARGIN)
        return cls(moments, bounds, float(sums[f"{name}:positions"]))


class _Floor:
    """What a product has to reach to be among the ``count`` largest, as far as is known."""

    def __init__(self, count: int) -> None:
        self._largest, self._count, self.value = torch.zeros(0, dtype=torch.float64), count, 0.0

    def add(self, products: Tensor) -> None:
        joined = torch.cat([self._largest, products])
        self._largest = joined.topk(min(self._count, len(joined))).values
        if self._count and len(self._largest) == self._count:
            self.value = float(self._largest[-1])


@dataclass(frozen=True)
class _Candidates:
    """Products of a block that may be among the largest.

    Attributes:
        inputs: leading eigenvectors as :func:`_leading` returns them.
        outputs: likewise.
        pairs: ``(K, 2)``, output and input eigenvector of each product, in this order.
        products: ``(K,)``.
    """

    inputs: Tensor
    outputs: Tensor
    pairs: Tensor
    products: Tensor


def _candidates(block: _Sides, count: int, floor: float) -> _Candidates:
    """Decompose a block's moments, and keep what the ``count`` largest products can be made of.

    Eigenvalues descend, so the product of the ``j``-th and the ``i``-th, counted from 0, is not above any of the
    ``(j + 1) (i + 1)`` products of those that do not come after them: with more than ``count`` of these, it is not
    among the largest. About ``count · ln count`` products of ``count`` eigenvectors are left, whatever the block.

    A matrix of which no product can reach ``floor`` is not decomposed, and there are no candidates: its largest
    eigenvalue is not above its Frobenius norm.
    """
    bounds, sides = dict(block.bounds), {}
    for side, moment in sorted(block.moments.items(), key=lambda item: len(item[1])):
        if bounds["inputs"] * bounds["outputs"] / block.positions < floor:
            none = torch.zeros(0)
            return _Candidates(none, none, torch.zeros(0, 2, dtype=torch.int64), none.double())
        sides[side] = _leading(moment, count)
        bounds[side] = float(sides[side][0][:1].sum()) * (1 + MARGIN)
    (values_in, vectors_in), (values_out, vectors_out) = sides["inputs"], sides["outputs"]
    outputs = torch.arange(len(values_out))
    widths = (count // (outputs + 1)).clamp(max=len(values_in))
    outputs = outputs.repeat_interleave(widths)
    inputs = torch.arange(len(outputs)) - (widths.cumsum(0) - widths).repeat_interleave(widths)
    products = values_out[outputs] * values_in[inputs] / block.positions
    return _Candidates(vectors_in, vectors_out, torch.stack([outputs, inputs], dim=1), products)


def _largest(blocks: dict[str, _Candidates], count: int) -> dict[str, Tensor]:
    """Return each block's pairs among the ``count`` largest products of all; zeros are never kept."""
    if not blocks:
        return {}
    products = torch.cat([block.products for block in blocks.values()])
    order = torch.argsort(products, descending=True, stable=True)[:count]
    order = order[products[order] > 0]
    kept, start = {}, 0
    for name, block in blocks.items():
        kept[name] = block.pairs[order[(order >= start) & (order < start + len(block.pairs))] - start]
        start += len(block.pairs)
    return kept


def _basis(name: str, block: _Candidates, pairs: Tensor) -> LayerBasis:
    width_out, width_in = (pairs.max(dim=0).values + 1).tolist()  # eigenvalues descend: leading ones
    return LayerBasis(name, _columns(block.inputs, width_in), _columns(block.outputs, width_out), pairs)


def _columns(vectors: Tensor, width: int) -> Tensor:
    return vectors[:, :width].clone(memory_format=torch.contiguous_format)


def _leading(matrix: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Return up to ``count`` eigenvalues, descending, and sign-fixed eigenvectors in float32, ``(n, count)``.

    Eigenvalues of rounding alone are set to zero. Of a diagonal, the eigenvectors are unit vectors.
    """
    if matrix.ndim == 1:
        values, places = torch.tensor(matrix, dtype=torch.float64).sort(descending=True, stable=True)
        places = places[:count]
        vectors = torch.zeros(len(values), len(places))
        vectors[places, torch.arange(len(places))] = 1
    else:
        values, vectors = _eigh(matrix, count)
    values[num_above_noise(values) :] = 0
    return values[:count].clone(), vectors


def _eigh(matrix: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(torch.tensor(matrix, dtype=torch.float64))
    leading = vectors[:, max(0, len(values) - count) :].flip(1)
    return values.flip(0), fix_signs(leading).float().contiguous()
