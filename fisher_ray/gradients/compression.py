"""Compressed scores ``(B, S, D)`` straight from factors; ``(B, P)`` is never formed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_ray.errors import ModelError
from fisher_ray.gradients.blocks import Block, block_seed
from fisher_ray.gradients.factors import AffineFactors, Factors
from fisher_ray.gradients.forming import Scores
from fisher_ray.records import LayerBasis


class KroneckerCompressor:
    """Maps factors to the kept products of two bases for each block.

    Coordinate ``(j, i)`` of a block is ``Σ_t (v_jᵀ δ_t)(u_iᵀ a_t)``: with eigenvectors, the eigenbasis of K-FAC (George
    et al., 2018); with :func:`random_bases`, a two-sided random projection.

    Args:
        bases: by block name, in the order of the coordinates.
        like: a tensor with the dtype and device to compute in.
    """

    def __init__(self, bases: dict[str, LayerBasis], like: Tensor) -> None:
        """See the class."""
        self._bases = {}
        self.dim = 0
        for name, basis in bases.items():
            inputs, outputs = basis.inputs.to(like), basis.outputs.to(like)
            places = basis.pairs[:, 1] * outputs.shape[1] + basis.pairs[:, 0]  # in the flattened (I, J)
            every = len(places) == inputs.shape[1] * outputs.shape[1] and bool((places.diff() == 1).all())
            self._bases[name] = (inputs, outputs, None if every else places.to(like.device), self.dim)
            self.dim += len(places)

    def compress(self, scores: Scores) -> Tensor:
        """Return compressed scores, shape ``(B, S, D)``.

        Raises:
            ModelError: if a block's shape is not its basis's: the metric belongs to another network.
        """
        out = scores.logits.new_zeros(len(scores.logits), scores.num_scores, self.dim)
        for item in scores.factors:
            if item.block.name in self._bases:
                part, start = self._block(item)
                out[:, :, start : start + part.shape[-1]] += part
        return out

    def _block(self, item: Factors) -> tuple[Tensor, int]:
        inputs, outputs, places, start = self._bases[item.block.name]
        block = item.block
        if (len(outputs), len(inputs)) != (block.num_outputs, block.num_inputs):
            raise ModelError(
                f"layer {block.name!r} has factors of {block.num_outputs} × {block.num_inputs}, the metric's are "
                f"{len(outputs)} × {len(inputs)}: it was fitted on another network"
            )
        if places is not None and isinstance(item, AffineFactors) and item.deltas.shape[3] == 1:
            deltas = torch.matmul(item.deltas[..., 0], outputs)  # (S, B, J)
            projected = item.source.project(inputs)[:, None, places // outputs.shape[1], 0]
            return deltas[..., places % outputs.shape[1]].transpose(0, 1) * projected, start
        products = item.project(inputs, outputs).flatten(2).transpose(0, 1)  # (B, S, I · J)
        return products if places is None else products[:, :, places], start


def random_bases(blocks: Sequence[Block], width: int, seed: int) -> dict[str, LayerBasis]:
    """Return Gaussian bases, under which compressed scores' dot products estimate the scores' without bias.

    Args:
        blocks: of an engine.
        width: columns on either side; a side that is not longer is kept as it is.
        seed: of the draws; with it the bases are the same on every machine.
    """
    found = {}
    for block in blocks:
        generator = torch.Generator().manual_seed(block_seed(seed, block.name))
        inputs, outputs = (_random_basis(n, width, generator) for n in (block.num_inputs, block.num_outputs))
        grid = torch.cartesian_prod(torch.arange(inputs.shape[1]), torch.arange(outputs.shape[1]))
        found[block.name] = LayerBasis(block.name, inputs, outputs, grid.flip(1))
    return found


def _random_basis(size: int, width: int, generator: torch.Generator) -> Tensor:
    if size <= width:
        return torch.eye(size)
    return torch.randn(size, width, generator=generator) / math.sqrt(width)
