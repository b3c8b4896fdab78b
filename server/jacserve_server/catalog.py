"""The functions that a server serves: declarations, checked and traced.

Which modes a function has is found by tracing it, never by running it. All problems
of all functions are reported together, and then nothing is served.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import export

from jacserve.tensors import dtype_named
from jacserve.vocabulary import Mode
from jacserve_server.annotations import AnnotationError, read_signature
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.query import InputSpec
from jacserve_server.registry import (
    Declaration,
    RegistrationError,
    Registry,
    describe_problem,
    duplicate_problem,
)
from jacserve_server.signature import (
    INEXACT,
    Argument,
    Dimension,
    DimensionError,
    FunctionSpec,
    Signature,
    trial_sizes,
)
from jacserve_server.transforms.point import Leaf, Point, is_inexact, results

_MODES: tuple[Mode, ...] = ("forward", "reverse")
# What to trace an argument with that accepts several dtypes; complex128 and the
# like come last, because a function of real numbers may not be holomorphic.
_TRACED_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, eq=False)
class RegisteredFunction:
    """A function that can be served.

    Attributes:
        spec: All that is known of it.
        call: The function, taking all arguments by position.
        batchable: Whether a batch may be vmapped.
    """

    spec: FunctionSpec
    call: Callable[..., Any]
    batchable: bool


class Catalog:
    """Registered functions by name and version."""

    def __init__(self, functions: Iterable[RegisteredFunction]) -> None:
        """Indexes the functions; a bare name stands for the newest version."""
        self._functions: dict[str, RegisteredFunction] = {}
        ordered = sorted(functions, key=lambda f: (f.spec.name, f.spec.version))
        for function in ordered:
            self._functions[function.spec.qualified_name] = function
        self._newest = {function.spec.name: function for function in ordered}

    @property
    def specs(self) -> list[FunctionSpec]:
        """All functions, ordered by name, then version."""
        return [function.spec for function in self._functions.values()]

    def find(self, name: str) -> RegisteredFunction:
        """Finds a function.

        Args:
            name: "spherical" for the newest version, "spherical@2" for one; the
                prefix "functions/" may stand before it.

        Returns:
            The function.

        Raises:
            ServiceError: There is none.
        """
        name = name.removeprefix("functions/")
        found = self._functions.get(name) or self._newest.get(name)
        if found is None:
            raise self._not_found(name)
        return found

    def _not_found(self, name: str) -> ServiceError:
        bare = name.partition("@")[0]
        if bare in self._newest:
            versions = [s.version for s in self.specs if s.name == bare]
            remedy = f"It has version {', '.join(map(str, versions))}."
        else:
            close = difflib.get_close_matches(bare, self._newest, n=3)
            remedy = (
                f"Did you mean {' or '.join(close)}?"
                if close
                else "List the functions to see their names."
            )
        return ServiceError(
            "FUNCTION_NOT_FOUND",
            f"functions/{name[:200]} is not registered. {remedy}",
            field="function",
            function=name[:200],
        )


def build_catalog(registries: Iterable[Registry]) -> Catalog:
    """Checks and traces everything declared.

    Args:
        registries: What to serve.

    Returns:
        The catalog.

    Raises:
        RegistrationError: Functions can't be served; the error has every problem.
    """
    functions: list[RegisteredFunction] = []
    problems: list[str] = []
    seen: dict[str, Declaration] = {}
    for declaration in (d for registry in registries for d in registry.declarations):
        name = declaration.qualified_name
        try:
            if name in seen:
                raise _UnfitError(duplicate_problem(seen[name]))
            seen[name] = declaration
            functions.append(_register(declaration))
        except (AnnotationError, _UnfitError) as error:
            problems.append(describe_problem(declaration, str(error)))
    if problems:
        raise RegistrationError(*problems)
    return Catalog(functions)


class _UnfitError(Exception):
    """A declaration can't be served."""


def input_structs(
    inputs: Sequence[InputSpec],
) -> list[jax.ShapeDtypeStruct]:
    """Returns the abstract inputs of one point."""
    return [
        jax.ShapeDtypeStruct(spec.shape, dtype_named(spec.dtype)) for spec in inputs
    ]


def x64(inputs: Sequence[InputSpec]) -> Any:
    """Returns the context in which a program of these inputs is traced and run.

    JAX's 64-bit switch is thrown for each program by its inputs, so that float32
    and float64 live side by side in one process, each with its own constants.

    Args:
        inputs: The program's inputs.

    Returns:
        A context manager, for the current thread.
    """
    wide = {"float64", "complex128", "int64", "uint64"}
    return jax.enable_x64(any(spec.dtype in wide for spec in inputs))


def _register(declaration: Declaration) -> RegisteredFunction:
    signature = read_signature(declaration.function)
    call = _by_position(declaration.function)
    inputs, leaves = _trace_somewhere(call, signature, declaration.sizes)
    modes, missing = _find_modes(call, signature, inputs)
    if declaration.mode != "auto" and declaration.mode not in modes:
        raise _UnfitError(
            f"mode={declaration.mode!r}, but the function has no such mode "
            f"({missing[declaration.mode]}). Leave mode out."
        )
    spec = FunctionSpec(
        name=declaration.name,
        version=declaration.version,
        documentation=inspect.getdoc(declaration.function) or "",
        signature=signature,
        results=_result_shapes(call, signature, inputs, leaves),
        modes=modes,
        missing_modes=missing,
        preferred_mode=declaration.mode,
        largest_batch=declaration.largest_batch,
    )
    return RegisteredFunction(spec, call, declaration.batchable)


