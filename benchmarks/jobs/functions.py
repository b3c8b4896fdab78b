"""What jobs compute: a small function, a large one, and one for the calls beside."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from benchmarks.fast_path.functions import layer, weights
from jacserve_server import Registry

registry = Registry()
registry.function(layer)


@registry.function
def sphere(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Spherical to Cartesian coordinates: next to no work for each point."""
    r, polar, azimuth = x
    return jnp.stack(
        [
            r * jnp.sin(polar) * jnp.cos(azimuth),
            r * jnp.sin(polar) * jnp.sin(azimuth),
            r * jnp.cos(polar),
        ]
    )


@registry.function
def layers(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """Three layers of tanh(W x): dense products, and a dense Jacobian."""
    matrix = jnp.asarray(weights(x.size))
    for _ in range(3):
        x = jnp.tanh(matrix @ x)
    return x
