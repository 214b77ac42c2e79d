"""Sums in slices: each its own object in Ray's store, so that a large sum is merged and moved a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Arrays = dict[str, np.ndarray]

SLICE_BYTES = 64 * 2**20
"""About how large a slice is."""


def num_slices(num_bytes: int) -> int:
    """Return into how many slices a sum of so many bytes is cut."""
    return max(1, -(-num_bytes // SLICE_BYTES))


def cut(arrays: Arrays, number: int) -> list[Arrays]:
    """Cut every array along its first axis; those without axes go whole into the first slice. Views, not copies."""
    if number == 1:
        return [arrays]
    pieces = {name: np.array_split(value, number) if value.ndim else [value] for name, value in arrays.items()}
    return [{name: cuts[i] for name, cuts in pieces.items() if i < len(cuts)} for i in range(number)]


def join(slices: Sequence[Arrays]) -> Arrays:
    """Put together what :func:`cut` took apart; a single slice is returned as it is."""
    if len(slices) == 1:
        return slices[0]
    pieces = {name: [part[name] for part in slices if name in part] for name in slices[0]}
    return {name: np.concatenate(found) if found[0].ndim else found[0] for name, found in pieces.items()}
