import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fisher_ray.errors import DataError
from fisher_ray.records import Unit
from fisher_ray.store import ArraySpec, StoreWriter, create_store, open_features, seal, verify
from fisher_ray.store.bfloat import from_bfloat16, to_bfloat16
from tests.store.conftest import make_spec


@given(arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32)))
def test_rounding_is_torchs(values):
    expected = torch.from_numpy(values).bfloat16()
    bits = to_bfloat16(values)
    np.testing.assert_array_equal(from_bfloat16(bits), expected.float().numpy())
    number = ~np.isnan(values)
    np.testing.assert_array_equal(bits[number], expected.view(torch.uint16).numpy()[number])


def test_a_store_of_bfloat16_comes_back_as_float32_and_zarr_reads_its_bits(tmp_path, codec):
    url, values = str(tmp_path / "s"), np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    spec = {"x": ArraySpec((5,), "bfloat16", ("sample", "rank"))}
    create_store(url, make_spec(codec, num_rows=8, arrays=spec))
    StoreWriter(url).write_unit(Unit(0, 0, 8), {"x": values}, attempt=1, skipped={3: "torn"})
    seal(url, 1)
    store, expected = open_features(url), torch.from_numpy(values).bfloat16()
    read = store.read("x", 0, 8)
    assert read.dtype == np.float32
    assert np.isnan(read[3]).all()
    kept = np.delete(np.arange(8), 3)
    np.testing.assert_array_equal(read[kept], expected.float().numpy()[kept])
    np.testing.assert_array_equal(store.read("x", 1, 3), read[1:3])
    np.testing.assert_array_equal(store.read_raw("x", 4, 8), expected.view(torch.uint16).numpy()[4:])
    assert store.read("x", 4, 8, out_dtype=np.float64).dtype == np.float64
    array = zarr.open_group(url, mode="r")["x"]
    assert array.attrs["stored_as"] == "bfloat16"
    np.testing.assert_array_equal(from_bfloat16(array[:])[kept], read[kept])
    assert verify(url) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.4e38])
def test_what_bfloat16_cannot_hold_is_refused(tmp_path, bad):
    spec = {"x": ArraySpec((5,), "bfloat16", ("sample", "rank"))}
    create_store(str(tmp_path), make_spec(num_rows=8, arrays=spec))
    values = np.ones((8, 5), np.float32)
    values[6, 2] = bad
    with pytest.raises(DataError, match="row 6") as caught:
        StoreWriter(str(tmp_path)).write_unit(Unit(0, 0, 8), {"x": values})
    assert caught.value.row == 6
