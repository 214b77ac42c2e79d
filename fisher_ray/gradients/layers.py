"""Layers with gradient formulas: which parameters make up which block, and how a call's gradients are factored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from fisher_ray.gradients.blocks import Block, Piece, single
from fisher_ray.gradients.convolution import Convolution, weight_gradients
from fisher_ray.gradients.factors import (
    AffineFactors,
    AffineInput,
    ConvolutionInput,
    Factors,
    FormedFactors,
    LinearInput,
    TokenFactors,
)

MAX_GROUPS = 8
"""Groups of a convolution that are blocks of their own; of more, as in depthwise ones, all make one block."""


@dataclass(frozen=True)
class Part:
    """What one layer gives to one block.

    Attributes:
        block: the block.
        weight: whether the layer's weight is in it.
        bias: whether the layer's bias is in it.
        group: of a grouped convolution.
        shared: whether the block is one parameter in its own order, which other layers may share.
    """

    block: Block
    weight: bool
    bias: bool
    group: int = 0
    shared: bool = False


class Layer(ABC):
    """A layer with a formula.

    Args:
        name: the module's name.
        module: the layer.
        names: full names of its parameters, by ``weight`` and ``bias``.
    """

    def __init__(self, name: str, module: nn.Module, names: dict[str, str]) -> None:
        """See the class."""
        self.name, self.module, self.names = name, module, names
        self.weight = cast(Tensor, module.weight)

    @property
    def any_axis(self) -> bool:
        """Whether samples may lie on any axis that the formula does not name, and not on the first alone."""
        return False

    @abstractmethod
    def blocks(self, keys: set[str]) -> list[Part]:
        """Return the blocks of the parameters ``keys`` where no other layer shares them."""

    @abstractmethod
    def factors(self, part: Part, value: Tensor, delta: Tensor) -> Factors:
        """Return what a call gives to ``part``.

        Args:
            part: one of :meth:`blocks`, or of a shared parameter by itself.
            value: the layer's input, samples outermost, ``(B · k, ...)``.
            delta: the gradient at its output, ``(S, B, k, ...)``.
        """

    def _joined(self, keys: set[str], num_outputs: int, num_inputs: int, *, transposed: bool = False) -> Part:
        pieces, columns = [], num_inputs if "weight" in keys else 0
        rows = slice(0, num_outputs)
        if "weight" in keys:
            shape = tuple(self.weight.shape)
            pieces.append(Piece(self.names["weight"], slice(0, shape[0]), slice(0, columns), shape, transposed))
        if "bias" in keys:
            pieces.append(Piece(self.names["bias"], rows, slice(columns, columns + 1), (num_outputs,)))
        block = Block(self.name, num_outputs, columns + int("bias" in keys), tuple(pieces))
        return Part(block, "weight" in keys, "bias" in keys)


class LinearLayer(Layer):
    """``nn.Linear`` over any leading axes, and the layer of the same meaning with its weight transposed."""

    @property
    def any_axis(self) -> bool:
        """See :class:`Layer`."""
        return True

    def blocks(self, keys: set[str]) -> list[Part]:
        """See :class:`Layer`."""
        num_outputs, num_inputs = self.weight.T.shape if self._transposed else self.weight.shape
        return [self._joined(keys, num_outputs, num_inputs, transposed=self._transposed)]

    def factors(self, part: Part, value: Tensor, delta: Tensor) -> Factors:
        """See :class:`Layer`."""
        num_scores, batch = delta.shape[:2]
        source = LinearInput(value.reshape(batch, -1, value.shape[-1]), part.weight, part.bias)
        deltas = delta.reshape(num_scores, batch, -1, delta.shape[-1]).transpose(2, 3)
        made = AffineFactors(part.block, source, deltas)
        if self._transposed and part.shared and part.weight:
            return FormedFactors(part.block, made.gradient().transpose(2, 3))
        return made

    @property
    def _transposed(self) -> bool:
        return not isinstance(self.module, nn.Linear)


class ConvolutionLayer(Layer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: a block for each group, or one for more than a few groups."""

    def blocks(self, keys: set[str]) -> list[Part]:
        """See :class:`Layer`."""
        count = self._conv.groups if self._conv.groups <= MAX_GROUPS else 1
        shape = tuple(self.weight.shape)
        rows, num_inputs = shape[0] // count, self.weight[0].numel() if "weight" in keys else 0
        found = []
        for group in range(count):
            mine, pieces = slice(group * rows, (group + 1) * rows), []
            if "weight" in keys:
                pieces.append(Piece(self.names["weight"], mine, slice(0, num_inputs), (rows, *shape[1:])))
            if "bias" in keys:
                pieces.append(Piece(self.names["bias"], mine, slice(num_inputs, num_inputs + 1), (rows,)))
            name = self.name if count == 1 else f"{self.name}/{group}"
            block = Block(name, rows, num_inputs + int("bias" in keys), tuple(pieces))
            found.append(Part(block, "weight" in keys, "bias" in keys, group))
        return found

    def factors(self, part: Part, value: Tensor, delta: Tensor) -> Factors:
        """See :class:`Layer`."""
        groups, (num_scores, batch, fold) = self._conv.groups, delta.shape[:3]
        rows = len(self.weight) // groups
        deltas = delta.flatten(4).transpose(2, 3).reshape(num_scores, batch, groups, rows, -1)  # (S, B, G, O, k · T)
        if groups == 1 or part.block.num_outputs == rows:
            inputs: AffineInput = ConvolutionInput(
                self._conv, value.chunk(groups, dim=1)[part.group], batch, part.weight, part.bias
            )
            return AffineFactors(part.block, inputs, deltas[:, :, part.group])
        columns = []
        if part.weight:  # the scores are more outputs of each group
            joined = deltas.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, G, S · O, k · T)
            value = value.reshape(batch, fold, *value.shape[1:])
            made = weight_gradients(self._conv, value, joined).reshape(batch, groups, num_scores, rows, -1)
            columns.append(made.transpose(1, 2).flatten(2, 3))
        if part.bias:
            columns.append(deltas.sum(dim=4).flatten(2).transpose(0, 1)[..., None])
        return FormedFactors(part.block, torch.cat(columns, dim=3))

    @property
    def _conv(self) -> Convolution:
        return cast(Convolution, self.module)


