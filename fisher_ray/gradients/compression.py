"""Compressed scores ``(B, S, D)`` straight from factors; ``(B, P)`` is never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fisher_ray.errors import ModelError, RequestError
from fisher_ray.gradients.blocks import Block, block_seed
from fisher_ray.gradients.factors import AffineFactors, Factors, FormedFactors
from fisher_ray.gradients.forming import Scores, add_calls
from fisher_ray.gradients.largest import largest_entries, num_largest
from fisher_ray.gradients.sketch import BlockSketch, fold
from fisher_ray.records import Compression, LayerBasis, LayerSketch


class Compressor:
    """Maps factors to the compressed coordinates of every block, one after the other.

    Args:
        bases: what compresses, by block name, in the order of the coordinates; other blocks are left out.
        blocks: of the engine that makes the scores.
        like: a tensor with the dtype and device to compute in.

    Raises:
        ModelError: if a block is missing, or its shape is not its basis's: the bases belong to another network.
    """

    def __init__(self, bases: Mapping[str, Compression], blocks: Sequence[Block], like: Tensor) -> None:
        """See the class."""
        known = {block.name: block for block in blocks}
        self._parts: dict[str, tuple[_Part, slice]] = {}
        self.dim = 0
        for name, basis in bases.items():
            block = known.get(name)
            if block is None or block.shape != basis.shape:
                found = f"{block.num_outputs} × {block.num_inputs}" if block else "none of that name"
                raise ModelError(
                    f"the metric has a layer {name!r} with factors of {basis.shape[0]} × {basis.shape[1]}, the network "
                    f"has {found}: it was fitted on another network"
                )
            place = slice(self.dim, self.dim + basis.dim)
            self._parts[name] = (_part(basis, block, like), place)
            self.dim = place.stop

    @property
    def linear(self) -> bool:
        """Whether coordinates are linear in the scores, which those of the largest entries are not."""
        return not any(isinstance(part, _Largest) for part, _ in self._parts.values())

    @property
    def places(self) -> dict[str, slice]:
        """Each block's coordinates."""
        return {name: place for name, (_, place) in self._parts.items()}

    def compress(self, scores: Scores) -> Tensor:
        """Return compressed scores, ``(B, S, D)``."""
        out = scores.logits.new_zeros(scores.logits.shape[0], scores.num_scores, self.dim)
        calls = scores.by_block()
        for name, (part, place) in self._parts.items():
            if name in calls:
                part.add(calls[name], out[:, :, place])
        return out

    def compress_gradient(self, block: Block, gradient: Tensor) -> Tensor:
        """Return the coordinates ``(..., K)`` of one block's gradients ``(..., O, A)``; none if it is left out."""
        if block.name not in self._parts:
            return gradient.new_zeros(*gradient.shape[:-2], 0)
        part, place = self._parts[block.name]
        flat = gradient.reshape(-1, 1, *gradient.shape[-2:])
        out = gradient.new_zeros(len(flat), 1, place.stop - place.start)
        part.add([FormedFactors(block, flat)], out)
        return out.view(*gradient.shape[:-2], -1)

    def transpose(self, name: str, compressed: Tensor) -> Tensor:
        """Return one block's part of the compression's adjoint: coordinates ``(..., D)`` to gradients ``(..., O, A)``.

        For orthonormal bases (``kronecker``, ``identity``) that is the gradient whose coordinates they are, as far as
        the kept directions go.

        Raises:
            RequestError: if the block's coordinates are no linear map of its gradient (``topk``).
        """
        part, place = self._parts[name]
        return part.transpose(compressed[..., place])


class _Part(Protocol):
    def add(self, calls: list[Factors], out: Tensor) -> None:
        """Add the coordinates ``(B, S, K)`` of the gradients that these calls add up to."""

    def transpose(self, compressed: Tensor) -> Tensor:
        """Return the adjoint, ``(..., K)`` to ``(..., O, A)``."""


def _part(basis: Compression, block: Block, like: Tensor) -> _Part:
    if isinstance(basis, LayerBasis):
        return _TwoSided(basis, like)
    if basis.share < 1:
        return _Largest(basis, block, like)
    return _Whole(basis) if basis.seed is None else _Sketched(basis, block, basis.seed, like)


