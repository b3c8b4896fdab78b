"""What is served: functions of several kinds, so that nothing is tuned to one."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jacserve_server import Registry

registry = Registry()


def weights(n: int) -> np.ndarray:
    """Returns a matrix [n, n] that neither grows nor shrinks what it multiplies."""
    return np.random.default_rng(n).normal(size=(n, n)).astype("f4") / np.sqrt(n)


@registry.function
def layer(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """tanh(W x): a dense product, and a dense Jacobian."""
    return jnp.tanh(jnp.asarray(weights(x.size)) @ x)


@registry.function
def wave(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """Elementwise: next to no work for each number of the Jacobian."""
    return jnp.sin(x) * jnp.exp(-x)


@registry.function
def orbit(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """A hundred steps in sequence, each a dense product."""
    matrix = jnp.asarray(weights(x.size))

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + 0.01 * jnp.tanh(matrix @ x), None

    return jax.lax.scan(step, x, None, length=100)[0]


@registry.function
def total(x: Float32[Array, "n"]) -> Float32[Array, ""]:
    """A sum of squares: a large input, and a small result."""
    return jnp.sum(x * x)
