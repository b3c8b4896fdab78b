"""Determinants of a square Jacobian.

|det J| is the factor of a change of variables: the integral of g over f(U) is the
integral of g(f(x)) |det J(x)| over U.
"""

import math

import jax
import jax.numpy as jnp

from jacserve.tensors import format_shape
from jacserve.vocabulary import Layout
from jacserve_server.errors import ServiceError
from jacserve_server.transforms.point import Point
from jacserve_server.transforms.precision import real_dtype, widened

# LAPACK takes the matrices of a batch one after another, and XLA's own arithmetic takes
# them as one vector. Beyond this size that is large to compile, and gains little.
_ELIMINATED = 4


def determinant(point: Point, layout: Layout) -> jax.Array:
    """Returns det J, a scalar of J's dtype.

    Raises:
        ServiceError: J is not square.
    """
    del layout
    matrix = _square(point, "determinant")
    return _det(widened(matrix)).astype(matrix.dtype)


def abs_determinant(point: Point, layout: Layout) -> jax.Array:
    """Returns |det J|, a real scalar.

    Raises:
        ServiceError: J is not square.
    """
    del layout
    matrix = _square(point, "abs_determinant")
    return jnp.abs(_det(widened(matrix))).astype(real_dtype(matrix))


def slogdet(point: Point, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Returns the sign of det J, of J's dtype, and log |det J|, real.

    Raises:
        ServiceError: J is not square.
    """
    del layout
    matrix = _square(point, "slogdet")
    sign, log = _slogdet(widened(matrix))
    return sign.astype(matrix.dtype), log.astype(real_dtype(matrix))


def _det(matrix: jax.Array) -> jax.Array:
    if len(matrix) > _ELIMINATED:
        return jnp.linalg.det(matrix)
    parity, pivots = _eliminated(matrix)
    return math.prod(pivots, start=parity)


def _slogdet(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    if len(matrix) > _ELIMINATED:
        return jnp.linalg.slogdet(matrix)
    parity, pivots = _eliminated(matrix)
    sign = math.prod(map(jnp.sign, pivots), start=parity)
    log = sum((jnp.log(jnp.abs(each)) for each in pivots), start=jnp.abs(parity) - 1)
    return sign, log


def _eliminated(matrix: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Eliminates as Gauss did, with partial pivoting.

    Args:
        matrix: A square matrix.

    Returns:
        The parity of the permutation of rows, 1 or -1, and the pivots.

    Source:
        Golub and Van Loan, Matrix Computations, 4th ed., algorithm 3.4.1.
    """
    rows = [list(row) for row in matrix]
    parity, pivots = jnp.ones((), matrix.dtype), list[jax.Array]()
    while rows:
        first, *others = rows
        for place, other in enumerate(others):
            is_less = jnp.abs(first[0]) < jnp.abs(other[0])
            parity = jnp.where(is_less, -parity, parity)
            pairs = list(zip(first, other, strict=True))
            first = [jnp.where(is_less, b, a) for a, b in pairs]
            others[place] = [jnp.where(is_less, a, b) for a, b in pairs]
        pivot = first[0]
        pivots.append(pivot)
        # Below a pivot of zero all is zero.
        divisor = jnp.where(pivot == 0, 1, pivot)
        rows = [
            [
                b - other[0] / divisor * a
                for a, b in zip(first[1:], other[1:], strict=True)
            ]
            for other in others
        ]
    return parity, pivots


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
