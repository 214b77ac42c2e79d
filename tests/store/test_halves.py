"""Conversion to and from float16 by torch gives the bits that NumPy gives."""

import numpy as np
import pytest

from fisher_ray.store.halves import SMALL, divide_to_half, is_finite, multiply_from_half

SHAPES = [(7,), (SMALL, 3), (2, 2, SMALL)]
SCALES = [1.0, 2.0**-7, 0.3]


def numbers(shape, dtype=np.float32):
    chance = np.random.default_rng(0)
    spread = 10.0 ** chance.uniform(-9, 5, shape)  # subnormal, normal and too large for float16
    return (spread * chance.choice([-1, 1], shape)).astype(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.filterwarnings("ignore:overflow")
def test_halves_are_numpys(shape, scale, dtype):
    values = np.clip(numbers(shape), -6e4, 6e4).astype(dtype)
    with np.errstate(over="ignore"):
        expected = (values.astype(np.float32) / np.float32(scale)).astype(np.float16)
    out = np.empty(shape, np.float16)
    divide_to_half(values, scale, out)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))

    back = np.empty(shape, np.float32)
    multiply_from_half(expected, scale, back)
    np.testing.assert_array_equal(back, expected.astype(np.float32) * np.float32(scale))


def test_read_only_and_reversed_arrays_are_converted_too():
    values, out = numbers((SMALL, 2)), np.empty((SMALL, 2), np.float16)
    values.setflags(write=False)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
        divide_to_half(values, 1.0, out)
        np.testing.assert_array_equal(out, expected)
        divide_to_half(values[::-1], 1.0, out)
    np.testing.assert_array_equal(out, expected[::-1])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(wrong):
    values = np.array([[1.0, -65504.0], [0.0, 6e-8]], np.float16)
    assert is_finite(values)
    assert is_finite(values[:, ::2])
    values[1, 0] = wrong
    assert not is_finite(values)
    assert is_finite(np.empty((0, 3), np.float16))


def test_packed_records_are_converted_too():
    """Whose numbers are not at multiples of their size, which torch does not take."""
    records = np.zeros((SMALL, 3), np.dtype([("flag", "i1"), ("value", "f4")]))
    records["value"] = np.arange(SMALL * 3).reshape(SMALL, 3) / 64
    out = np.empty((SMALL, 3), np.float16)
    divide_to_half(records["value"], 1.0, out)
    np.testing.assert_array_equal(out, records["value"].astype(np.float16))
