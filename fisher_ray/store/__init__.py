"""Stores of arrays: Zarr v3 groups with a checksum on every chunk, a manifest for every unit, and a seal at the end.

A *feature store* is written in units by many workers, a *group of arrays* in one go; readers take neither unsealed.
"""

from fisher_ray.store.arrays import load_arrays, save_arrays
from fisher_ray.store.batches import Batches
from fisher_ray.store.check import describe, verify
from fisher_ray.store.layout import SEAL, ArraySpec, StoreSpec
from fisher_ray.store.reader import FeatureStore, open_features
from fisher_ray.store.repair import Repair, repair
from fisher_ray.store.seal import finished_units, seal
from fisher_ray.store.statistics import bars, glance
from fisher_ray.store.writer import StoreWriter, create_store
from fisher_ray.store.zarr_group import open_arrays

__all__ = [
    "SEAL",
    "ArraySpec",
    "Batches",
    "FeatureStore",
    "Repair",
    "StoreSpec",
    "StoreWriter",
    "bars",
    "create_store",
    "describe",
    "finished_units",
    "glance",
    "load_arrays",
    "open_arrays",
    "open_features",
    "repair",
    "save_arrays",
    "seal",
    "verify",
]
