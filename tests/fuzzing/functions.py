"""Functions whose answers tell which query they are of.

Each multiplies by a number of its own, so that a closed form knows the answer of any
query, and an answer of another query is seen.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from jacserve_server import Registry

registry = Registry()


@registry.function
def triple(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Times 3, at a fixed size."""
    return 3 * x


@registry.function(name="triple", version=2)
def triple_again(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Times -3: a second version."""
    return -3 * x


@registry.function
def five(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Times 5: a name as long as others, so that only its bytes tell them apart."""
    return 5 * x


@registry.function
def nine(x: Float[Array, "3"]) -> Float[Array, "3"]:
    """Times 9."""
    return 9 * x


@registry.function(max_batch=8)
def seven(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Times 7, of any size."""
    return 7 * x


@registry.function
def total(x: Float[Array, "3"]) -> Float[Array, ""]:
    """The sum of squares times 11: a scalar."""
    return 11 * jnp.sum(x**2)


@registry.function
def pair(x: Float[Array, "2"], y: Float[Array, "2"]) -> dict[str, Any]:
    """Two arguments, and a nested result."""
    return {"near": 13 * x - y, "far": (17 * y, 19 * x[0])}


@registry.function
def mixed(x: Float[Array, "2"], i: Int[Array, "2"], b: Bool[Array, ""]):
    """Arguments that are no real numbers."""
    return jnp.where(b, 23 * x, 29 * x) + i


@registry.function
def turned(z: Complex[Array, "2"]) -> Complex[Array, "2"]:
    """Times 31i."""
    return 31j * z


@registry.function
def stencil(u: Float[Array, "8"]) -> Float[Array, "8"]:
    """Sparse, and linear: times 2, and the right neighbour's subtracted."""
    return 2 * u - jnp.roll(u, -1)


FACTORS = {
    "triple@1": 3.0, "triple@2": -3.0, "five@1": 5.0, "nine@1": 9.0, "seven@1": 7.0,
    "turned@1": 31j,
}  # fmt: skip


def closed_forms(function: str, x: np.ndarray) -> dict[str, np.ndarray] | None:
    """What is known of a function at x, by quantity; None where nothing is."""
    factor = FACTORS.get(function)
    if factor is None:
        return None
    n = x.shape[-1]
    factor = x.dtype.type(factor)
    jacobian = np.broadcast_to(factor * np.eye(n, dtype=x.dtype), (*x.shape, n))
    return {
        "value": factor * x,
        "jacobian": jacobian,
        "determinant": np.broadcast_to(factor**n, x.shape[:-1]),
    }
