"""The input of a convolution in one, two or three dimensions as patches."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def num_positions(conv: Convolution, value: Tensor) -> int:
    """Return how many positions the convolution has on ``value`` ``(B, C, ...)``."""
    sizes = padded(conv, value[:1]).shape[2:]
    spans = ((k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return math.prod((n - span) // s + 1 for n, span, s in zip(sizes, spans, conv.stride, strict=True))


def patches(conv: Convolution, value: Tensor, out: Tensor | None = None) -> Tensor:
    """Unfold one group's input ``(B, C, ...)`` to patches ``(B, C · kernel, T)``, into ``out`` if given."""
    windows, axes = padded(conv, value), len(conv.kernel_size)
    for axis, (size, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2):
        windows = windows.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    windows = windows.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))  # (B, C, kernel, positions)
    shape = (len(value), math.prod(windows.shape[1 : 2 + axes]), math.prod(windows.shape[2 + axes :]))
    if out is None:
        return windows.reshape(shape)
    out.view(windows.shape).copy_(windows)
    return out
