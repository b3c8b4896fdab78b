"""Determinants of square matrices of any size, of LAPACK's and of ours."""

from collections.abc import Iterator

import numpy as np
import pytest
from jaxtyping import Array, Complex, Float

import jacserve
from jacserve_server import Registry, serving

registry = Registry()
SIZES = (1, 2, 3, 4, 5, 7)
QUANTITIES = ("determinant", "abs_determinant", "slogdet")


@registry.function
def linear(m: Float[Array, "n n"], x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Has m as its Jacobian."""
    return m @ x


@registry.function
def complex_linear(
    m: Complex[Array, "n n"], x: Complex[Array, "n"]
) -> Complex[Array, "n"]:
    return m @ x


@pytest.fixture(scope="module")
def client() -> Iterator[jacserve.Client]:
    with serving(registry) as server, jacserve.Client(server.target) as connected:
        yield connected


def determinants(client: jacserve.Client, matrices: np.ndarray) -> jacserve.Result:
    name = "complex_linear" if matrices.dtype.kind == "c" else "linear"
    x = np.ones(matrices.shape[:-1], matrices.dtype)
    return client.evaluate(name, (matrices, x), quantities=QUANTITIES, wrt="x")


@pytest.mark.parametrize("dtype", ["f4", "f8", "c16"])
@pytest.mark.parametrize("n", SIZES)
def test_they_are_those_of_numpy(client: jacserve.Client, n: int, dtype: str) -> None:
    random = np.random.default_rng(n)
    matrices = random.normal(size=(50, n, n))
    if dtype == "c16":
        matrices = matrices + 1j * random.normal(size=(50, n, n))
    matrices = matrices.astype(dtype)
    matrices[0] = np.eye(n)[::-1]
    matrices[1] = np.tril(matrices[1])
    # What a pivot has to be looked for in.
    matrices[2, 0, 0] = 0
    matrices[3, 0] *= 1e-12
    wide = matrices.astype("c16" if dtype == "c16" else "f8")
    found, det = determinants(client, matrices), np.linalg.det(wide)
    sign, log = np.linalg.slogdet(wide)
    # That of n rows of its size is what rounding is relative to.
    scale = np.prod(np.linalg.norm(wide, axis=-1), axis=-1) * np.finfo(dtype).eps * 32
    assert np.all(np.abs(found.determinant - det) <= scale)
    assert np.all(np.abs(found.abs_determinant - np.abs(det)) <= scale)
    assert np.all(np.abs(found.slogdet[0] * np.exp(found.slogdet[1]) - det) <= scale)
    is_clear = np.abs(det) > 100 * scale
    assert is_clear.sum() > 40
    np.testing.assert_allclose(found.slogdet[0][is_clear], sign[is_clear], atol=0.1)
    np.testing.assert_allclose(found.slogdet[1][is_clear], log[is_clear], atol=0.1)


@pytest.mark.parametrize("n", SIZES)
def test_singular_ones_are_zero(client: jacserve.Client, n: int) -> None:
    matrices = np.arange(1.0, 3 * n * n + 1).reshape(3, n, n) % 5
    matrices[0] = 0
    matrices[1, -1] = 0
    matrices[2, :, 0] = 0
    found = determinants(client, matrices)
    np.testing.assert_array_equal(found.determinant, np.zeros(3))
    np.testing.assert_array_equal(found.slogdet[0], np.zeros(3))
    np.testing.assert_array_equal(found.slogdet[1], np.full(3, -np.inf))


@pytest.mark.parametrize("n", SIZES)
def test_one_with_nan_is_nan(client: jacserve.Client, n: int) -> None:
    matrices = np.tile(np.eye(n), (2, 1, 1))
    matrices[0, -1, 0] = matrices[1, 0, -1] = np.nan
    found = determinants(client, matrices)
    assert np.isnan(found.determinant).all()
    assert np.isnan(found.slogdet[1]).all()
    assert not found.finite
