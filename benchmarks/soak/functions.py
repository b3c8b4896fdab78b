"""What the soak calls: `closed_forms.py` knows the answers."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jacserve_server import Registry

registry = Registry()

SLOW_S = 0.2


@registry.function
def cycle(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Products of neighbours, around."""
    return x * jnp.roll(x, -1)


@registry.function
def cubes(x: Float[Array, "n"]) -> Float[Array, ""]:
    """The sum of cubes."""
    return jnp.sum(x**3)


@registry.function
def stencil(u: Float[Array, "n"]) -> Float[Array, "n"]:
    """A point times its right neighbour: two entries in each row of J."""
    return u * jnp.roll(u, -1)


@registry.function
def scaled(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """As many numbers back as came."""
    return 2 * x + 1


@registry.function
def roots(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """NaN where x is negative."""
    return jnp.sqrt(x)


def _wait(x: np.ndarray) -> np.ndarray:
    time.sleep(SLOW_S)
    return np.asarray(x)


@registry.function
def slow(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Takes longer than some wait."""
    return jax.pure_callback(_wait, x, x)


def _fail(x: np.ndarray) -> np.ndarray:
    raise RuntimeError("the pump is dry")


@registry.function
def failing(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Fails while it runs."""
    return jax.pure_callback(_fail, x, x)
