"""Products with J that need no J: J v by forward mode, u^T J by reverse mode.

u^T J is the step of backpropagation through one layer: u is the gradient with respect
to what the layer returns, u^T J that with respect to what it takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jacserve import trees
from jacserve.tensors import format_shape
from jacserve.vocabulary import Layout
from jacserve_server.errors import ServiceError
from jacserve_server.transforms.differentiation import split
from jacserve_server.transforms.jacobian import by_argument
from jacserve_server.transforms.point import Point


def jvp(point: Point, layout: Layout) -> Any:
    """Returns J v [m], or [k, m]; in blocks, structured and shaped as the result.

    Where f has no forward mode, J is made in reverse and multiplied.
    """
    vectors = shaped_tangents(point, layout)
    if point.strategy.jvp != "forward":
        flat = multiplied(ravelled(vectors, point.arguments), point.matrix.T)
        arrays = shaped(flat, [leaf.array for leaf in point.results])
    else:
        point.check_kinds()

        def push(tangents: list[jax.Array]) -> tuple[list[jax.Array], Any]:
            _, out, everything = jax.jvp(
                point.f, point.arguments, tangents, has_aux=True
            )
            return out, everything

        arrays, everything = mapped(push, vectors, point.arguments)
        point.keep(everything)
    leaves = point.results
    if layout != "blocks":
        return ravelled(arrays, [leaf.array for leaf in leaves])
    return trees.unflatten(
        (leaf.path, array) for leaf, array in zip(leaves, arrays, strict=True)
    )


def vjp(point: Point, layout: Layout) -> Any:
    """Returns u^T J [n], or [k, n]; in blocks, an array shaped like each argument.

    Where f has no reverse mode, J is made forward and multiplied.
    """
    if point.strategy.vjp != "reverse":
        matrix = point.matrix
        vectors = _shaped_cotangents(point, layout)
        leaves = [leaf.array for leaf in point.results]
        flat = multiplied(ravelled(vectors, leaves), matrix)
        arrays = shaped(flat, point.arguments)
    else:
        point.check_kinds()
        _, pullback, everything = jax.vjp(point.f, *point.arguments, has_aux=True)
        point.keep(everything)
        vectors = _shaped_cotangents(point, layout)
        leaves = [leaf.array for leaf in point.results]
        # JAX wants the primal's structure, which is a list.
        arrays, _ = mapped(lambda us: (list(pullback(us)), None), vectors, leaves)
    if layout != "blocks":
        return ravelled(arrays, point.arguments)
    return by_argument(point, arrays)


def mapped(
    product: Callable[[list[jax.Array]], tuple[list[jax.Array], Any]],
    vectors: list[jax.Array],
    like: Sequence[jax.Array],
) -> tuple[list[jax.Array], Any]:
    """Applies a product to one vector, or to each of a block of them.

    Args:
        product: Takes arrays; returns arrays, and what is the same for every vector.
        vectors: Arrays, all with a further leading axis k or none.
        like: Arrays of one vector's shapes.

    Returns:
        The product's arrays, with an axis k if there was one.
    """
    if vectors[0].ndim == like[0].ndim:
        return product(vectors)
    return jax.vmap(product, out_axes=(0, None))(vectors)


def multiplied(vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns the product of one vector or a block of them with a matrix."""
    # By default an accelerator would round the factors to fewer bits.
    return jnp.matmul(vectors, matrix, precision=jax.lax.Precision.HIGHEST)


def shaped_tangents(point: Point, layout: Layout) -> list[jax.Array]:
    """Returns tangents like each argument; each may have an axis k before."""
    if layout == "blocks":
        return list(point.tangents)
    [flat] = point.tangents
    return shaped(flat, point.arguments)


def _shaped_cotangents(point: Point, layout: Layout) -> list[jax.Array]:
    """Returns cotangents like each result; each may have an axis k before."""
    leaves = point.results
    given = dict(point.cotangents)
    arrays = [leaf.array for leaf in leaves]
    if layout != "blocks":
        [flat] = given.values()
        dtype = jnp.result_type(*arrays)
        _check_cotangent(point, 0, flat, (point.result_size,), dtype)
        return shaped(flat, arrays)
    for place, path in enumerate(given):
        if path not in {leaf.path for leaf in leaves}:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"there is a cotangent for {trees.format_path(path)}, where "
                f"{point.resource} has no real or complex result. Leave it out.",
                field=f"cotangents[{place}].path",
                function=point.resource,
            )
    places = list(given)
    for path, array in leaves:
        if path not in given:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"the result of {point.resource} at {trees.format_path(path)} has no "
                "cotangent. Pass one for each real or complex result.",
                field="cotangents",
                function=point.resource,
            )
        place = places.index(path)
        _check_cotangent(point, place, given[path], array.shape, array.dtype)
    return [given[leaf.path] for leaf in leaves]


def _check_cotangent(
    point: Point,
    place: int,
    given: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> None:
    if given.shape[given.ndim - len(shape) :] != shape:
        raise ServiceError(
            "SHAPE_MISMATCH",
            f"a cotangent has shape {format_shape(given.shape)}, but the result of "
            f"{point.resource} takes {format_shape(shape)}. Pass that, or "
            f"{format_shape(('k', *shape))} for k at once.",
            field=f"cotangents[{place}].tensor.shape",
            function=point.resource,
            shape=format_shape(given.shape),
            expected=format_shape(shape),
        )
    if given.dtype != dtype:
        raise ServiceError(
            "DTYPE_MISMATCH",
            f"a cotangent is {given.dtype}, but the result of {point.resource} is "
            f"{dtype}. Convert it.",
            field=f"cotangents[{place}].tensor.dtype",
            function=point.resource,
            dtype=given.dtype,
            accepted=dtype,
        )


def shaped(flat: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Cuts numbers along the last axis into arrays shaped like these."""
    parts = split(jnp.moveaxis(flat, -1, 0), like)
    arrays = [
        jnp.moveaxis(part, 0, -1).reshape(*flat.shape[:-1], *array.shape)
        for part, array in zip(parts, like, strict=True)
    ]
    if jnp.iscomplexobj(flat) and not all(map(jnp.iscomplexobj, like)):
        return arrays  # The derivatives of a complex result by real arguments.
    return [part.astype(x.dtype) for part, x in zip(arrays, like, strict=True)]


def ravelled(arrays: Sequence[jax.Array], like: Sequence[jax.Array]) -> jax.Array:
    """Joins arrays shaped like these, or with an axis k before, along the last axis."""
    return jnp.concatenate(
        [
            array.reshape(*array.shape[: array.ndim - single.ndim], single.size)
            for array, single in zip(arrays, like, strict=True)
        ],
        axis=-1,
    )
