"""Traces functions without running them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from jacserve.tensors import dtype_named
from jacserve.trees import Path
from jacserve.vocabulary import Curvature, Direction
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.signature import WIDE
from jacserve_server.transforms.point import FunctionError, Leaf, Point, results
from jacserve_server.work import InputSpec, Strategy


def x64(inputs: Sequence[InputSpec]) -> AbstractContextManager[Any]:
    """Returns the context in which a program of these inputs is traced and run.

    JAX's 64-bit switch is thrown for each program by its inputs, so that float32
    and float64 live side by side in one process, each with its own constants.

    Args:
        inputs: The program's inputs.

    Returns:
        A context manager, for the current thread.
    """
    return jax.enable_x64(has_x64(inputs))


def has_x64(inputs: Sequence[InputSpec]) -> bool:
    """Tells whether a program of these inputs is traced and run with 64-bit types."""
    return any(spec.dtype in WIDE for spec in inputs)


def structs(inputs: Sequence[InputSpec]) -> list[jax.ShapeDtypeStruct]:
    """Returns the abstract inputs of one point."""
    return [
        jax.ShapeDtypeStruct(spec.shape, dtype_named(spec.dtype)) for spec in inputs
    ]


# Loops of any length, and calls of code that may do anything.
_LINEAR_ALGEBRA = {
    *("lu", "qr", "geqrf", "householder_product", "svd", "eig", "eigh", "schur"),
    *("hessenberg", "cholesky", "triangular_solve", "tridiagonal"),
}
_UNSTEADY = ("while", "callback", "ffi_call", "infeed", "outfeed")
_LONGEST_SCAN = 100


def has_linear_algebra(jaxpr: Any) -> bool:
    """Tells whether a traced function factorises or solves by LAPACK on a CPU.

    Args:
        jaxpr: What tracing it gave.

    Returns:
        Whether it does, anywhere.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        equation.primitive.name in _LINEAR_ALGEBRA
        or any(map(has_linear_algebra, _inner(equation)))
        for equation in jaxpr.eqns
    )


def has_steady_cost(jaxpr: Any) -> bool:
    """Tells whether a traced function takes the same, short time for all inputs.

    Args:
        jaxpr: What tracing it gave.

    Returns:
        False where it loops until a condition holds, or many times, or calls back to
        Python.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if any(word in equation.primitive.name for word in _UNSTEADY):
            return False
        if equation.params.get("length", 0) > _LONGEST_SCAN:
            return False
        if not all(map(has_steady_cost, _inner(equation))):
            return False
    return True


def _inner(equation: Any) -> Iterator[Any]:
    """Yields what an equation calls."""
    for parameter in equation.params.values():
        for each in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                yield each


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
