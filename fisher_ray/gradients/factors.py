"""Per-sample gradients of a block, as the factors that one call of a layer left behind.

A layer ``y_t = W a_t + b`` has the per-sample gradient ``Σ_t δ_t a_tᵀ``: ``a`` (A rows, a trailing 1 where the bias
takes part) and ``δ`` (O rows) are the *factors*; most quantities can be had from them without forming ``(B, O, A)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.convolution import Convolution, convolve, patches, positions, weight_gradients
from fisher_ray.gradients.patch_products import patch_products

EVERY = slice(None)


class MomentSums(Protocol):
    """Takes second moments of a block's factors; see :class:`fisher_ray.metric.KroneckerSums`."""

    def add(self, block: str, inputs: Tensor, deltas: Tensor) -> None:
        """Add factors ``(B, A, T)`` and ``(S, B, O, T)``."""

    def add_products(self, block: str, products: Tensor, deltas: Tensor) -> None:
        """Add ``Σ a aᵀ`` ``(A, A)``, and the factors ``(S, B, O, T)`` of the other side."""

    def add_tokens(self, block: str, tokens: Tensor, deltas: Tensor, num_tokens: int) -> None:
        """Add the factors of an embedding: tokens ``(B, T)`` and ``(S, B, T, A)``."""

    def add_gradient(self, block: str, gradient: Tensor) -> None:
        """Add gradients ``(B, S, O, A)``."""


