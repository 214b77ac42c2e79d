import numpy as np
import pytest

from fisher_ray.runtime.slices import SLICE_BYTES, cut, join, num_slices

ARRAYS = {
    "matrix": np.arange(21.0).reshape(7, 3),
    "vector": np.arange(2),
    "number": np.array(4.5),
    "nothing": np.empty((0, 3), np.float32),
}


@pytest.mark.parametrize("number", [1, 2, 7, 20])
def test_slices_put_together_are_what_was_cut(number):
    joined = join(cut(ARRAYS, number))

    assert list(joined) == list(ARRAYS)
    for name, value in ARRAYS.items():
        assert (joined[name].dtype, joined[name].shape) == (value.dtype, value.shape)
        assert joined[name].tolist() == value.tolist()


def test_slices_are_views_of_about_the_same_size():
    parts = cut({"matrix": np.zeros((10, 4))}, 3)

    assert [len(part["matrix"]) for part in parts] == [4, 3, 3]
    assert all(part["matrix"].base is not None for part in parts)


@pytest.mark.parametrize(("num_bytes", "number"), [(0, 1), (1, 1), (SLICE_BYTES, 1), (SLICE_BYTES + 1, 2)])
def test_a_slice_holds_at_most_so_many_bytes(num_bytes, number):
    assert num_slices(num_bytes) == number
