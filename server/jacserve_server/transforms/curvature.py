"""Second derivatives, forward over reverse where that exists.

For a scalar f on n variables, H takes n Jacobian-vector products of the gradient, and
H v takes one: about four evaluations of f, whatever n is (Pearlmutter, Fast exact
multiplication by the Hessian, Neural Computation 6, 1994).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jacserve import trees
from jacserve.vocabulary import Layout
from jacserve_server.transforms.jacobian import by_argument
from jacserve_server.transforms.point import Point, check_scalar
from jacserve_server.transforms.products import (
    mapped,
    multiplied,
    ravelled,
    shaped,
    shaped_tangents,
)


def hessian(point: Point, layout: Layout) -> Any:
    """Returns H [n, n] of a scalar function, its values [nnz], or blocks of any.

    A block has the shape of a result, then of two arguments. The blocks are
    structured as the result; where several arguments were asked for, each is a
    dictionary of dictionaries by argument name.

    Raises:
        ServiceError: The function has more than one result and the layout has one
            matrix.
    """
    if layout == "blocks":
        return trees.unflatten(
            (leaf.path, by_argument(point, [by_argument(point, row) for row in rows]))
            for leaf, rows in point.hessian_blocks()
        )
    check_scalar(
        point.resource,
        point.results,
        "hessian",
        'Pass layout="blocks" for one of each result.',
    )
    if point.is_values("hessian", layout):
        return point.data("hessian")
    if point.strategy.hessian == "sparse":
        return point.scattered("hessian")
    return _assembled(point)


def hvp(point: Point, layout: Layout) -> Any:
    """Returns H v [n], or [k, n], of a scalar function.

    In blocks, an array shaped like each argument. Where f can't be differentiated
    forward over reverse, H is made another way and multiplied.

    Raises:
        ServiceError: The function has more than one result.
    """
    check_scalar(
        point.resource, point.results, "hvp", "Ask for hessian in the blocks layout."
    )
    vectors = shaped_tangents(point, layout)
    if point.strategy.hvp != "forward_over_reverse":
        flat = multiplied(ravelled(vectors, point.arguments), _assembled(point))
        arrays = shaped(flat, point.arguments)
    else:
        point.check_kinds()
        gradient = jax.grad(
            point.scalar_f,
            argnums=tuple(range(len(point.arguments))),
            has_aux=True,
            holomorphic=point.is_holomorphic,
        )

        def push(tangents: list[jax.Array]) -> tuple[list[jax.Array], Any]:
            _, out, everything = jax.jvp(
                gradient, point.arguments, tangents, has_aux=True
            )
            return list(out), everything

        arrays, everything = mapped(push, vectors, point.arguments)
        point.keep(everything)
    if layout != "blocks":
        return ravelled(arrays, point.arguments)
    return by_argument(point, arrays)


def _assembled(point: Point) -> jax.Array:
    sizes = [argument.size for argument in point.arguments]
    # Empty results may stand beside the only number.
    [rows] = [rows for leaf, rows in point.hessian_blocks() if leaf.array.size]
    return jnp.concatenate(
        [
            jnp.concatenate(
                [
                    block.reshape(height, width)
                    for block, width in zip(row, sizes, strict=True)
                ],
                axis=1,
            )
            for row, height in zip(rows, sizes, strict=True)
        ],
        axis=0,
    )