class EmbeddingLayer(Layer):
    """``nn.Embedding``."""

    @property
    def any_axis(self) -> bool:
        """See :class:`Layer`."""
        return True

    def blocks(self, keys: set[str]) -> list[Part]:
        """See :class:`Layer`."""
        return [self._joined(keys, *self.weight.shape)]

    def factors(self, part: Part, value: Tensor, delta: Tensor) -> Factors:
        """See :class:`Layer`."""
        num_scores, batch = delta.shape[:2]
        tokens, deltas = value.reshape(batch, -1).long(), delta.reshape(num_scores, batch, -1, delta.shape[-1])
        padding = cast(nn.Embedding, self.module).padding_idx
        if padding is not None:
            deltas = deltas.masked_fill((tokens == padding)[..., None], 0)
        return TokenFactors(part.block, tokens, deltas)


class NormalisationLayer(Layer):
    """A normalisation with a scale and a shift for every channel or coordinate; its block has a column for each."""

    @property
    def any_axis(self) -> bool:
        """See :class:`Layer`."""
        return isinstance(self.module, nn.LayerNorm | nn.RMSNorm)

    def blocks(self, keys: set[str]) -> list[Part]:
        """See :class:`Layer`."""
        size, shape = self.weight.numel(), tuple(self.weight.shape)
        pieces = tuple(
            Piece(self.names[key], slice(0, shape[0]), slice(place, place + 1), shape)
            for place, key in enumerate(key for key in ("weight", "bias") if key in keys)
        )
        return [Part(Block(self.name, size, len(pieces), pieces), "weight" in keys, "bias" in keys)]

    def factors(self, part: Part, value: Tensor, delta: Tensor) -> Factors:
        """See :class:`Layer`."""
        columns = []
        if part.weight:
            normalised = _normalised(self.module, value).reshape(delta.shape[1:])
            columns.append(self._summed(delta * normalised))
        if part.bias:
            columns.append(self._summed(delta))
        formed = torch.stack(columns, dim=-1).transpose(0, 1)  # (B, S, size, columns)
        return FormedFactors(part.block, formed.reshape(*formed.shape[:2], part.block.num_outputs, -1))

    def _summed(self, products: Tensor) -> Tensor:
        """Sum ``(S, B, k, ...)`` over positions to ``(S, B, size)``."""
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):  # one parameter for each coordinate of the last axes
            return products.flatten(-self.weight.ndim).flatten(2, -2).sum(dim=2)
        return products.flatten(4).sum(dim=(2, 4)) if products.ndim > 4 else products.sum(dim=2)


