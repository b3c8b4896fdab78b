"""Functions that take much more memory than what they return."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jacserve_server import Registry

registry = Registry()


@registry.function
def waves(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Multiplies with a matrix of n^2 sines, and so does each product with J."""
    return jnp.sin(jnp.outer(x, x)) @ x


@registry.function
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2.0 * x
