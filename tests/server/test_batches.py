"""Which numbers are finite."""

import ml_dtypes
import numpy as np
import pytest

from jacserve_server.batches import finite_points

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@pytest.mark.parametrize("name", DTYPES)
def test_each_row_says_whether_all_of_its_numbers_are_finite(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        array = np.ones((5, 3, 2), dtype_of(name))
        assert finite_points([array, array], 5).tolist() == [True] * 5
        array[2, 1, 0] = bad
        found = finite_points([np.ones((5, 3, 2), dtype_of(name)), array], 5)
        assert found.tolist() == [True, True, False, True, True]
        assert not finite_points([array[2]], None)
        assert finite_points([array[1]], None).shape == ()


@pytest.mark.parametrize("name", DTYPES)
def test_large_numbers_are_finite_though_their_sum_is_not(name: str) -> None:
    largest = ml_dtypes.finfo(dtype_of(name)).max
    array = np.full((4, 50), largest, dtype_of(name))
    assert finite_points([array], 4).all()
    assert finite_points([array, np.array([1, 2, 3, 4])], 4).all()


def test_nothing_is_finite() -> None:
    assert finite_points([np.empty((0, 3))], 0).shape == (0,)
    assert finite_points([np.empty((3, 0))], 3).tolist() == [True] * 3
    assert finite_points([], None)