class PReLULayer(Layer):
    """``nn.PReLU``: a slope for all channels, or one for each."""

    @property
    def any_axis(self) -> bool:
        """See :class:`Layer`."""
        return len(self.weight) == 1

    def blocks(self, keys: set[str]) -> list[Part]:
        """See :class:`Layer`."""
        return [Part(single(self.names["weight"], tuple(self.weight.shape)), weight=True, bias=False)]

    def factors(self, part: Part, value: Tensor, delta: Tensor) -> Factors:
        """See :class:`Layer`."""
        products = delta * value.clamp(max=0).reshape(delta.shape[1:])  # (S, B, k, C, ...)
        channels = len(self.weight)
        if channels > 1:
            summed = products.reshape(*products.shape[:3], channels, -1).sum(dim=(2, 4))
        else:
            summed = products.flatten(2).sum(dim=2, keepdim=True)
        return FormedFactors(part.block, summed.transpose(0, 1)[..., None])


def _normalised(module: nn.Module, value: Tensor) -> Tensor:
    """Return a normalisation's output before its scale and shift."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(value, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(value, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(value, module.num_groups, eps=module.eps)
    norm = cast(nn.modules.batchnorm._NormBase, module)
    mean, variance = (None if kept is None else kept.to(value) for kept in (norm.running_mean, norm.running_var))
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        own = norm.training or not norm.track_running_stats
        return functional.instance_norm(value, mean, variance, use_input_stats=own, eps=norm.eps)
    return functional.batch_norm(value, mean, variance, training=False, eps=norm.eps)


_KINDS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvolutionLayer,
    nn.Conv2d: ConvolutionLayer,
    nn.Conv3d: ConvolutionLayer,
    nn.Embedding: EmbeddingLayer,
    nn.LayerNorm: NormalisationLayer,
    nn.GroupNorm: NormalisationLayer,
    nn.RMSNorm: NormalisationLayer,
    nn.modules.batchnorm._NormBase: NormalisationLayer,
    nn.PReLU: PReLULayer,
}


def layer_of(name: str, module: nn.Module, names: dict[str, str]) -> Layer | None:
    """Return the formula of a module, or None: a subclass with a forward of its own is another kind of module.

    Args:
        name: the module's name.
        module: any module.
        names: full names of its own parameters, by their names in the module.
    """
    if not isinstance(module._parameters.get("weight"), nn.Parameter) or parametrize.is_parametrized(module):
        return None
    if "forward" in module.__dict__:
        return None
    if not names.keys() <= {"weight", "bias"}:
        return None
    if _is_transposed_linear(module):
        return LinearLayer(name, module, names)
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    for kind, formula in _KINDS.items():
        if isinstance(module, kind) and all(_is_stock(type(module), kind, key) for key in ("forward", "_conv_forward")):
            return formula(name, module, names)
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of the library ``transformers``: a linear layer with weight ``(A, O)``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _is_stock(kind: type[nn.Module], base: type[nn.Module], method: str) -> bool:
    """Whether a method is that of the class's nearest ancestor among torch's own, below ``base``."""
    stock = next(a for a in kind.__mro__ if a.__module__.startswith("torch.nn.modules.") and issubclass(a, base))
    return getattr(kind, method, None) is getattr(stock, method, None)
