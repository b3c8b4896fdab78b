"""What is served: functions of several kinds, so that nothing is tuned to one."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jacserve_server import Registry

registry = Registry()


def weights(n: int, m: int | None = None) -> np.ndarray:
    """Returns a matrix [m or n, n] that keeps the size of what it multiplies."""
    shape = (m or n, n)
    return np.random.default_rng(n).normal(size=shape).astype("f4") / np.sqrt(n)


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
def network(x: Float32[Array, "n"]) -> Float32[Array, ""]:
    """Two hidden layers of 1,024, and one number: its Jacobian is one backward pass."""
    hidden = jnp.tanh(jnp.asarray(weights(x.size, 1024)) @ x)
    return jnp.sum(jnp.tanh(jnp.asarray(weights(1024)) @ hidden))


@registry.function
def total(x: Float32[Array, "n"]) -> Float32[Array, ""]:
    """A sum of squares: a large input, and a small result."""
    return jnp.sum(x * x)