def _by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that also takes keyword-only parameters by position."""
    parameters = inspect.signature(function).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if not keywords:
        return function
    positional = len(parameters) - len(keywords)

    def call(*inputs: Any) -> Any:
        named = dict(zip(keywords, inputs[positional:], strict=True))
        return function(*inputs[:positional], **named)

    return call


def _trace_somewhere(
    call: Callable[..., Any], signature: Signature, sizes: Mapping[str, int]
) -> tuple[list[InputSpec], list[Leaf]]:
    """Traces a function at the first sizes that suit it."""
    symbols = signature.symbols
    if unknown := set(sizes) - set(symbols):
        raise _UnfitError(
            f"sizes= names {', '.join(sorted(unknown))}, but its dimensions are "
            f"{', '.join(symbols) or 'all fixed'}. Name only these."
        )
    failures: list[str] = []
    trials = trial_sizes(tuple(s for s in symbols if s not in sizes))
    for trial in ({**trial, **sizes} for trial in trials):
        try:
            shapes = signature.shapes(trial)
        except DimensionError as error:
            failures.append(str(error))
            continue
        inputs = [
            InputSpec(shape, _traced_dtype(argument), is_batched=False)
            for argument, shape in zip(signature.arguments, shapes, strict=True)
        ]
        try:
            return inputs, _abstract_results(call, inputs)
        except Exception as error:
            where = ", ".join(f"{symbol} = {size}" for symbol, size in trial.items())
            failures.append(
                f"tracing it{f' at {where}' if where else ''} failed: "
                f"{describe_exception(error)}"
            )
    remedy = "Mend it so that JAX can trace it with jax.jit"
    if len(symbols) > len(sizes):
        remedy += ", or pass sizes= with sizes of its symbolic dimensions that suit it"
    raise _UnfitError(f"{failures[0]} {remedy}.")


def _traced_dtype(argument: Argument) -> str:
    for dtype in _TRACED_DTYPES:
        if dtype in argument.dtypes:
            return dtype
    return argument.dtypes[-1] if "complex64" not in argument.dtypes else "complex64"


def _abstract_results(
    call: Callable[..., Any], inputs: Sequence[InputSpec]
) -> list[Leaf]:
    """Traces f and returns its results without their numbers."""
    paths: list[Any] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        leaves = results(call, arrays)
        paths.extend(leaf.path for leaf in leaves)
        return [leaf.array for leaf in leaves]

    with x64(inputs):
        arrays = jax.eval_shape(flat, *input_structs(inputs))
    return list(map(Leaf, paths, arrays))


def result_size(call: Callable[..., Any], inputs: Sequence[InputSpec]) -> int:
    """Returns m: how many real or complex numbers a function returns.

    Args:
        call: The function, taking all arguments by position.
        inputs: The inputs of one point.

    Returns:
        The rows of its Jacobian.

    Raises:
        Exception: Whatever the function raises for these shapes.
    """
    leaves = _abstract_results(call, inputs)
    return sum(math.prod(leaf.array.shape) for leaf in leaves if is_inexact(leaf.array))


def _find_modes(
    call: Callable[..., Any], signature: Signature, inputs: list[InputSpec]
) -> tuple[tuple[Mode, ...], dict[Mode, str]]:
    """Traces each mode; returns those that exist and why the others do not."""
    wrt = [
        (place, argument.name)
        for place, argument in enumerate(signature.arguments)
        if inputs[place].dtype in INEXACT
    ]
    if not wrt:
        gap = "it has no real or complex argument"
        return (), dict.fromkeys(_MODES, gap)
    missing: dict[Mode, str] = {}
    for mode in _MODES:

        def matrix(*arrays: jax.Array, mode: Mode = mode) -> jax.Array:
            return Point(call, arrays, resource="it", wrt=wrt, mode=mode).matrix

        try:
            with x64(inputs):
                jax.eval_shape(matrix, *input_structs(inputs))
        except Exception as error:
            missing[mode] = _first_sentence(error)
    return tuple(mode for mode in _MODES if mode not in missing), missing


def _first_sentence(error: Exception) -> str:
    text = describe_exception(error).splitlines()[0]
    return text.partition(". ")[0].rstrip(".")


def _result_shapes(
    call: Callable[..., Any],
    signature: Signature,
    inputs: list[InputSpec],
    leaves: list[Leaf],
) -> tuple[tuple[Any, tuple[Dimension | None, ...]], ...]:
    """Returns the results' shapes in the names of the arguments' dimensions.

    Not every function can be traced with symbolic sizes; then only the rank is
    known, unless no dimension is symbolic at all.
    """
    if not signature.symbols:
        return tuple((leaf.path, tuple(leaf.array.shape)) for leaf in leaves)
    try:
        scope = export.SymbolicScope()
        symbolic = [
            jax.ShapeDtypeStruct(
                export.symbolic_shape(", ".join(map(str, argument.shape)), scope=scope),
                dtype_named(spec.dtype),
            )
            for argument, spec in zip(signature.arguments, inputs, strict=True)
        ]
        with x64(inputs):
            shapes = [
                array.shape
                for array in jax.eval_shape(
                    lambda *arrays: [leaf.array for leaf in results(call, arrays)],
                    *symbolic,
                )
            ]
    except Exception:
        unknown = [(None,) * leaf.array.ndim for leaf in leaves]
        return tuple(zip((leaf.path for leaf in leaves), unknown, strict=True))
    return tuple(
        (
            leaf.path,
            tuple(d if isinstance(d, int) else str(d) for d in shape),
        )
        for leaf, shape in zip(leaves, shapes, strict=True)
    )
