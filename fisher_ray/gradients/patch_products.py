"""The second moment of a convolution's patches without unfolding them: patches overlap, and so do their products."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_ray.gradients.convolution import Convolution, padded, positions

MIN_CHANNELS = 16
"""With fewer, products of two pixels are too small to be fast."""
MAX_SIDE = 8192
"""Longer patches have no product formed of them whole."""
CHUNK_BYTES = 32 << 20
"""As much of the pixels' products as is held at a time, where one pixel's are not more."""


def patch_products(conv: Convolution, value: Tensor, bias: bool) -> Tensor | None:
    """Return ``Σ a aᵀ`` over pictures and positions, ``(A, A)``; None where unfolding is no slower.

    An entry of ``a aᵀ`` is the product of two pixels of a patch. For two places ``d`` and ``d + e`` in the kernel it is
    summed over all pixels ``u`` that come to stand at ``d``, and the product of the pixels ``u`` and ``u + e`` is the
    same whatever ``d`` is. So these products are summed over pictures once for each of the shifts ``e``, of which a
    kernel of ``k²`` places has ``2k² − 2k + 1`` up to a sign instead of ``k² (k² + 1) / 2`` pairs of places, and then,
    for each ``d``, over its pixels.

    Args:
        conv: the convolution.
        value: one group's input, ``(B, C, ...)``.
        bias: whether a trailing 1 belongs to ``a``.
    """
    if not _pays(conv, value):
        return None
    counts = positions(conv, value)
    lows = list(conv._reversed_padding_repeated_twice[-2::-2])  # there, the last axis comes first
    if conv.padding_mode != "zeros":  # zeros beyond the edge need no products
        value, lows = padded(conv, value), [0] * len(lows)
    axes = [
        _Axis(*numbers)
        for numbers in zip(value.shape[2:], conv.kernel_size, conv.stride, conv.dilation, lows, counts, strict=True)
    ]
    pixels = value.movedim((0, 1), (-2, -1)).contiguous()  # (..., B, C)
    places = list(itertools.product(*(range(axis.kernel) for axis in axes)))
    channels, size = value.shape[1], len(places)
    blocks = value.new_empty(size, size, channels, channels)
    for shift in itertools.product(*(range(1 - axis.kernel, axis.kernel) for axis in axes)):
        if shift >= (0,) * len(axes):
            _fill(blocks, pixels, axes, shift)
    products = blocks.permute(2, 0, 3, 1).reshape(channels * size, channels * size)
    return _with_ones(products, pixels, axes, places, value) if bias else products


@dataclass(frozen=True)
class _Axis:
    """One axis of the picture and of the kernel."""

    size: int
    kernel: int
    stride: int
    dilation: int
    low: int
    count: int

    def span(self, shift: int) -> slice:
        """Return the pixels ``u`` for which ``u + e`` is in the picture too."""
        gap = shift * self.dilation
        return slice(max(0, -gap), max(0, -gap, self.size - max(0, gap)))

    def seen(self, place: int, span: slice, like: Tensor) -> Tensor:
        """Return 1 for the pixels of a span that come to stand at a place in the kernel, else 0."""
        first = place * self.dilation - self.low
        mask = like.new_zeros(self.size)
        found = [first + self.stride * t for t in range(self.count)]
        mask[[u for u in found if 0 <= u < self.size]] = 1
        return mask[span]


def _pays(conv: Convolution, value: Tensor) -> bool:
    """Whether there is at least half as little to multiply, as far as both ways' products are as fast."""
    channels, size = value.shape[1], math.prod(conv.kernel_size)
    if channels < MIN_CHANNELS or not 1 < size <= MAX_SIDE // channels:
        return False
    shifts = (math.prod(2 * k - 1 for k in conv.kernel_size) + 1) // 2
    once = shifts * math.prod(value.shape[2:]) * 2 * (len(value) + size)
    return 2 * once < len(value) * math.prod(positions(conv, value)) * size**2


def _fill(blocks: Tensor, pixels: Tensor, axes: list[_Axis], shift: tuple[int, ...]) -> None:
    """Fill in the blocks of all pairs of places that are ``shift`` apart, and their mirror images."""
    spans = [axis.span(e) for axis, e in zip(axes, shift, strict=True)]
    left = pixels[tuple(spans)]
    right = pixels[tuple(axis.span(-e) for axis, e in zip(axes, shift, strict=True))]
    left, right = left.flatten(0, -3), right.flatten(0, -3)  # (n, B, C)
    ranges = (range(max(0, -e), axis.kernel - max(0, e)) for axis, e in zip(axes, shift, strict=True))
    firsts = list(itertools.product(*ranges))
    masks = _masks(axes, firsts, spans, pixels)
    channels = pixels.shape[-1]
    total = pixels.new_zeros(len(firsts), channels**2)
    step = max(1, CHUNK_BYTES // (channels**2 * pixels.element_size()))
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        total.addmm_(masks[:, part], torch.bmm(left[part].transpose(1, 2), right[part]).flatten(1))
    kernel = [axis.kernel for axis in axes]
    for place, block in zip(firsts, total.view(-1, channels, channels), strict=True):
        first = _flat(place, kernel)
        second = _flat([d + e for d, e in zip(place, shift, strict=True)], kernel)
        blocks[second, first] = block.T
        blocks[first, second] = block


def _masks(axes: list[_Axis], places: list[tuple[int, ...]], spans: list[slice], like: Tensor) -> Tensor:
    """Return for each place which pixels come to stand there, ``(places, pixels)``."""
    seen = [[axis.seen(d, span, like) for d in range(axis.kernel)] for axis, span in zip(axes, spans, strict=True)]
    rows = []
    for place in places:
        row = like.new_ones(1)
        for masks, d in zip(seen, place, strict=True):
            row = torch.outer(row, masks[d]).flatten()
        rows.append(row)
    return torch.stack(rows)


def _with_ones(
    products: Tensor, pixels: Tensor, axes: list[_Axis], places: list[tuple[int, ...]], value: Tensor
) -> Tensor:
    """Append the row and the column of a trailing 1."""
    spans = [slice(0, axis.size) for axis in axes]
    sums = _masks(axes, places, spans, pixels) @ pixels.sum(-2).flatten(0, -2)  # (places, C)
    sums = sums.T.flatten()
    size = len(products)
    out = products.new_empty(size + 1, size + 1)
    out[:size, :size], out[:size, size], out[size, :size] = products, sums, sums
    out[size, size] = len(value) * math.prod(axis.count for axis in axes)
    return out


def _flat(place: tuple[int, ...] | list[int], kernel: list[int]) -> int:
    flat = 0
    for d, size in zip(place, kernel, strict=True):
        flat = flat * size + d
    return flat
