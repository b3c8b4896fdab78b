"""Differentiates a function in either direction, all at once or in chunks.

Chunks make a few products at a time, so that only these products' intermediates are
in memory. Beyond some hundred products they are often faster too: the intermediates
stay in the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jacserve.vocabulary import Direction

# A function that returns a tree of arrays to differentiate, and an auxiliary.
WithAux = Callable[..., tuple[Any, Any]]


def differentiated(
    f: WithAux, direction: Direction, chunk_size: int | None, *, holomorphic: bool
) -> WithAux:
    """Returns the function whose tree has a tuple of blocks for each array of f's.

    Args:
        f: Takes arrays; returns a tree of arrays and an auxiliary.
        direction: "forward" makes a product for each element of the arguments,
            "reverse" for each of the results.
        chunk_size: How many products are made at once; None for all.
        holomorphic: Whether f is a complex function to be differentiated as such.

    Returns:
        A function of the same arguments. A block has the shape of f's array, then
        of the argument. The auxiliary is that of f.
    """

    def derivative(*arguments: jax.Array) -> tuple[Any, Any]:
        if chunk_size is not None and direction == "forward":
            return _by_columns(f, arguments, chunk_size)
        if chunk_size is not None:
            return _by_rows(f, arguments, chunk_size)
        transform = {"forward": jax.jacfwd, "reverse": jax.jacrev}[direction]
        argnums = tuple(range(len(arguments)))
        return transform(f, argnums, has_aux=True, holomorphic=holomorphic)(*arguments)

    return derivative


def _by_columns(
    f: WithAux, arguments: Sequence[jax.Array], chunk_size: int
) -> tuple[Any, Any]:
    def column(place: jax.Array) -> Any:
        return jax.jvp(lambda *xs: f(*xs)[0], arguments, unit(place, arguments))[1]

    def blocks(columns: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            jnp.moveaxis(part, 0, -1).reshape(*columns.shape[1:], *argument.shape)
            for part, argument in zip(split(columns, arguments), arguments, strict=True)
        )

    columns = _chunk_map(column, arguments, chunk_size)
    return jax.tree.map(blocks, columns), f(*arguments)[1]


def _by_rows(
    f: WithAux, arguments: Sequence[jax.Array], chunk_size: int
) -> tuple[Any, Any]:
    outputs, pullback, aux = jax.vjp(f, *arguments, has_aux=True)
    leaves, structure = jax.tree.flatten(outputs)

    def row(place: jax.Array) -> Any:
        return pullback(jax.tree.unflatten(structure, unit(place, leaves)))

    rows = [split(part, leaves) for part in _chunk_map(row, leaves, chunk_size)]
    blocks = [
        tuple(
            part.reshape(*leaf.shape, *argument.shape)
            for part, argument in zip(parts, arguments, strict=True)
        )
        for leaf, *parts in zip(leaves, *rows, strict=True)
    ]
    return jax.tree.unflatten(structure, blocks), aux


def _chunk_map(
    product: Callable[[jax.Array], Any], basis: Sequence[jax.Array], chunk_size: int
) -> Any:
    # By place, because all unit vectors together would take as much as J itself.
    places = jnp.arange(sum(array.size for array in basis))
    return jax.lax.map(product, places, batch_size=chunk_size)


def unit(place: jax.Array, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns arrays like these with a one at a place of all ravelled, else zeros."""
    flat = jnp.arange(sum(array.size for array in arrays)) == place
    pairs = zip(split(flat, arrays), arrays, strict=True)
    return tuple(part.reshape(x.shape).astype(x.dtype) for part, x in pairs)


def split(stack: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Cuts the first axis into lengths that are the arrays' sizes."""
    ends, end = [], 0
    for array in arrays:
        end += array.size
        ends.append(end)
    return jnp.split(stack, ends[:-1])
