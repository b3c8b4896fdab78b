"""Newton's method for f(x) = 0: x + s is the next iterate, where J s = -f(x)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import lu_factor, lu_solve

from jacserve.vocabulary import Layout
from jacserve_server.transforms.jacobian import by_argument
from jacserve_server.transforms.point import Point
from jacserve_server.transforms.precision import real_dtype, widened
from jacserve_server.transforms.products import ravelled, shaped


def newton_step(point: Point, layout: Layout) -> Any:
    """Returns the solution s [n] of J s = -f(x), or an array like each argument.

    For a square J by an LU factorisation, and NaN where J is singular to its
    precision; else the shortest of the least-squares solutions, the Gauss-Newton
    step.
    """
    matrix = widened(point.matrix)
    leaves = [leaf.array for leaf in point.results]
    target = -ravelled(leaves, leaves).astype(matrix.dtype)
    m, n = matrix.shape
    if not m or not n:
        step = jnp.zeros(n, matrix.dtype)
    elif m == n:
        step = _solution(matrix, target)
    else:
        step = jnp.linalg.lstsq(matrix, target)[0]
    step = step.astype(point.matrix.dtype)
    if layout != "blocks":
        return step
    return by_argument(point, shaped(step, point.arguments))


def _solution(matrix: jax.Array, target: jax.Array) -> jax.Array:
    # Rows and columns are first scaled to the size of 1 by powers of 2, which rounds
    # nothing, so that small pivots mean a singular matrix and not small units.
    rows = _scales(jnp.max(jnp.abs(matrix), axis=1))
    scaled = matrix * rows[:, None]
    columns = _scales(jnp.max(jnp.abs(scaled), axis=0))
    factors, pivots = lu_factor(scaled * columns)
    step = columns * lu_solve((factors, pivots), rows * target)
    sizes = jnp.abs(jnp.diagonal(factors))
    least = matrix.shape[0] * jnp.finfo(real_dtype(matrix)).eps
    is_singular = ~(jnp.min(sizes) > least * jnp.max(sizes))
    return jnp.where(is_singular, jnp.nan, step)


def _scales(largest: jax.Array) -> jax.Array:
    _, exponent = jnp.frexp(largest)
    # Within the powers of 2 that are normal numbers: others would be flushed to 0.
    limits = jnp.finfo(largest.dtype)
    exponent = jnp.clip(-exponent, limits.minexp + 1, limits.maxexp - 2)
    return jnp.where(largest > 0, jnp.ldexp(jnp.ones_like(largest), exponent), 1.0)
