"""Random numbers that are pure functions of (seed, epoch, row): the same on every machine, in every batch and order."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER, _GENERATOR = 1, 2


def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return a permutation of ``range(num_rows)``, int64."""
    return np.argsort(_draw(seed, epoch, num_rows, _ORDER), kind="stable")


def generator_seeds(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return each row's seed for a ``torch.Generator``, uint64 below 2⁶³, indexed by row."""
    return _draw(seed, epoch, num_rows, _GENERATOR) >> np.uint64(1)


def _draw(seed: int, epoch: int, num_rows: int, stream: int) -> np.ndarray:
    state = np.zeros(1, dtype=np.uint64)
    for word in (seed, epoch, stream):
        state = _mix(state ^ np.uint64(word % 2**64))
    return _mix(np.arange(num_rows, dtype=np.uint64) * _GOLDEN + state)


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea & Flood, 2014); array arithmetic wraps silently, as it must here."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
