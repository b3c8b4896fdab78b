"""A function at one point, differentiated once for all who ask."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jacserve import trees
from jacserve.trees import Path
from jacserve.vocabulary import Mode
from jacserve_server.errors import ServiceError


class Leaf(NamedTuple):
    """One array of a function's result."""

    path: Path
    array: jax.Array


def results(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Leaf]:
    """Calls a function and flattens its result, in the order it was written.

    JAX itself would sort a dictionary's keys; the contract keeps their order.

    Args:
        function: Takes arrays, returns an array or a tree of arrays.
        inputs: The arrays, in declared order.

    Returns:
        The arrays of the result.

    Raises:
        TypeError: The result has something else in it, or nothing.
    """
    leaves: list[Leaf] = []
    for path, leaf in trees.flatten(function(*inputs)):
        try:
            leaves.append(Leaf(path, jnp.asarray(leaf)))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"it returns a {type(leaf).__name__} at result"
                f"{trees.format_path(path)}. Return arrays, or tuples and "
                "dictionaries of arrays."
            ) from error
    if not leaves:
        raise TypeError("it returns no array. Return what is to be differentiated.")
    return leaves


def is_inexact(array: Any) -> bool:
    """Tells whether an array's dtype is real or complex."""
    return jnp.issubdtype(array.dtype, jnp.inexact)


class Point:
    """A function f: R^n -> R^m at one point x.

    The real and complex arrays of the result are f; integers and booleans in it
    have a value and no derivative.

    What was computed is kept in plain attributes: functools.cached_property holds
    one lock for all instances on Python 3.11, and so one slow trace would hold up
    every other.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[jax.Array],
        *,
        resource: str,
        wrt: Sequence[tuple[int, str]],
        mode: Mode | None,
    ) -> None:
        """Names the point; nothing is computed until a quantity asks.

        Args:
            function: Takes arrays, returns an array or a tree of arrays.
            inputs: The arrays, in declared order.
            resource: The function's name, for messages.
            wrt: Position and name of each argument to differentiate with respect
                to, in order.
            mode: "forward" or "reverse"; None where no derivative is asked for.
        """
        self._function = function
        self._inputs = tuple(inputs)
        self._mode = mode
        self.resource = resource
        self.wrt = tuple(wrt)
        self._value: list[Leaf] | None = None
        self._blocks: list[tuple[Leaf, list[jax.Array]]] | None = None
        self._matrix: jax.Array | None = None

    @property
    def arguments(self) -> list[jax.Array]:
        """The arguments differentiated, in the order of their columns."""
        return [self._inputs[position] for position, _ in self.wrt]

    @property
    def value(self) -> list[Leaf]:
        """All arrays of f(x); they come from the differentiation, if there was one."""
        if self._value is None:
            self._value = results(self._function, self._inputs)
        return self._value

    @property
    def blocks(self) -> list[tuple[Leaf, list[jax.Array]]]:
        """Each differentiable result, with its block for each argument.

        A block has the result's shape followed by the argument's.
        """
        if self._blocks is None:
            self._value, self._blocks = self._differentiate()
        return self._blocks

    @property
    def matrix(self) -> jax.Array:
        """J [m, n]."""
        if self._matrix is None:
            self._matrix = self._assemble()
        return self._matrix

    def _assemble(self) -> jax.Array:
        rows = [
            jnp.concatenate(
                [
                    block.reshape(leaf.array.size, argument.size)
                    for block, argument in zip(blocks, self.arguments, strict=True)
                ],
                axis=1,
            )
            for leaf, blocks in self.blocks
        ]
        return jnp.concatenate(rows, axis=0)

    def _differentiate(
        self,
    ) -> tuple[list[Leaf], list[tuple[Leaf, list[jax.Array]]]]:
        """Returns f(x) and the blocks of J, from one pass."""
        paths: list[Path] = []

        def split(*inputs: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            leaves = results(self._function, inputs)
            paths.extend(leaf.path for leaf in leaves)
            arrays = [leaf.array for leaf in leaves]
            return [array for array in arrays if is_inexact(array)], arrays

        differentiate = {"forward": jax.jacfwd, "reverse": jax.jacrev}[str(self._mode)]
        holomorphic = any(jnp.iscomplexobj(argument) for argument in self.arguments)
        blocks, arrays = differentiate(
            split,
            argnums=tuple(position for position, _ in self.wrt),
            has_aux=True,
            holomorphic=holomorphic,
        )(*self._inputs)
        value = list(map(Leaf, paths, arrays))
        differentiable = [leaf for leaf in value if is_inexact(leaf.array)]
        if not differentiable:
            raise ServiceError(
                "QUANTITY_UNSUPPORTED",
                f"{self.resource} returns no real or complex array to differentiate. "
                "Ask for value alone.",
                field="quantities",
            )
        return value, [
            (leaf, list(map(partial(self._promoted, leaf), row, self.arguments)))
            for leaf, row in zip(differentiable, blocks, strict=True)
        ]

    @staticmethod
    def _promoted(leaf: Leaf, block: jax.Array, argument: jax.Array) -> jax.Array:
        # Forward mode has the result's dtype, reverse mode the argument's: where
        # they differ, a derivative's dtype must not depend on the mode.
        return block.astype(jnp.promote_types(leaf.array.dtype, argument.dtype))
