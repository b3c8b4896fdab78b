"""Singular values of J: by how much f stretches small steps."""

import jax
import jax.numpy as jnp

from jacserve.tensors import format_shape
from jacserve.vocabulary import Layout
from jacserve_server.errors import ServiceError
from jacserve_server.transforms.point import Point
from jacserve_server.transforms.precision import real_dtype, widened


def singular_values(point: Point, layout: Layout) -> jax.Array:
    """Returns the singular values of J, the largest first: real, [min(m, n)]."""
    del layout
    matrix = point.matrix
    values = jnp.linalg.svd(widened(matrix), compute_uv=False)
    return values.astype(real_dtype(matrix))


def condition_number(point: Point, layout: Layout) -> jax.Array:
    """Returns the largest singular value over the smallest, Inf where that is 0.

    Raises:
        ServiceError: J is empty.
    """
    values = singular_values(point, layout)
    if not values.size:
        raise ServiceError(
            "QUANTITY_UNSUPPORTED",
            f"the Jacobian of {point.resource} is {format_shape(point.matrix.shape)}, "
            "and an empty matrix has no condition number. Ask for singular_values.",
            field="quantities",
            function=point.resource,
            quantity="condition_number",
        )
    largest, smallest = values[0], values[-1]
    # 0 / 0 would be NaN; but NaN in J must stay NaN.
    return jnp.where(smallest == 0, jnp.inf, largest / smallest)
