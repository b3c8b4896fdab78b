"""The functions that are served; put yours here."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jacserve_server import Registry

registry = Registry()


@registry.function
def polar(x: Float[Array, "2"]) -> Float[Array, "2"]:
    """Polar (r, angle) to Cartesian coordinates."""
    return x[0] * jnp.stack([jnp.cos(x[1]), jnp.sin(x[1])])
