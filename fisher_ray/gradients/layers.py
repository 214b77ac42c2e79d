"""Formulas of the layers: how a layer's input and backpropagated gradient make its per-sample gradient.

Every supported layer is, per group and position ``t``, an affine map ``y_t = W a_t + b``; its per-sample gradient is
``Σ_t δ_t a_tᵀ``. ``a`` (A rows, a trailing 1 where the bias takes part) and ``δ`` (O rows) are the *factors*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SUPPORTED = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Block:
    """One group of one layer: the unit of factors, bases and structure.

    Attributes:
        name: the module's name, with ``/g`` for group ``g`` of a grouped convolution.
        module: the layer.
        layer: the module's name.
        group: which group.
        weight: whether the weight takes part.
        bias: whether the bias takes part.
    """

    name: str
    module: nn.Module
    layer: str
    group: int
    weight: bool
    bias: bool

    @property
    def num_inputs(self) -> int:
        """``A``: rows of the input factor."""
        return (self._fan_in if self.weight else 0) + int(self.bias)

    @property
    def num_outputs(self) -> int:
        """``O``: rows of the backpropagated factor."""
        weight = self._weight
        return int(weight.shape[0]) // self._groups

    @property
    def _weight(self) -> Tensor:
        weight = self.module.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"layer {self.layer!r} holds no weight tensor")
        return weight

    @property
    def _fan_in(self) -> int:
        return int(self._weight[0].numel())

    @property
    def _groups(self) -> int:
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    def inputs(self, value: Tensor) -> Tensor:
        """Unfold a layer's input ``(B, ...)`` to the factor ``a``, shape ``(B, A, T)``."""
        parts = [self._unfold(value)] if self.weight else []
        if self.bias:
            num_positions = parts[0].shape[-1] if parts else self._num_positions(value)
            parts.append(value.new_ones(len(value), 1, num_positions))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def project_inputs(self, value: Tensor, basis: Tensor) -> Tensor:
        """Return ``basisᵀ a`` without unfolding: ``value`` ``(B, ...)``, ``basis`` ``(A, I)`` -> ``(B, I, T)``."""
        if not self.weight:
            return self.inputs(value).transpose(1, 2).matmul(basis).transpose(1, 2)
        weight = basis[: self._fan_in].T
        bias = basis[-1] if self.bias else None
        if isinstance(self.module, nn.Conv2d):
            value, padding = _padded(self.module, self._group_input(value))
            filters = weight.reshape(-1, *self._weight.shape[1:]).contiguous()
            out = functional.conv2d(value, filters, bias, self.module.stride, padding, self.module.dilation)
            return out.flatten(2)
        flat = value.reshape(len(value), -1, value.shape[-1])
        return functional.linear(flat, weight.contiguous(), bias).transpose(1, 2)

    def deltas(self, value: Tensor) -> Tensor:
        """Reshape gradients at a layer's output ``(S, B, ...)`` to ``δ``, shape ``(S, B, O, T)``."""
        if isinstance(self.module, nn.Conv2d):
            value = value.flatten(3)
            return value[:, :, self.group * self.num_outputs : (self.group + 1) * self.num_outputs]
        return value.reshape(*value.shape[:2], -1, value.shape[-1]).transpose(2, 3)

    def split(self, gradient: Tensor) -> dict[str, Tensor]:
        """Split ``(..., O, A)`` into this group's rows of the parameters ``weight`` and ``bias``."""
        parts: dict[str, Tensor] = {}
        if self.weight:
            shape = (*gradient.shape[:-1], *self._weight.shape[1:])
            parts["weight"] = gradient[..., : self._fan_in].reshape(shape)
        if self.bias:
            parts["bias"] = gradient[..., -1]
        return parts

    def _group_input(self, value: Tensor) -> Tensor:
        if self._groups == 1:
            return value
        return value.chunk(self._groups, dim=1)[self.group]

    def _unfold(self, value: Tensor) -> Tensor:
        if not isinstance(self.module, nn.Conv2d):
            return value.reshape(len(value), -1, value.shape[-1]).transpose(1, 2)
        value, padding = _padded(self.module, self._group_input(value))
        conv = self.module
        return functional.unfold(value, conv.kernel_size, conv.dilation, padding, conv.stride)

    def _num_positions(self, value: Tensor) -> int:
        if isinstance(self.module, nn.Conv2d):
            with torch.no_grad():
                return int(self.module(value[:1])[0, 0].numel())
        return value[0].numel() // value.shape[-1]


def _padded(conv: nn.Conv2d, value: Tensor) -> tuple[Tensor, tuple[int, int]]:
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return value, (conv.padding[0], conv.padding[1])
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return functional.pad(value, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)


def blocks_of(name: str, module: nn.Module, *, weight: bool, bias: bool) -> list[Block]:
    """Return the blocks of a supported layer, one a group."""
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    names = [name] if groups == 1 else [f"{name}/{group}" for group in range(groups)]
    return [Block(block, module, name, group, weight, bias) for group, block in enumerate(names)]
