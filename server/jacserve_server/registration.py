"""Checks and traces declarations: registries in, a catalog out.

Which modes a function has is found by tracing it, never by running it. All problems
of all functions are reported together, and then nothing is served.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import export

from jacserve.dimensions import Dimension, DimensionError
from jacserve.tensors import dtype_named
from jacserve.vocabulary import DIRECTIONS, Direction
from jacserve_server.annotations import (
    AnnotationError,
    documentation_of,
    read_signature,
)
from jacserve_server.catalog import Catalog, RegisteredFunction
from jacserve_server.errors import ServiceError
from jacserve_server.registry import (
    Declaration,
    RegistrationError,
    Registry,
    describe_problem,
    duplicate_problem,
)
from jacserve_server.signature import (
    INEXACT,
    FunctionSpec,
    Signature,
    trial_sizes,
)
from jacserve_server.tracing import abstract_results, mode_problem, x64
from jacserve_server.transforms.point import FunctionError, Leaf, results
from jacserve_server.warmup import first_work
from jacserve_server.work import InputSpec


def build_catalog(registries: Iterable[Registry]) -> Catalog:
    """Checks and traces everything declared.

    Args:
        registries: What to serve.

    Returns:
        The catalog.

    Raises:
        RegistrationError: Functions can't be served; the error has every problem.
    """
    for setting in ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs"):
        if getattr(jax.config, setting):
            raise RegistrationError(
                f"{setting} is on, with which no program can be served. Leave it out "
                "of the files that register functions, and out of the environment."
            )
    registries = tuple(registries)
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
    return Catalog(functions, registries)


class _UnfitError(Exception):
    """A declaration can't be served."""


def _register(declaration: Declaration) -> RegisteredFunction:
    signature = read_signature(declaration.function)
    call = _by_position(declaration.function, signature)
    sizes, inputs, leaves = _trace_somewhere(call, signature, declaration.sizes)
    modes, missing = _find_modes(call, signature, inputs)
    if declaration.mode in missing:
        raise _UnfitError(
            f"mode={declaration.mode!r}, but the function has no such mode "
            f"({missing[declaration.mode]}). Leave mode out."
        )
    spec = FunctionSpec(
        name=declaration.name,
        version=declaration.version,
        documentation=documentation_of(declaration.function),
        signature=signature,
        results=_result_shapes(call, signature, inputs, leaves),
        modes=modes,
        missing_modes=missing,
        preferred_mode=declaration.mode,
        max_batch=declaration.max_batch,
        sizes=sizes,
        declared_sizes=declaration.sizes,
    )
    for warm_up in declaration.warm_up:
        try:
            first_work(spec, warm_up)
        except (ServiceError, DimensionError) as error:
            raise _UnfitError(f"{warm_up} does not fit it: {error}") from error
    return RegisteredFunction(
        spec,
        call,
        declaration.batchable,
        tuple(declaration.warm_up),
        declaration.isolation == "process",
        declaration.max_execute_s,
    )


def _by_position(
    function: Callable[..., Any], signature: Signature
) -> Callable[..., Any]:
    """Returns a function that also takes keyword-only parameters by position."""
    parameters = inspect.signature(function).parameters
    names = [argument.name for argument in signature.arguments]
    keywords = [
        n for n in names if parameters[n].kind is inspect.Parameter.KEYWORD_ONLY
    ]
    if not keywords:
        return function
    positional = len(names) - len(keywords)

    def call(*inputs: Any) -> Any:
        named = dict(zip(keywords, inputs[positional:], strict=True))
        return function(*inputs[:positional], **named)

    return call


def _trace_somewhere(
    call: Callable[..., Any], signature: Signature, sizes: Mapping[str, int]
) -> tuple[Mapping[str, int], list[InputSpec], list[Leaf]]:
    """Traces a function at the first sizes that suit it."""
    symbols = signature.symbols
    if unknown := set(sizes) - set(symbols):
        raise _UnfitError(
            f"sizes= names {', '.join(sorted(unknown))}, but its dimensions are "
            f"{', '.join(symbols) or 'all fixed'}. Name only these."
        )
    failures: list[str] = []
    is_traced = False
    trials = trial_sizes(tuple(s for s in symbols if s not in sizes))
    for trial in ({**trial, **sizes} for trial in trials):
        try:
            shapes = signature.shapes(trial)
        except DimensionError as error:
            failures.append(f"{error}.")
            continue
        inputs = [
            InputSpec(shape, argument.trial_dtype, is_batched=False)
            for argument, shape in zip(signature.arguments, shapes, strict=True)
        ]
        is_traced = True
        try:
            return trial, inputs, abstract_results(call, inputs)
        except FunctionError as error:
            sizes_text = ", ".join(f"{s} = {size}" for s, size in trial.items())
            where = f" at {sizes_text}" if trial else ""
            failures.append(f"tracing it{where} failed: {str(error).rstrip('.')}.")
    if not is_traced:
        raise _UnfitError(failures[0])
    remedy = "Mend it so that JAX can trace it with jax.jit"
    if len(symbols) > len(sizes):
        remedy += ", or pass sizes= with sizes of its symbolic dimensions that suit it"
    raise _UnfitError(f"{failures[0]} {remedy}.")


def _find_modes(
    call: Callable[..., Any], signature: Signature, inputs: list[InputSpec]
) -> tuple[tuple[Direction, ...], dict[Direction, str]]:
    """Traces each mode; returns those that exist and why the others do not."""
    wrt = [
        (place, argument.name)
        for place, argument in enumerate(signature.arguments)
        if inputs[place].dtype in INEXACT
    ]
    missing: dict[Direction, str] = {}
    for mode in DIRECTIONS:
        problem = "it has no real or complex argument"
        if wrt:
            problem = mode_problem(call, inputs, wrt, mode)
        if problem:
            missing[mode] = problem
    return tuple(mode for mode in DIRECTIONS if mode not in missing), missing


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
            arrays = jax.eval_shape(
                lambda *arrays: [leaf.array for leaf in results(call, arrays)],
                *symbolic,
            )
    except Exception:
        return tuple((leaf.path, (None,) * leaf.array.ndim) for leaf in leaves)
    if len(arrays) != len(leaves):  # It returns other things at other sizes.
        return tuple((leaf.path, (None,) * leaf.array.ndim) for leaf in leaves)
    return tuple(
        (leaf.path, tuple(d if isinstance(d, int) else str(d) for d in array.shape))
        for leaf, array in zip(leaves, arrays, strict=True)
    )
