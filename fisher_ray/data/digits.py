"""Scikit-learn's 1,797 handwritten digits, for the demo: small, real, and no download."""

from __future__ import annotations

import numpy as np

from fisher_ray.errors import ConfigError

SPLITS = {"train": range(600), "shallow": range(600, 1200), "test": range(1200, 1797)}
_SPLIT_SEED = 0


class Digits:
    """Map-style data set of ``(picture, label)``."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        """Hold ``pictures``, float32 ``(N, 8, 8)`` in [0, 1], and ``labels`` ``(N,)``."""
        self._pictures, self._labels = pictures, labels

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        """Return one picture and its class."""
        return self._pictures[row], int(self._labels[row])


def digits(split: str) -> Digits:
    """Return one of three disjoint parts, the same on every machine: 600, 600 and 597 pictures.

    Args:
        split: ``train``, ``shallow`` or ``test``.

    Raises:
        ConfigError: if ``split`` is another, or scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ConfigError(f"digits has no split {split!r}. Choose one of: {', '.join(SPLITS)}.")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        message = 'the digits come with scikit-learn, which is missing. Install it: pip install "fisher_ray[demo]".'
        raise ConfigError(message) from error
    bunch = load_digits()
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(bunch.target))  # a stream NumPy keeps as it is
    rows = order[SPLITS[split].start : SPLITS[split].stop]
    return Digits((bunch.images[rows] / 16).astype(np.float32), bunch.target[rows].astype(np.int64))
