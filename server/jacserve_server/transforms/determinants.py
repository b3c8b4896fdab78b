"""Determinants of a square Jacobian.

|det J| is the factor of a change of variables: the integral of g over f(U) is the
integral of g(f(x)) |det J(x)| over U.
"""

import jax
import jax.numpy as jnp

from jacserve.tensors import format_shape
from jacserve.vocabulary import Layout
from jacserve_server.errors import ServiceError
from jacserve_server.transforms.point import Point
from jacserve_server.transforms.precision import real_dtype, widened


def determinant(point: Point, layout: Layout) -> jax.Array:
    """Returns det J, a scalar of J's dtype.

    Raises:
        ServiceError: J is not square.
    """
    del layout
    matrix = _square(point, "determinant")
    return jnp.linalg.det(widened(matrix)).astype(matrix.dtype)


def abs_determinant(point: Point, layout: Layout) -> jax.Array:
    """Returns |det J|, a real scalar.

    Raises:
        ServiceError: J is not square.
    """
    del layout
    matrix = _square(point, "abs_determinant")
    return jnp.abs(jnp.linalg.det(widened(matrix))).astype(real_dtype(matrix))


def slogdet(point: Point, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Returns the sign of det J, of J's dtype, and log |det J|, real.

    Raises:
        ServiceError: J is not square.
    """
    del layout
    matrix = _square(point, "slogdet")
    sign, log = jnp.linalg.slogdet(widened(matrix))
    return sign.astype(matrix.dtype), log.astype(real_dtype(matrix))


def _square(point: Point, quantity: str) -> jax.Array:
    m, n = point.matrix.shape
    if m != n:
        raise ServiceError(
            "QUANTITY_UNSUPPORTED",
            f"the Jacobian of {point.resource} is {format_shape((m, n))}, but "
            f"{quantity} needs a square one. Choose wrt so that m = n, or ask for "
            "jacobian.",
            field="quantities",
            function=point.resource,
            quantity=quantity,
            rows=m,
            columns=n,
        )
    return point.matrix
