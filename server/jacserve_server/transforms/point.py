"""A function at one point, differentiated once for all who ask."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jacserve import trees
from jacserve.trees import Path
from jacserve.vocabulary import DTYPES, Mode
from jacserve_server.errors import ServiceError, describe_exception


class FunctionError(Exception):
    """A registered function can't be traced; the text may leave the server."""


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
        FunctionError: The function raised, or its result is not made of arrays.
    """
    try:
        leaves = list(trees.flatten(function(*inputs)))
    # A function may raise anything, SystemExit included.
    except BaseException as error:
        if _is_ctrl_c(error):
            raise
        raise FunctionError(f"it raised {describe_exception(error)}") from error
    if not leaves:
        raise FunctionError("it returns no array. Return what is to be differentiated")
    arrays: list[Leaf] = []
    for path, leaf in leaves:
        try:
            arrays.append(Leaf(path, jnp.asarray(leaf)))
        except Exception as error:
            raise FunctionError(
                f"it returns a {type(leaf).__name__} at result"
                f"{trees.format_path(path)}. Return arrays, or tuples and dictionaries "
                "of arrays"
            ) from error
        if arrays[-1].array.dtype.name not in DTYPES:
            raise FunctionError(
                f"it returns {arrays[-1].array.dtype} at result"
                f"{trees.format_path(path)}, which can't be sent. Convert it to one of "
                f"{', '.join(DTYPES)}"
            )
    return arrays


def _is_ctrl_c(error: BaseException) -> bool:
    # Python raises it in the main thread only; elsewhere it is the function's own.
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and isinstance(error, KeyboardInterrupt)


def is_inexact(array: Any) -> bool:
    """Tells whether an array's dtype is real or complex."""
    return jnp.issubdtype(array.dtype, jnp.inexact)


class Point:
    """A function at one point, seen as f: R^n -> R^m of the arguments in `wrt`.

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
            mode: How to differentiate; None where no derivative is asked for.
        """
        self._function = function
        self._inputs = tuple(inputs)
        self._mode = mode
        self.resource = resource
        self.wrt = tuple(wrt)
        self.arguments = [self._inputs[position] for position, _ in self.wrt]
        self._paths: list[Path] = []
        self._value: list[Leaf] | None = None
        self._blocks: list[tuple[Leaf, list[jax.Array]]] | None = None
        self._matrix: jax.Array | None = None

    def f(self, *arguments: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """The function of the differentiated arguments alone, for JAX to transform.

        Args:
            *arguments: In place of `self.arguments`.

        Returns:
            The arrays that have derivatives; and all arrays, as an auxiliary.
        """
        inputs = list(self._inputs)
        for (position, _), argument in zip(self.wrt, arguments, strict=True):
            inputs[position] = argument
        leaves = results(self._function, inputs)
        self._paths = [leaf.path for leaf in leaves]
        differentiable = [leaf.array for leaf in leaves if is_inexact(leaf.array)]
        self._check_differentiable(differentiable)
        return differentiable, [leaf.array for leaf in leaves]

    @property
    def is_holomorphic(self) -> bool:
        """Whether the derivative is that of a complex function."""
        return any(jnp.iscomplexobj(argument) for argument in self.arguments)

    @property
    def value(self) -> list[Leaf]:
        """All arrays of f(x), from the pass that differentiates if there is one."""
        if self._value is None and self._mode is not None:
            self._value, self._blocks = self._differentiate()
        elif self._value is None:
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

    def _differentiate(
        self,
    ) -> tuple[list[Leaf], list[tuple[Leaf, list[jax.Array]]]]:
        """Returns f(x) and the blocks of J, from one pass."""
        if self._mode is None:
            raise AssertionError("a derivative was planned without a mode")
        if self.is_holomorphic and not all(map(jnp.iscomplexobj, self.arguments)):
            raise self._no_derivative(
                "wrt mixes real and complex arguments. Name those of one kind."
            )
        transform = {"forward": jax.jacfwd, "reverse": jax.jacrev}[self._mode]
        blocks, arrays = transform(
            self.f,
            argnums=tuple(range(len(self.wrt))),
            has_aux=True,
            holomorphic=self.is_holomorphic,
        )(*self.arguments)
        value = list(map(Leaf, self._paths, arrays))
        differentiable = [leaf for leaf in value if is_inexact(leaf.array)]
        return value, [
            (leaf, list(map(partial(_promoted, leaf), row, self.arguments)))
            for leaf, row in zip(differentiable, blocks, strict=True)
        ]

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

    def _check_differentiable(self, arrays: list[jax.Array]) -> None:
        if not arrays:
            raise ServiceError(
                "QUANTITY_UNSUPPORTED",
                f"{self.resource} returns no real or complex array to differentiate. "
                "Ask for value alone.",
                field="quantities",
                function=self.resource,
            )
        are_complex = [jnp.iscomplexobj(array) for array in arrays]
        if self.is_holomorphic and not all(are_complex):
            raise self._no_derivative(
                "it returns real numbers of complex ones, and only a holomorphic "
                "function has a complex derivative. Ask for value alone."
            )
        if not self.is_holomorphic and any(are_complex) and self._mode == "reverse":
            raise self._no_derivative(
                "it returns complex numbers of real ones. Use forward mode."
            )

    def _no_derivative(self, problem: str) -> ServiceError:
        return ServiceError(
            "MODE_UNSUPPORTED",
            f"{self.resource} can't be differentiated in {self._mode} mode: {problem}",
            field="mode",
            function=self.resource,
            mode=self._mode,
        )


def _promoted(leaf: Leaf, block: jax.Array, argument: jax.Array) -> jax.Array:
    # Forward mode has the result's dtype, reverse mode the argument's: where they
    # differ, a derivative's dtype must not depend on the mode.
    return block.astype(jnp.promote_types(leaf.array.dtype, argument.dtype))
