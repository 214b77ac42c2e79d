"""Rows of Parquet, NumPy, Zarr and torch data sets as batches: units, decoding, checks, prefetch."""

from fisher_ray.data.loading import check_source, load_batches, training_batches
from fisher_ray.data.opening import open_source
from fisher_ray.data.source import Source
from fisher_ray.data.units import choose_units, plan_units

__all__ = [
    "Source",
    "check_source",
    "choose_units",
    "load_batches",
    "open_source",
    "plan_units",
    "training_batches",
]
