"""Traces functions without running them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from jacserve.tensors import dtype_named
from jacserve.trees import Path
from jacserve.vocabulary import Curvature, Direction
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.transforms.point import FunctionError, Leaf, Point, results
from jacserve_server.work import InputSpec, Strategy

_WIDE = frozenset({"float64", "complex128", "int64", "uint64"})


def x64(inputs: Sequence[InputSpec]) -> AbstractContextManager[Any]:
    """Returns the context in which a program of these inputs is traced and run.

    JAX's 64-bit switch is thrown for each program by its inputs, so that float32
    and float64 live side by side in one process, each with its own constants.

    Args:
        inputs: The program's inputs.

    Returns:
        A context manager, for the current thread.
    """
    return jax.enable_x64(any(spec.dtype in _WIDE for spec in inputs))


def structs(inputs: Sequence[InputSpec]) -> list[jax.ShapeDtypeStruct]:
    """Returns the abstract inputs of one point."""
    return [
        jax.ShapeDtypeStruct(spec.shape, dtype_named(spec.dtype)) for spec in inputs
    ]


def abstract_results(
    call: Callable[..., Any], inputs: Sequence[InputSpec]
) -> list[Leaf]:
    """Traces f and returns its results without their numbers.

    Args:
        call: The function, taking all arguments by position.
        inputs: The inputs of one point.

    Returns:
        Paths, shapes and dtypes of the arrays that it returns.

    Raises:
        FunctionError: The function raised, or its result is not made of arrays.
    """
    paths: list[Path] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        leaves = results(call, arrays)
        paths.extend(leaf.path for leaf in leaves)
        return [leaf.array for leaf in leaves]

    with x64(inputs):
        arrays = jax.eval_shape(flat, *structs(inputs))
    return list(map(Leaf, paths, arrays))


def mode_problem(
    call: Callable[..., Any],
    inputs: Sequence[InputSpec],
    wrt: Sequence[tuple[int, str]],
    mode: Direction | Curvature,
) -> str | None:
    """Tells why a function lacks a mode.

    Args:
        call: The function, taking all arguments by position.
        inputs: The inputs of one point.
        wrt: Position and name of the arguments to differentiate.
        mode: The mode.

    Returns:
        The reason in one sentence without its full stop; None when the mode exists.
    """

    def derivative(*arrays: jax.Array) -> Any:
        strategy = (
            Strategy(jacobian=mode)
            if mode == "forward" or mode == "reverse"
            else Strategy(hessian=mode)
        )
        point = Point(call, arrays, resource="it", wrt=wrt, strategy=strategy)
        if strategy.jacobian:
            return point.matrix
        return [blocks for _, blocks in point.hessian_blocks()]

    try:
        with x64(inputs):
            jax.eval_shape(derivative, *structs(inputs))
    except (ServiceError, FunctionError) as error:
        text = str(error)
    except Exception as error:
        text = describe_exception(error)
    else:
        return None
    prefixes = (f"it can't be differentiated in {mode} mode: ", "it raised ")
    for prefix in prefixes:
        text = text.removeprefix(prefix)
    return text.partition("\n")[0].partition(". ")[0].rstrip(".")