class _TwoSided:
    """Coordinate ``(j, i)`` is ``Σ_t (v_jᵀ δ_t)(u_iᵀ a_t)``.

    With eigenvectors, that is the eigenbasis of K-FAC (George et al., 2018); with :func:`random_bases`, a two-sided
    random projection.
    """

    def __init__(self, basis: LayerBasis, like: Tensor) -> None:
        self._inputs, self._outputs = basis.inputs.to(like), basis.outputs.to(like)
        self._pairs, width = basis.pairs.to(like.device), basis.outputs.shape[1]
        places = basis.pairs[:, 1] * width + basis.pairs[:, 0]  # in the flattened (I, J)
        every = len(places) == self._inputs.shape[1] * width and bool((places.diff() == 1).all())
        self._places = None if every else places.to(like.device)

    def add(self, calls: list[Factors], out: Tensor) -> None:
        for item in calls:
            out += self._coordinates(item)

    def _coordinates(self, item: Factors) -> Tensor:
        if self._places is not None and isinstance(item, AffineFactors) and item.deltas.shape[3] == 1:
            deltas = torch.matmul(item.deltas[..., 0], self._outputs)  # (S, B, J)
            projected = item.source.project(self._inputs)[:, None, self._pairs[:, 1], 0]
            return deltas[..., self._pairs[:, 0]].transpose(0, 1) * projected
        products = item.project(self._inputs, self._outputs).flatten(2).transpose(0, 1)  # (B, S, I · J)
        return products if self._places is None else products[:, :, self._places]

    def transpose(self, compressed: Tensor) -> Tensor:
        sides = compressed.new_zeros(*compressed.shape[:-1], self._outputs.shape[1], self._inputs.shape[1])
        sides[..., self._pairs[:, 0], self._pairs[:, 1]] = compressed
        return self._outputs.to(sides) @ sides @ self._inputs.T.to(sides)


class _Whole:
    """Every entry in its place."""

    def __init__(self, basis: LayerSketch) -> None:
        self._shape = basis.shape

    def add(self, calls: list[Factors], out: Tensor) -> None:
        for item in calls:
            out += item.gradient().flatten(2)

    def transpose(self, compressed: Tensor) -> Tensor:
        return compressed.reshape(*compressed.shape[:-1], *self._shape)


class _Sketched:
    """See :class:`fisher_ray.gradients.GradientSketch`."""

    def __init__(self, basis: LayerSketch, block: Block, seed: int, like: Tensor) -> None:
        self._sketch = BlockSketch(block, basis.dim, seed, like)

    def add(self, calls: list[Factors], out: Tensor) -> None:
        wide = out.new_zeros(*out.shape[:2], 2 * out.shape[2])
        for item in calls:
            self._sketch.add(item, wide)
        out += fold(wide)

    def transpose(self, compressed: Tensor) -> Tensor:
        return self._sketch.transpose(compressed)


class _Largest:
    """The largest entries of each gradient, then a sketch of them; gradients are formed one block at a time."""

    def __init__(self, basis: LayerSketch, block: Block, like: Tensor) -> None:
        self._name = basis.name
        self._kept = num_largest(math.prod(basis.shape), basis.share)
        self._sketch = None if basis.seed is None else BlockSketch(block, basis.dim, basis.seed, like)

    def add(self, calls: list[Factors], out: Tensor) -> None:
        gradient = add_calls(calls)
        flat = gradient.flatten(2)
        kept = torch.zeros_like(flat).scatter_(2, *largest_entries(flat, self._kept))
        if self._sketch is None:
            out += kept
            return
        wide = out.new_zeros(*out.shape[:2], 2 * out.shape[2])
        self._sketch.add_gradient(kept.view_as(gradient), wide)
        out += fold(wide)

    def transpose(self, compressed: Tensor) -> Tensor:
        raise RequestError(
            f"layer {self._name!r} is compressed by topk, which is no linear map of its gradient: there is no way back "
            "to parameters. Choose another compression."
        )


def random_basis(block: Block, num_inputs: int, num_outputs: int, seed: int) -> LayerBasis:
    """Return Gaussian bases of one block, under which dot products of compressed scores estimate the scores'.

    Args:
        block: of an engine.
        num_inputs: ``I``; a side that is not longer is kept as it is.
        num_outputs: ``J``, likewise.
        seed: of the draws; with it the bases are the same on every machine.
    """
    generator = torch.Generator().manual_seed(block_seed(seed, block.name))
    inputs = _random_columns(block.num_inputs, num_inputs, generator)
    outputs = _random_columns(block.num_outputs, num_outputs, generator)
    grid = torch.cartesian_prod(*(torch.arange(side.shape[1], device="cpu") for side in (inputs, outputs)))
    return LayerBasis(block.name, inputs, outputs, grid.flip(1))


def random_bases(blocks: Sequence[Block], width: int, seed: int) -> dict[str, LayerBasis]:
    """Return :func:`random_basis` of every block with ``width`` columns on either side."""
    return {block.name: random_basis(block, width, width, seed) for block in blocks}


def _random_columns(size: int, width: int, generator: torch.Generator) -> Tensor:
    if size <= width:
        return torch.eye(size, device="cpu")
    return torch.randn(size, width, generator=generator, device="cpu") / math.sqrt(width)
