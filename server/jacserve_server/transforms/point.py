"""A function at one point, differentiated once for all who ask."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jacserve import trees
from jacserve.tensors import format_shape
from jacserve.trees import Path
from jacserve.vocabulary import DTYPES, Curvature, Direction, Layout, Quantity
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.transforms.differentiation import differentiated
from jacserve_server.work import Strategy


class FunctionError(Exception):
    """A registered function can't be traced; the text may leave the server."""


class Compressed(NamedTuple):
    """A sparse derivative of f: how to compute it, and where its numbers stand.

    Attributes:
        evaluate: Takes f and its arguments; returns the values [nnz] and f's
            auxiliary.
        rows: The row of each value.
        columns: The column of each value.
        shape: m and n.
    """

    evaluate: Callable[..., tuple[jax.Array, Any]]
    rows: Any
    columns: Any
    shape: tuple[int, int]


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
        strategy: Strategy,
        compressed: Mapping[Quantity, Compressed] | None = None,
        tangents: Sequence[jax.Array] = (),
        cotangents: Sequence[tuple[Path, jax.Array]] = (),
    ) -> None:
        """Names the point; nothing is computed until a quantity asks.

        Args:
            function: Takes arrays, returns an array or a tree of arrays.
            inputs: The arrays, in declared order.
            resource: The function's name, for messages.
            wrt: Position and name of each argument to differentiate with respect
                to, in order.
            strategy: How to differentiate; without a mode for what is not asked.
            compressed: How to compute the derivatives whose mode is sparse.
            tangents: One array of n numbers, or one like each argument in `wrt`;
                each with a leading axis for several tangents.
            cotangents: One array of m numbers with an empty path, or one like each
                result, by path; likewise.
        """
        self._function = function
        self._inputs = tuple(inputs)
        self.strategy = strategy
        self._compressed = compressed or {}
        self.resource = resource
        self.wrt = tuple(wrt)
        self.arguments = [self._inputs[position] for position, _ in self.wrt]
        self.tangents = tuple(tangents)
        self.cotangents = tuple(cotangents)
        self._paths: list[Path] = []
        self._value: list[Leaf] | None = None
        self._blocks: list[tuple[Leaf, list[jax.Array]]] | None = None
        self._matrix: jax.Array | None = None
        self._data: dict[Quantity, jax.Array] = {}

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

    def scalar_f(self, *arguments: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The same for a function with one number as its result."""
        arrays, everything = self.f(*arguments)
        # Empty results may stand beside the only number.
        [number] = [array for array in arrays if array.size]
        return number.reshape(()), everything

    @property
    def is_holomorphic(self) -> bool:
        """Whether the derivative is that of a complex function."""
        return any(jnp.iscomplexobj(argument) for argument in self.arguments)

    @property
    def value(self) -> list[Leaf]:
        """All arrays of f(x), from a pass that differentiated if there was one."""
        if self._value is None:
            self._value = results(self._function, self._inputs)
        return self._value

    @property
    def results(self) -> list[Leaf]:
        """The arrays of f(x) that have derivatives."""
        return [leaf for leaf in self.value if is_inexact(leaf.array)]

    @property
    def result_size(self) -> int:
        """The number m of results."""
        return sum(leaf.array.size for leaf in self.results)

    def keep(self, everything: Sequence[jax.Array]) -> None:
        """Keeps f(x), the auxiliary of a pass that differentiates.

        Of several the last counts, so that one which only looked at shapes is
        found to be of no use when the program is compiled.
        """
        self._value = list(map(Leaf, self._paths, everything))

    @property
    def blocks(self) -> list[tuple[Leaf, list[jax.Array]]]:
        """Each differentiable result, with its block for each argument.

        A block has the result's shape followed by the argument's.
        """
        if self._blocks is None:
            self._blocks = self._differentiate()
        return self._blocks

    @property
    def matrix(self) -> jax.Array:
        """J [m, n]."""
        if self._matrix is None and self.strategy.jacobian == "sparse":
            self._matrix = self.scattered("jacobian")
        elif self._matrix is None:
            self._matrix = self._assemble()
        return self._matrix

    def data(self, quantity: Quantity) -> jax.Array:
        """The values [nnz] of a sparse derivative, in the order of its pattern."""
        if quantity not in self._data:
            f = self.f if quantity == "jacobian" else self.scalar_f
            found = self._compressed[quantity].evaluate(f, *self.arguments)
            self._data[quantity], everything = found
            self.keep(everything)
        return self._data[quantity]

    def scattered(self, quantity: Quantity) -> jax.Array:
        """The same derivative as a dense matrix."""
        data, form = self.data(quantity), self._compressed[quantity]
        return jnp.zeros(form.shape, data.dtype).at[form.rows, form.columns].set(data)

    def is_values(self, quantity: Quantity, layout: Layout) -> bool:
        """Tells whether a quantity is to be given as the values of a sparse matrix."""
        return layout in {"csr", "coo"} and quantity in self._compressed

    def hessian_blocks(self) -> list[tuple[Leaf, list[list[jax.Array]]]]:
        """Each differentiable result, with its block for each pair of arguments."""
        curvature = cast("Curvature", self.strategy.hessian or self.strategy.hvp)
        outer, _, inner = curvature.partition("_over_")
        self.check_kinds()
        derivative = partial(differentiated, holomorphic=self.is_holomorphic)
        first = derivative(self.f, cast("Direction", inner), None)
        blocks, everything = derivative(
            first, cast("Direction", outer), self.strategy.chunk_size
        )(*self.arguments)
        self.keep(everything)
        return list(zip(self.results, blocks, strict=True))

    def _differentiate(self) -> list[tuple[Leaf, list[jax.Array]]]:
        """Returns the blocks of J, and keeps f(x) of the same pass."""
        mode, chunk_size = self.strategy.jacobian, self.strategy.chunk_size
        if mode not in {"forward", "reverse"}:
            raise AssertionError("a derivative was planned without a mode")
        self.check_kinds()
        blocks, everything = differentiated(
            self.f,
            cast("Direction", mode),
            chunk_size,
            holomorphic=self.is_holomorphic,
        )(*self.arguments)
        self.keep(everything)
        return [
            (
                leaf,
                [
                    promoted(leaf, b, x)
                    for b, x in zip(row, self.arguments, strict=True)
                ],
            )
            for leaf, row in zip(self.results, blocks, strict=True)
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

    def check_kinds(self) -> None:
        """Refuses to differentiate for real and complex arguments at once.

        Raises:
            ServiceError: `wrt` has both.
        """
        if self.is_holomorphic and not all(map(jnp.iscomplexobj, self.arguments)):
            raise self._no_derivative(
                "wrt mixes real and complex arguments. Name those of one kind."
            )

    def _check_differentiable(self, arrays: list[jax.Array]) -> None:
        if not arrays:
            raise nothing_to_differentiate(self.resource)
        are_complex = [jnp.iscomplexobj(array) for array in arrays]
        if self.is_holomorphic and not all(are_complex):
            raise self._no_derivative(
                "it returns real numbers of complex ones, and only a holomorphic "
                "function has a complex derivative. Ask for value alone."
            )
        is_mixed = not self.is_holomorphic and any(are_complex)
        if is_mixed and self.strategy.has_reverse:
            raise self._no_derivative(
                "it returns complex numbers of real ones. Use forward mode."
            )

    def _no_derivative(self, problem: str) -> ServiceError:
        modes = " and ".join(self.strategy.modes)
        return ServiceError(
            "MODE_UNSUPPORTED",
            f"{self.resource} can't be differentiated in {modes} mode: {problem}",
            field="mode",
            function=self.resource,
            mode=modes,
        )


def check_scalar(
    resource: str, leaves: Sequence[Leaf], quantity: Quantity, remedy: str
) -> None:
    """Refuses a quantity of scalar functions where f has more results than one.

    Args:
        resource: The function's name, for the message.
        leaves: Its results.
        quantity: The quantity.
        remedy: What to do instead, a sentence.

    Raises:
        ServiceError: f has another number of results.
    """
    arrays = [leaf.array for leaf in leaves if is_inexact(leaf.array)]
    m = sum(array.size for array in arrays)
    if m != 1:
        shapes = ", ".join(format_shape(array.shape) for array in arrays)
        raise ServiceError(
            "QUANTITY_UNSUPPORTED",
            f"{resource} has {m} results (shape {shapes}), but {quantity} belongs to a "
            f"function with 1. {remedy}",
            field="quantities",
            function=resource,
            quantity=quantity,
            rows=m,
        )


def nothing_to_differentiate(resource: str) -> ServiceError:
    """Says that a function's results are all integers and booleans."""
    return ServiceError(
        "QUANTITY_UNSUPPORTED",
        f"{resource} returns no real or complex array to differentiate. Ask for value "
        "alone.",
        field="quantities",
        function=resource,
    )


def promoted(leaf: Leaf, array: jax.Array, argument: jax.Array) -> jax.Array:
    """Returns a derivative in the dtype that holds both result and argument.

    Forward mode has the result's dtype, reverse mode the argument's: where they
    differ, a derivative's dtype must not depend on the mode.
    """
    return array.astype(jnp.promote_types(leaf.array.dtype, argument.dtype))
