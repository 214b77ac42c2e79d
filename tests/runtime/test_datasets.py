import numpy as np
import pytest
import ray

from fisher_ray import to_ray_dataset
from fisher_ray.errors import RequestError, StoreError
from tests.store.conftest import UNITS, make_rows, make_spec, write, write_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data warns of settings of its own
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def test_ray_data_gets_every_row_that_was_not_skipped(tmp_path):
    from fisher_ray.store import create_store, seal

    url = str(tmp_path / "store.zarr")
    create_store(url, make_spec())
    for unit in UNITS:
        write(url, unit, skipped={5: "torn"} if unit.index == 0 else None)
    seal(url, len(UNITS))
    dataset = to_ray_dataset(url, ["features", "labels", "index"])
    assert dataset.count() == 20
    expected, seen = make_rows(), []
    for batch in dataset.iter_batches(batch_size=6, batch_format="numpy"):
        rows = batch["index"]
        np.testing.assert_array_equal(batch["features"], expected["features"][rows])
        np.testing.assert_array_equal(batch["labels"], expected["labels"][rows])
        seen += rows.tolist()
    assert sorted(seen) == [row for row in range(21) if row != 5]
    sums = dataset.map_batches(lambda batch: {"sum": [batch["features"].sum()]}, batch_format="numpy").take_all()
    kept = np.delete(expected["features"], 5, axis=0)
    assert sum(row["sum"] for row in sums) == pytest.approx(kept.sum())


def test_what_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(StoreError, match="is not a store"):
        to_ray_dataset(str(tmp_path / "nothing"))
    write_store(str(tmp_path / "store.zarr"))
    with pytest.raises(StoreError, match="no array 'gone'"):
        to_ray_dataset(str(tmp_path / "store.zarr"), ["gone"])
    with pytest.raises(RequestError, match="no array is named"):
        to_ray_dataset(str(tmp_path / "store.zarr"), [])
    assert ray.is_initialized()
