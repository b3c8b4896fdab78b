"""Functions to serve: `jacserve serve examples/functions.py`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jacserve_server import Registry

registry = Registry()


@registry.function
def spherical(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Spherical (r, polar, azimuth) to Cartesian coordinates."""
    r, polar, azimuth = x
    return jnp.stack(
        [
            r * jnp.sin(polar) * jnp.cos(azimuth),
            r * jnp.sin(polar) * jnp.sin(azimuth),
            r * jnp.cos(polar),
        ]
    )


@registry.function
def rosenbrock(x: Float[Array, "n"]) -> Float[Array, ""]:
    """The banana valley of optimisers: a scalar function, least at (1, ..., 1)."""
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


@registry.function
def classifier(
    pixels: Float[Array, "784"], weights: Float[Array, "10 785"]
) -> Float[Array, "10"]:
    """Probabilities of the ten digits, from 28 x 28 pixels.

    A softmax regression: `weights` has a row for each digit, its bias last.
    """
    return jax.nn.softmax(weights[:, :-1] @ pixels + weights[:, -1])


@registry.function
def circle_and_parabola(x: Float[Array, "2"]) -> Float[Array, "2"]:
    """Zero where the circle u^2 + v^2 = 4 meets the parabola v = u^2 - 1."""
    u, v = x
    return jnp.stack([u**2 + v**2 - 4.0, u**2 - v - 1.0])
