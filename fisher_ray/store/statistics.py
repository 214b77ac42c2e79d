"""A glance at a feature store's values."""

from __future__ import annotations

from typing import Any

import numpy as np

from fisher_ray.store.reader import FeatureStore

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


def glance(store: FeatureStore) -> dict[str, Any]:
    """Return statistics of the arrays of numbers with a point, over one chunk in the store's middle.

    Returns:
        ``rows``: which; by array ``mean``, ``rms``, ``smallest``, ``largest``, and ``by_column``: the root mean square
        along the last axis as bars, from the smallest to the largest, on a log scale. Skipped rows are left out.
    """
    rows = store.rows(store.num_chunks // 2)
    names = [name for name, layout in store.arrays.items() if layout.dtype.endswith(("float16", "float32", "float64"))]
    block = store.read_kept(names, rows.start, rows.stop) if names else {}
    found: dict[str, Any] = {"rows": [rows.start, rows.stop]}
    for name, values in block.items():
        if not values.size:
            continue
        numbers = {
            "mean": values.mean(dtype=np.float64),
            "rms": np.sqrt(np.mean(np.square(values, dtype=np.float64))),
            "smallest": values.min(),
            "largest": values.max(),
        }
        found[name] = {key: float(f"{float(value):.4g}") for key, value in numbers.items()}
        if values.ndim > 1:
            square = np.square(values, dtype=np.float64).reshape(-1, values.shape[-1]).mean(axis=0)
            found[name]["by_column"] = bars(np.sqrt(square).tolist())
    return found


def bars(values: list[float]) -> str:
    """Draw positive values as a row of bars on a log scale, at most :data:`WIDTH` wide; others are blank."""
    pieces = np.array_split(np.asarray(values, np.float64), min(WIDTH, len(values)) or 1)
    means = np.array([piece.mean() if len(piece) else 0.0 for piece in pieces])
    usable = np.isfinite(means) & (means > 0)
    if not usable.any():
        return " " * len(means)
    logs = np.log10(means, where=usable, out=np.full(len(means), np.nan))
    low, high = np.nanmin(logs), np.nanmax(logs)
    places = np.nan_to_num((logs - low) / (high - low) if high > low else np.ones(len(logs)))
    heights = np.clip((places * len(BARS)).astype(int), 0, len(BARS) - 1)
    return "".join(BARS[height] if good else " " for height, good in zip(heights, usable, strict=True))
