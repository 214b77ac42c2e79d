"""Compressed scores ``(B, S, D)`` straight from factors; ``(B, P)`` is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_ray.errors import ModelError
from fisher_ray.gradients.scores import Factors, Scores
from fisher_ray.records import LayerBasis


class KroneckerCompressor:
    """Maps factors to the kept products of each layer's Kronecker basis.

    Coordinate ``(j, i)`` of a block is ``Σ_t (v_jᵀ δ_t)(u_iᵀ a_t)`` (the eigenbasis of K-FAC; George et al., 2018).

    Args:
        bases: by block name, in the order of the coordinates.
        like: a tensor with the dtype and device to compute in.
    """

    def __init__(self, bases: dict[str, LayerBasis], like: Tensor) -> None:
        """See the class."""
        self._bases = {}
        self.dim = 0
        for name, basis in bases.items():
            pairs = basis.pairs.to(like.device)
            self._bases[name] = (basis.inputs.to(like), basis.outputs.to(like), pairs, self.dim)
            self.dim += len(pairs)

    def compress(self, scores: Scores) -> Tensor:
        """Return compressed scores, shape ``(B, S, D)``.

        Raises:
            ModelError: if a factor's shape is not its basis's: the metric belongs to another network.
        """
        num_scores = scores.factors[0].deltas.shape[0]
        out = scores.logits.new_zeros(len(scores.logits), num_scores, self.dim)
        for item in scores.factors:
            if item.block.name in self._bases:
                part, start = self._block(item)
                out[:, :, start : start + part.shape[-1]] += part
        return out

    def _block(self, item: Factors) -> tuple[Tensor, int]:
        inputs, outputs, pairs, start = self._bases[item.block.name]
        if (len(outputs), len(inputs)) != (item.block.num_outputs, item.block.num_inputs):
            raise ModelError(
                f"layer {item.block.name!r} has factors of {item.block.num_outputs} × {item.block.num_inputs}, "
                f"the metric's are {len(outputs)} × {len(inputs)}: it was fitted on another network"
            )
        num_scores, batch, num_outputs, num_positions = item.deltas.shape
        projected = item.block.project_inputs(item.value, inputs)  # (B, I, T)
        if num_positions == 1:
            deltas = torch.matmul(outputs.T, item.deltas)[..., 0]  # (S, B, J)
            return deltas[..., pairs[:, 0]].transpose(0, 1) * projected[:, None, pairs[:, 1], 0], start
        width_out, width_in = outputs.shape[1], inputs.shape[1]
        contract_first = num_outputs * width_in * (num_positions + width_out)
        project_first = width_out * num_positions * (num_outputs + width_in)
        if contract_first < project_first:  # every product runs along contiguous positions
            products = torch.matmul(torch.matmul(projected, item.deltas.transpose(2, 3)), outputs)
        else:
            products = torch.matmul(projected, torch.matmul(outputs.T, item.deltas).transpose(2, 3))
        flat = products.reshape(num_scores, batch, -1).transpose(0, 1)  # (B, S, I · J)
        return flat[:, :, pairs[:, 1] * width_out + pairs[:, 0]], start
