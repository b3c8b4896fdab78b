"""What the soak calls: `closed_forms.py` knows the answers."""

import ctypes
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jacserve_server import Registry

registry = Registry()
# In a process of their own, which not every test has to start.
isolated = Registry()

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


@registry.function
def witnessed(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """What the witness alone calls, so that it knows how often."""
    return 3 * x


@isolated.function(isolation="process")
def steady(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Shares a worker with one that ends it."""
    return x * jnp.roll(x, -1)


SEGFAULTS, NEVER_ENDS = -1.0, -2.0


def _misbehave(x: np.ndarray) -> np.ndarray:
    if np.ravel(x)[0] == SEGFAULTS:
        ctypes.string_at(0)
    while np.ravel(x)[0] == NEVER_ENDS:
        time.sleep(1.0)
    return np.asarray(x)


@isolated.function(isolation="process", max_execute_s=2)
def wild(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Ends its worker at some points, and the patience of the server at others."""
    return jax.pure_callback(_misbehave, x, x)
