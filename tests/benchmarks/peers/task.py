"""What one library's process keeps account of, and tells its parent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.benchmarks.process import memory


class Task:
    """One library's turn.

    Args:
        out: an empty folder. What stays of the training rows' gradients goes into ``vectors``, the scores ``(Q, N)``
            into ``scores.npy`` and, if these are no plain dot products, those into ``products.npy``.

    Attributes:
        out: as given.
        vectors: the folder of the vectors.
    """

    def __init__(self, out: Path) -> None:
        """See the class."""
        self.out, self.vectors = out, out / "vectors"
        self.vectors.mkdir()
        self._seconds: dict[str, float] = {}
        self._stored_bytes = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside: ``gradients`` until they are stored, ``scores`` from there."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add a stage's time that was measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def keep_scores(self, scores: np.ndarray) -> None:
        """Write ``(Q, N)`` to disk."""
        np.save(self.out / "scores.npy", scores.astype(np.float32, copy=False))

    def keep_products(self, products: np.ndarray) -> None:
        """Write the vectors' plain dot products ``(Q, N)``, where the scores are others."""
        np.save(self.out / "products.npy", products.astype(np.float32, copy=False))

    def tell_stored(self, *globs: str) -> None:
        """Say which files in :attr:`vectors` hold the training rows, without what there is but once."""
        files = {path for glob in globs for path in self.vectors.glob(glob) if path.is_file()}
        self._stored_bytes = sum(path.stat().st_size for path in files)

    def finish(self, version: str) -> None:
        """Print what the parent reads."""
        told = {
            "version": version,
            "peak_bytes": memory("VmHWM"),
            "stored_bytes": self._stored_bytes,
            "seconds": self._seconds,
        }
        print(json.dumps(told))
