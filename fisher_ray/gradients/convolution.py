"""The input of a convolution in one, two or three dimensions as patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def padded(conv: Convolution, value: Tensor) -> Tensor:
    """Return ``value`` ``(B, C, ...)`` with the convolution's own padding around it."""
    if conv.padding == "valid" or not any(conv._reversed_padding_repeated_twice):
        return value
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return functional.pad(value, conv._reversed_padding_repeated_twice, mode=mode)


def convolve(conv: Convolution, value: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve one group's input ``(B, C, ...)`` with other filters ``(I, C, ...)``; ``(B, I, ...)``."""
    padding: object = conv.padding
    if conv.padding_mode != "zeros" or isinstance(padding, str):
        value, padding = padded(conv, value), 0
    return _CONVOLVE[len(conv.kernel_size)](value, filters, bias, conv.stride, padding, conv.dilation)


def positions(conv: Convolution, value: Tensor) -> list[int]:
    """Return how many positions the convolution has along each axis of ``value`` ``(B, C, ...)``."""
    sizes = padded(conv, value[:1]).shape[2:]
    spans = ((k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return [(n - span) // s + 1 for n, span, s in zip(sizes, spans, conv.stride, strict=True)]


def patches(conv: Convolution, value: Tensor) -> Tensor:
    """Unfold one group's input ``(B, C, ...)`` to patches ``(B, C · kernel, T)``."""
    windows, axes = padded(conv, value), len(conv.kernel_size)
    for axis, (size, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2):
        windows = windows.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    windows = windows.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))  # (B, C, kernel, positions)
    return windows.reshape(len(value), math.prod(windows.shape[1 : 2 + axes]), -1)


def weight_gradients(conv: Convolution, value: Tensor, deltas: Tensor) -> Tensor:
    """Return ``Σ_t δ_t a_tᵀ`` without unfolding ``a``: the weight's gradient of a convolution whose groups are samples.

    Args:
        conv: the convolution.
        value: the input of ``G`` groups, of ``k`` pictures a sample, ``(b, k, C, ...)``.
        deltas: ``δ``, ``(b, G, O, k · T)``.

    Returns:
        ``(b, G, O, C / G · kernel)``.
    """
    batch, fold, channels = value.shape[:3]
    groups, num_outputs = deltas.shape[1:3]
    places = positions(conv, value[0])
    value = value.transpose(0, 1).reshape(fold, batch * channels, *value.shape[3:])
    padding = [0] * len(places)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        value = padded(conv, value)
    else:
        padding = list(conv.padding)
    joined = deltas.reshape(batch * groups * num_outputs, fold, *places).transpose(0, 1).contiguous()
    weight = value.new_empty(1).expand(joined.shape[1], channels // groups, *conv.kernel_size)  # for its shape
    _, made, _ = torch.ops.aten.convolution_backward(
        joined,
        value,
        weight,
        None,
        list(conv.stride),
        padding,
        list(conv.dilation),
        False,
        [0] * len(places),
        batch * groups,
        [False, True, False],
    )
    return cast(Tensor, made).reshape(batch, groups, num_outputs, -1)