class Factors(Protocol):
    """What one call of a layer gives to one block."""

    @property
    def block(self) -> Block:
        """The block."""

    @property
    def num_scores(self) -> int:
        """``S``: ``C`` for all classes, else 1."""

    def gradient(self) -> Tensor:
        """Return the gradients, ``(B, S, O, A)``."""

    def project(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the gradients between columns ``inputs`` ``(A, I)`` and ``outputs`` ``(O, J)``, ``(S, B, I, J)``."""

    def add_moments(self, sums: MomentSums) -> None:
        """Add the second moments of both sides."""

    def norms(self) -> Tensor:
        """Return for each sample a number ``(B,)`` that is finite if its part in the second moments is."""

    def of_scores(self, scores: slice) -> Factors:
        """Return the factors of some of the ``S`` scores."""


class AffineInput(Protocol):
    """A layer's input as the factor ``a``."""

    @property
    def value(self) -> Tensor:
        """The input, samples outermost."""

    @property
    def weight(self) -> bool:
        """Whether the weight takes part."""

    @property
    def bias(self) -> bool:
        """Whether the bias takes part."""

    def patches(self, part: slice = EVERY) -> Tensor:
        """Return ``a`` of some samples without the trailing 1, ``(b, A, T)``."""

    def products(self) -> Tensor | None:
        """Return ``Σ a aᵀ``, the trailing 1 included, ``(A, A)``, where that is faster without forming ``a``."""

    def project(self, basis: Tensor) -> Tensor:
        """Return ``basisᵀ a`` for ``basis`` ``(A, I)`` without forming ``a``; ``(B, I, T)``."""

    @property
    def num_positions(self) -> int:
        """``T``."""


@dataclass(frozen=True)
class LinearInput:
    """A Linear layer's input.

    Attributes:
        value: ``(B, T, A)``.
        weight: whether the weight takes part.
        bias: whether the bias takes part.
    """

    value: Tensor
    weight: bool
    bias: bool

    @property
    def num_positions(self) -> int:
        """``T``."""
        return self.value.shape[1]

    def patches(self, part: slice = EVERY) -> Tensor:
        """See :class:`AffineInput`."""
        return self.value[part].transpose(1, 2)

    def products(self) -> Tensor | None:
        """See :class:`AffineInput`."""
        return None

    def project(self, basis: Tensor) -> Tensor:
        """See :class:`AffineInput`."""
        if not self.weight:
            return basis.T.expand(self.value.shape[0], -1, -1).repeat_interleave(self.num_positions, dim=2)
        weight, bias = basis[: self.value.shape[2]].T, basis[-1] if self.bias else None
        return functional.linear(self.value, weight.contiguous(), bias).transpose(1, 2)


@dataclass(frozen=True)
class ConvolutionInput:
    """One group's input of a convolution.

    Attributes:
        layer: the convolution.
        value: ``(B · k, C, ...)``.
        batch: ``B``; a sample's ``k`` pictures are further positions.
        weight: whether the weight takes part.
        bias: whether the bias takes part.
    """

    layer: Convolution
    value: Tensor
    batch: int
    weight: bool
    bias: bool

    @property
    def num_positions(self) -> int:
        """``T``."""
        return math.prod(positions(self.layer, self.value)) * (self.value.shape[0] // self.batch)

    def patches(self, part: slice = EVERY) -> Tensor:
        """See :class:`AffineInput`."""
        fold = self.value.shape[0] // self.batch
        value = self.value.reshape(self.batch, fold, *self.value.shape[1:])[part].flatten(0, 1)
        return self._join(patches(self.layer, value), fold)

    def products(self) -> Tensor | None:
        """See :class:`AffineInput`."""
        return patch_products(self.layer, self.value, self.bias) if self.weight else None

    def gradients(self, deltas: Tensor, part: slice) -> Tensor:
        """Return the weight's gradients of some samples without forming ``a``: ``(b, O, T)`` to ``(b, O, A)``."""
        value = self.value.reshape(self.batch, -1, *self.value.shape[1:])[part]
        return weight_gradients(self.layer, value, deltas[:, None])[:, 0]

    def project(self, basis: Tensor) -> Tensor:
        """See :class:`AffineInput`."""
        if not self.weight:
            return basis.T.expand(self.batch, -1, -1).repeat_interleave(self.num_positions, dim=2)
        filters = basis[:-1] if self.bias else basis
        filters = filters.T.reshape(-1, *self.layer.weight.shape[1:]).contiguous()
        out = convolve(self.layer, self.value, filters, basis[-1] if self.bias else None).flatten(2)
        return self._join(out, self.value.shape[0] // self.batch)

    @staticmethod
    def _join(value: Tensor, fold: int) -> Tensor:
        """Turn ``(B · k, A, T)`` into ``(B, A, k · T)``."""
        return value if fold == 1 else value.reshape(-1, fold, *value.shape[1:]).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class AffineFactors:
    """Factors of a layer that is an affine map at every position.

    Attributes:
        block: the block.
        source: the layer's input.
        deltas: ``δ``, ``(S, B, O, T)``.
    """

    block: Block
    source: AffineInput
    deltas: Tensor

    @property
    def num_scores(self) -> int:
        """``S``."""
        return self.deltas.shape[0]

    def inputs(self) -> Tensor:
        """Return ``a``, ``(B, A, T)``."""
        batch, num_positions = self.deltas.shape[1], self.deltas.shape[3]
        parts = [self.source.patches()] if self.source.weight else []
        if self.source.bias:
            parts.append(self.deltas.new_ones(batch, 1, num_positions))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def gradient(self) -> Tensor:
        """Return ``Σ_t δ_t a_tᵀ``, ``(B, S, O, A)``."""
        num_scores, batch, num_outputs, num_positions = self.deltas.shape
        deltas = self.deltas.transpose(0, 1).reshape(batch, num_scores * num_outputs, num_positions)
        return torch.bmm(deltas, self.inputs().transpose(1, 2)).reshape(batch, num_scores, num_outputs, -1)

    def project(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return ``Σ_t (inputsᵀ a_t)(outputsᵀ δ_t)ᵀ``, ``(S, B, I, J)``, in the cheaper order of the products."""
        _, _, num_outputs, num_positions = self.deltas.shape
        width_out, width_in = outputs.shape[1], inputs.shape[1]
        projected = self.source.project(inputs)
        contract_first = num_outputs * width_in * (num_positions + width_out)
        project_first = width_out * num_positions * (num_outputs + width_in)
        if contract_first < project_first:  # every product runs along contiguous positions
            return torch.matmul(torch.matmul(projected, self.deltas.transpose(2, 3)), outputs)
        deltas = self._project_deltas(outputs)
        return projected * deltas if num_positions == 1 else torch.matmul(projected, deltas)

    def _project_deltas(self, outputs: Tensor) -> Tensor:
        """Return ``(outputsᵀ δ)ᵀ``, ``(S, B, T, J)``: one product of matrices where positions come first in memory."""
        if isinstance(self.source, LinearInput):
            return torch.matmul(self.deltas.transpose(2, 3), outputs)
        return torch.matmul(outputs.T, self.deltas).transpose(2, 3)

    def add_moments(self, sums: MomentSums) -> None:
        """Add ``Σ a aᵀ`` and ``Σ δ δᵀ``."""
        if (products := self.source.products()) is None:
            sums.add(self.block.name, self.inputs(), self.deltas)
        else:
            sums.add_products(self.block.name, products, self.deltas)

    def of_scores(self, scores: slice) -> AffineFactors:
        """See :class:`Factors`."""
        return replace(self, deltas=self.deltas[scores])

    def norms(self) -> Tensor:
        """Return ``|a|² + |δ|²``, up to the number of times that a convolution sees a part of ``a``."""
        value = self.source.value.reshape(self.deltas.shape[1], -1)
        return value.square().sum(dim=1) + self.deltas.square().sum(dim=(0, 2, 3))


@dataclass(frozen=True)
class TokenFactors:
    """Factors of an embedding: the rows that were looked up, and ``δ``; the one-hot factor is never formed.

    Attributes:
        block: the block, ``(V, E)``.
        tokens: int64 ``(B, T)``.
        deltas: ``(S, B, T, E)``, zero where the token is the padding.
    """

    block: Block
    tokens: Tensor
    deltas: Tensor

    @property
    def num_scores(self) -> int:
        """``S``."""
        return self.deltas.shape[0]

    def gradient(self) -> Tensor:
        """Return the gradients, ``(B, S, V, E)``."""
        num_scores, batch, _, width = self.deltas.shape
        rows = self.tokens + self.block.num_outputs * torch.arange(batch, device=self.tokens.device)[:, None]
        out = self.deltas.new_zeros(num_scores, batch * self.block.num_outputs, width)
        out.index_add_(1, rows.flatten(), self.deltas.flatten(1, 2))
        return out.reshape(num_scores, batch, -1, width).transpose(0, 1)

    def project(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return ``Σ_t (inputsᵀ δ_t) outputs[token_t]ᵀ``, ``(S, B, I, J)``."""
        return torch.matmul(torch.matmul(self.deltas, inputs).transpose(2, 3), outputs[self.tokens])

    def add_moments(self, sums: MomentSums) -> None:
        """Add the tokens' counts and ``Σ δ δᵀ``."""
        sums.add_tokens(self.block.name, self.tokens, self.deltas, self.block.num_outputs)

    def of_scores(self, scores: slice) -> TokenFactors:
        """See :class:`Factors`."""
        return replace(self, deltas=self.deltas[scores])

    def norms(self) -> Tensor:
        """Return ``|δ|²``."""
        return self.deltas.square().sum(dim=(0, 2, 3))


@dataclass(frozen=True)
class FormedFactors:
    """Gradients that were formed right away: of a normalisation, or of a module without a formula.

    Attributes:
        block: the block.
        value: ``(B, S, O, A)``.
    """

    block: Block
    value: Tensor

    @property
    def num_scores(self) -> int:
        """``S``."""
        return self.value.shape[1]

    def gradient(self) -> Tensor:
        """Return the gradients, ``(B, S, O, A)``."""
        return self.value

    def project(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return ``inputsᵀ Gᵀ outputs``, ``(S, B, I, J)``."""
        return torch.matmul(torch.matmul(inputs.T, self.value.transpose(2, 3)), outputs).transpose(0, 1)

    def add_moments(self, sums: MomentSums) -> None:
        """Add ``Σ Gᵀ G`` and ``Σ G Gᵀ``."""
        sums.add_gradient(self.block.name, self.value)

    def of_scores(self, scores: slice) -> FormedFactors:
        """See :class:`Factors`."""
        return replace(self, value=self.value[:, scores])

    def norms(self) -> Tensor:
        """Return ``|G|²``."""
        return self.value.square().sum(dim=(1, 2, 3))
