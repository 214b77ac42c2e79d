"""Sparse features: as many values of each row and score as of any other, and the coordinates that they belong to."""

import numpy as np
import xarray
import zarr

from fisher_ray.records import Unit
from fisher_ray.store import ArraySpec, StoreWriter, create_store, open_features, seal, verify
from tests.store.conftest import make_spec

KEPT, DIM = 6, 1000
ARRAYS = {
    "values": ArraySpec((3, KEPT), "float16", ("sample", "class", "entry"), 2.0**-4),
    "coordinates": ArraySpec((3, KEPT), "int32", ("sample", "class", "entry")),
    "index": ArraySpec((), "int64", ("sample",)),
}


def test_sparse_rows_come_back_whole_by_rows_in_batches_and_by_zarr_and_xarray(tmp_path):
    chance, url = np.random.default_rng(0), str(tmp_path / "s")
    values = np.round(chance.standard_normal((20, 3, KEPT)) * 64) / 64
    coordinates = np.sort(chance.integers(DIM, size=(20, 3, KEPT)), axis=2)
    create_store(url, make_spec(num_rows=20, arrays=ARRAYS))
    for unit in (Unit(0, 0, 8), Unit(1, 8, 16), Unit(2, 16, 20)):
        rows = slice(unit.start, unit.stop)
        given = {"values": values[rows].astype(np.float32), "coordinates": coordinates[rows].astype(np.int32)}
        StoreWriter(url).write_unit(unit, {**given, "index": np.arange(unit.start, unit.stop)})
    seal(url, 3)
    assert verify(url) == []

    store = open_features(url)
    np.testing.assert_array_equal(store.read("values", 3, 19), values[3:19].astype(np.float32))
    np.testing.assert_array_equal(store.read("coordinates", 3, 19), coordinates[3:19])
    dense = np.zeros((20, 3, DIM))
    np.put_along_axis(dense, coordinates, values, axis=2)
    for batch in store.iter_batches(7, ["values", "coordinates", "index"], shuffle=True, seed=1):
        again = np.zeros((len(batch["index"]), 3, DIM))
        np.put_along_axis(again, batch["coordinates"], batch["values"], axis=2)
        np.testing.assert_array_equal(again, dense[batch["index"]])

    group = zarr.open_group(url, mode="r")
    np.testing.assert_array_equal(group["coordinates"][:], coordinates)
    np.testing.assert_array_equal(group["values"][:] * group["values"].attrs["scale"], values)
    assert xarray.open_zarr(url)["values"].dims == ("sample", "class", "entry")
