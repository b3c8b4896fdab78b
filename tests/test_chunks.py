"""Chunked derivatives: the same numbers, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float

import jacserve
from jacserve_server import Registry, serving

registry = Registry()
N = 600
X = np.random.default_rng(5).normal(size=N)


@registry.function
def mixing(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sin(jnp.cumsum(x)) + jnp.roll(x, 3) ** 2


@registry.function
def several(A: Float[Array, "p q"], b: Float[Array, "q"]) -> dict:
    return {"y": jnp.tanh(A) @ b, "k": jnp.arange(2), "z": (A * b, jnp.sum(b))}


@registry.function
def holomorphic(z: Complex[Array, "n"]) -> Complex[Array, "n"]:
    return z**2 * jnp.roll(z, 1)


@registry.function
def quartic(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(x**4) + jnp.sum(x) ** 2


@registry.function
def wide_inside(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Each product takes 20,000 numbers in between."""
    spread = jnp.sin(jnp.linspace(0.0, 1.0, 20_000)[:, None] * x[:2].sum())
    return x * jnp.sort(spread, axis=0).sum()


@pytest.fixture(scope="module")
def client():
    with serving(registry) as server, jacserve.Client(server.target) as connected:
        yield connected


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_many_products_come_in_chunks(client: jacserve.Client, mode) -> None:
    result = client.evaluate("mixing", X, mode=mode)
    assert (result.mode, result.chunk_size) == (mode, 512)
    x = X.astype("f8")
    lower = np.tril(np.ones((N, N))) * np.cos(np.cumsum(x))[:, None]
    expected = lower + np.diag(2 * np.roll(x, 3)) @ np.roll(np.eye(N), 3, axis=0)
    np.testing.assert_allclose(result.jacobian, expected, atol=1e-12)
    few = client.evaluate("mixing", X[:512], mode=mode)
    assert few.chunk_size is None


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_several_arguments_and_results_in_chunks(client, mode) -> None:
    random = np.random.default_rng(1)
    A, b = random.normal(size=(25, 24)), random.normal(size=24)
    result = client.evaluate("several", (A, b), mode=mode, layout="blocks")
    assert result.chunk_size == 512
    with jax.enable_x64(True):
        expected = jax.jacfwd(
            lambda *inputs: {**several(*inputs), "k": 0.0}, argnums=(0, 1)
        )(A, b)
    for path in (lambda t: t["y"], lambda t: t["z"][0], lambda t: t["z"][1]):
        for name, block in zip("Ab", path(expected), strict=True):
            np.testing.assert_allclose(path(result.jacobian)[name], block, atol=1e-13)


def test_complex_functions_in_chunks(client: jacserve.Client) -> None:
    z = X * np.exp(1j * X)
    for mode in ("forward", "reverse"):
        result = client.evaluate("holomorphic", z, mode=mode)
        assert result.chunk_size == 512
        expected = np.diag(2 * z * np.roll(z, 1)) + np.roll(
            np.diag(np.roll(z, -1) ** 2), 1, 0
        )
        np.testing.assert_allclose(result.jacobian, expected, atol=1e-12)  # fmt: skip


def test_hessians_in_chunks(client: jacserve.Client) -> None:
    result = client.evaluate("quartic", X, quantities=("hessian", "value"))
    assert result.chunk_size == 512
    np.testing.assert_allclose(result.hessian, np.diag(12 * X**2) + 2, atol=1e-12)


def test_batches_count_into_the_chunk(client: jacserve.Client) -> None:
    result = client.evaluate("mixing", np.stack([X, 2 * X, 3 * X]))
    assert result.chunk_size == 128
    np.testing.assert_allclose(
        result.jacobian[1], client.jacobian("mixing", 2 * X), atol=1e-12
    )


def test_what_would_not_fit_is_made_in_chunks() -> None:
    x = X[:100]
    with serving(registry) as server, jacserve.Client(server.target) as client:
        whole = client.evaluate("wide_inside", x, mode="forward")
        assert whole.chunk_size is None
    with (
        serving(registry, max_program_bytes=4 * 2**20) as server,
        jacserve.Client(server.target) as client,
    ):
        pieces = client.evaluate("wide_inside", x, mode="forward")
        assert pieces.chunk_size in {8, 1}
        np.testing.assert_allclose(pieces.jacobian, whole.jacobian, rtol=1e-12)


def test_what_fits_in_no_chunks_is_refused_with_the_numbers() -> None:
    with (
        serving(registry, max_program_bytes=2**20) as server,
        jacserve.Client(server.target) as client,
    ):
        with pytest.raises(jacserve.CapacityError) as caught:
            client.jacobian("mixing", X)
        assert caught.value.reason == "DEVICE_OUT_OF_MEMORY"
        assert int(caught.value.metadata["program_bytes"]) > 600 * 600 * 8
        assert caught.value.metadata["max_program_bytes"] == str(2**20)
        assert client.jvp("mixing", X, X).shape == (N,)
