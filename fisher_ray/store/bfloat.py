"""bfloat16, of which NumPy knows nothing: the upper half of a float32's bits."""

from __future__ import annotations

import numpy as np


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 values' nearest bfloat16, ties to even, as bits in uint16; too large ones become infinite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
