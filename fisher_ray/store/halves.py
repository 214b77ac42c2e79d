"""Conversion between float16 and float32 as quick as memory: NumPy's takes ten times as long."""

from __future__ import annotations

import numpy as np

SMALL = 4096
"""Numbers that NumPy converts sooner than torch is asked to."""


def divide_to_half(values: np.ndarray, scale: float, out: np.ndarray) -> None:
    """Write ``values / scale``, in float32 and then rounded to the nearest float16, ties to even.

    Args:
        values: float16 or float32.
        scale: positive.
        out: float16 of the same shape.
    """
    if _is_plain(values, out):
        import torch

        given = torch.from_numpy(values)
        torch.from_numpy(out).copy_(given if scale == 1.0 else given.float() / np.float32(scale).item())
    else:
        np.divide(values, np.float32(scale), out=out, casting="same_kind", dtype=np.float32)


def multiply_from_half(values: np.ndarray, scale: float, out: np.ndarray) -> None:
    """Write ``values · scale``, in float32.

    Args:
        values: float16.
        scale: positive.
        out: float32 of the same shape.
    """
    if _is_plain(values, out):
        import torch

        target = torch.from_numpy(out)
        target.copy_(torch.from_numpy(values))
        if scale != 1.0:
            target.mul_(np.float32(scale).item())
    else:
        np.multiply(values, np.float32(scale), out=out, dtype=np.float32)


def is_finite(values: np.ndarray) -> bool:
    """Whether all of some float16 numbers are finite: none has an exponent of ones alone."""
    bits = np.ascontiguousarray(values).view(np.int16)
    if not bits.size:
        return True
    return int(bits.max()) < 0x7C00 and int(bits.view(np.uint16).max()) < 0xFC00  # +inf, NaN; -inf, NaN


def _is_plain(values: np.ndarray, out: np.ndarray) -> bool:
    """Whether torch takes both arrays as they are, and it pays."""
    return out.size >= SMALL and all(
        array.dtype.isnative
        and array.flags.writeable
        and all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
        for array in (values, out)
    )
