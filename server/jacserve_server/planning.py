"""Checks a query against its function's signature: `Query` in, `Work` out.

Every refusal that shapes, dtypes and names alone decide is made here, before any
memory or device time is spent.
"""

from collections.abc import Iterator

import numpy as np

from jacserve.tensors import Array, dtype_named, format_shape
from jacserve.vocabulary import Mode
from jacserve_server.errors import ServiceError
from jacserve_server.query import InputSpec, ProgramKey, Query, Work
from jacserve_server.signature import (
    INEXACT,
    Argument,
    DimensionError,
    FunctionSpec,
    size_of,
)


def plan(query: Query, function: FunctionSpec) -> Work:
    """Fits a query to the function that it names.

    Args:
        query: What was asked.
        function: The function.

    Returns:
        The program to run and its inputs.

    Raises:
        ServiceError: The query does not fit.
    """
    inputs = [
        _check_dtype(argument, array, query.cast, function)
        for argument, array in _matched(query, function)
    ]
    arguments = function.signature.arguments
    batch = _bind_shapes(function, inputs)
    if (
        batch is not None
        and function.largest_batch is not None
        and batch > function.largest_batch
    ):
        raise ServiceError(
            "BATCH_TOO_LARGE",
            f"the batch has {batch} points, but {function.resource} takes at most "
            f"{function.largest_batch} at once. Split it.",
            batch=batch,
            largest_batch=function.largest_batch,
        )
    has_derivative = query.quantities != ("value",)
    key = ProgramKey(
        function=function.qualified_name,
        quantities=query.quantities,
        wrt=_differentiated(query, function, inputs) if has_derivative else (),
        mode=_check_mode(query.mode, function) if has_derivative else None,
        layout=query.layout if has_derivative else "matrix",
        inputs=tuple(
            InputSpec(
                shape=array.shape[array.ndim - len(argument.shape) :],
                dtype=array.dtype.name,
                is_batched=array.ndim > len(argument.shape),
            )
            for argument, array in zip(arguments, inputs, strict=True)
        ),
        bucket=None if batch is None else bucket_for(batch),
    )
    return Work(key=key, inputs=tuple(inputs), batch=batch)


def bucket_for(batch: int) -> int:
    """Returns the rows of the program that serves a batch.

    Powers of two: few programs serve every batch size, and no more than half of a
    program's rows are padding.

    Args:
        batch: Rows asked for.

    Returns:
        The next power of two; 0 for none.
    """
    return 1 << (batch - 1).bit_length() if batch else 0


def _matched(query: Query, function: FunctionSpec) -> Iterator[tuple[Argument, Array]]:
    """Yields each argument with its array, in declared order."""
    arguments = function.signature.arguments
    declared = [argument.name for argument in arguments]
    takes = f"{function.resource} takes {', '.join(declared)}"
    given: dict[str, Array] = {}
    for place, (label, array) in enumerate(query.inputs):
        if not label and place >= len(declared):
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"{len(query.inputs)} inputs were given, but {takes}. "
                f"Pass {len(declared)}.",
                field="inputs",
                given=len(query.inputs),
                declared=len(declared),
            )
        argument = label or declared[place]
        if argument not in declared:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"there is no argument {argument}: {takes}. Use these names, or pass "
                "the arrays in this order without names.",
                field=f"inputs[{place}].name",
                argument=argument,
                declared=", ".join(declared),
            )
        if argument in given:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"{argument} was given twice, but {takes}. Pass each once.",
                field=f"inputs[{place}].name",
                argument=argument,
            )
        given[argument] = array
    missing = [argument for argument in declared if argument not in given]
    if missing:
        raise ServiceError(
            "ARGUMENT_MISMATCH",
            f"{', '.join(missing)} was not given, but {takes}. "
            f"Pass all {len(declared)}.",
            field="inputs",
            missing=", ".join(missing),
            declared=", ".join(declared),
        )
    return ((argument, given[argument.name]) for argument in arguments)


def _check_dtype(
    argument: Argument, array: Array, cast: bool, function: FunctionSpec
) -> Array:
    dtype = array.dtype.name
    if dtype in argument.dtypes:
        return array
    widest = argument.dtypes[0]
    loses_imaginary = array.dtype.kind == "c" and not widest.startswith("complex")
    if cast and not loses_imaginary:
        return array.astype(dtype_named(widest))
    raise ServiceError(
        "DTYPE_MISMATCH",
        f"{argument.name} is {dtype}, but {function.resource} takes "
        f"{', '.join(argument.dtypes)}. "
        + (
            "Send its real part, if that is what you mean."
            if loses_imaginary
            else f"Convert it, or set cast to have it converted to {widest}."
        ),
        field=f"inputs[{argument.name}].tensor.dtype",
        argument=argument.name,
        dtype=dtype,
        accepted=", ".join(argument.dtypes),
    )


def _bind_shapes(function: FunctionSpec, inputs: list[Array]) -> int | None:
    """Checks the shapes against the signature; returns the batch's rows."""
    sizes: dict[str, tuple[int, str]] = {}
    batch: tuple[int, str] | None = None
    arguments = function.signature.arguments
    for argument, array in zip(arguments, inputs, strict=True):
        extra = array.ndim - len(argument.shape)
        if extra not in {0, 1}:
            raise _shape_mismatch(argument, array.shape, function)
        if extra:
            rows = (array.shape[0], argument.name)
            batch = batch or rows
            if rows[0] != batch[0]:
                raise _conflict("the batch", batch, rows)
        for dimension, size in zip(argument.shape, array.shape[extra:], strict=True):
            if isinstance(dimension, int):
                if size != dimension:
                    raise _shape_mismatch(argument, array.shape, function)
            elif dimension.isidentifier():
                bound = sizes.setdefault(dimension, (size, argument.name))
                if size != bound[0]:
                    raise _conflict(dimension, bound, (size, argument.name))
    _check_expressions(arguments, inputs, {s: size for s, (size, _) in sizes.items()})
    return batch[0] if batch else None


def _check_expressions(
    arguments: tuple[Argument, ...], inputs: list[Array], sizes: dict[str, int]
) -> None:
    for argument, array in zip(arguments, inputs, strict=True):
        actual = array.shape[array.ndim - len(argument.shape) :]
        for dimension, size in zip(argument.shape, actual, strict=True):
            if isinstance(dimension, int) or dimension.isidentifier():
                continue
            try:
                expected: int | str = size_of(dimension, sizes)
            except DimensionError as error:
                expected = str(error)
            if size != expected:
                known = ", ".join(f"{s} = {n}" for s, n in sizes.items())
                raise ServiceError(
                    "SHAPE_MISMATCH",
                    f"{argument.name} has shape {format_shape(array.shape)}, but with "
                    f"{known} its axis {dimension} is {expected}, not {size}. "
                    "Pass arrays whose sizes agree.",
                    field=f"inputs[{argument.name}].tensor.shape",
                    argument=argument.name,
                    shape=format_shape(array.shape),
                    expected=expected,
                )


def _shape_mismatch(
    argument: Argument, shape: tuple[int, ...], function: FunctionSpec
) -> ServiceError:
    single = format_shape(argument.shape)
    batched = format_shape(("b", *argument.shape))
    points: dict[int, str] = {0: "a scalar", 1: f"a vector of length {single[1:-1]}"}
    point = points.get(len(argument.shape), f"an array {single}")
    return ServiceError(
        "SHAPE_MISMATCH",
        f"{argument.name} has shape {format_shape(shape)}, but {function.resource} "
        f"takes {single}. Pass {point}, or {batched} for a batch.",
        field=f"inputs[{argument.name}].tensor.shape",
        argument=argument.name,
        shape=format_shape(shape),
        expected=single,
    )


def _conflict(
    dimension: str, first: tuple[int, str], second: tuple[int, str]
) -> ServiceError:
    return ServiceError(
        "SHAPE_MISMATCH",
        f"{dimension} is {first[0]} in {first[1]}, but {second[0]} in {second[1]}. "
        "Pass arrays whose sizes agree.",
        field=f"inputs[{second[1]}].tensor.shape",
        dimension=dimension,
        sizes=f"{first[0]}, {second[0]}",
        arguments=f"{first[1]}, {second[1]}",
    )


def _differentiated(
    query: Query, function: FunctionSpec, inputs: list[Array]
) -> tuple[str, ...]:
    """Returns the arguments to differentiate with respect to."""
    arguments = function.signature.arguments
    dtypes = {
        argument.name: array.dtype.name
        for argument, array in zip(arguments, inputs, strict=True)
    }
    differentiable = [name for name, dtype in dtypes.items() if dtype in INEXACT]
    for argument in query.wrt:
        if argument not in dtypes:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"wrt names {argument}, but {function.resource} takes "
                f"{', '.join(dtypes)}. Use these names.",
                field="wrt",
                argument=argument,
                declared=", ".join(dtypes),
            )
        if argument not in differentiable:
            raise ServiceError(
                "DTYPE_MISMATCH",
                f"wrt names {argument}, which is {dtypes[argument]}: only real and "
                "complex arguments have derivatives. Leave it out of wrt.",
                field="wrt",
                argument=argument,
                dtype=dtypes[argument],
            )
    if len(set(query.wrt)) < len(query.wrt):
        raise ServiceError(
            "ARGUMENT_MISMATCH",
            f"wrt names an argument twice: {', '.join(query.wrt)}. Name each once.",
            field="wrt",
            wrt=", ".join(query.wrt),
        )
    wrt = query.wrt or tuple(differentiable)
    if not wrt:
        raise ServiceError(
            "QUANTITY_UNSUPPORTED",
            f"{function.resource} has no real or complex argument to differentiate. "
            "Ask for value alone.",
            field="quantities",
        )
    return wrt


def _check_mode(asked: Mode, function: FunctionSpec) -> Mode:
    """Returns the mode to run; "auto" when the shapes are to decide."""
    modes, missing = function.modes, function.missing_modes
    mode = function.preferred_mode if asked == "auto" else asked
    if not modes:
        reasons = "; ".join(f"{gap}: {why}" for gap, why in missing.items())
        raise ServiceError(
            "MODE_UNSUPPORTED",
            f"{function.resource} can't be differentiated ({reasons}). "
            "Ask for value alone.",
            field="mode",
            mode=asked,
            modes="",
        )
    if mode == "auto":
        return modes[0] if len(modes) == 1 else "auto"
    if mode not in modes:
        raise ServiceError(
            "MODE_UNSUPPORTED",
            f"mode is {mode}, but {function.resource} has {', '.join(modes)} only "
            f"({missing[mode]}). Use {modes[0]}, or auto.",
            field="mode",
            mode=mode,
            modes=", ".join(modes),
        )
    return mode


def padded(work: Work) -> tuple[Array, ...]:
    """Returns the inputs with as many rows as the program has.

    The last row is repeated: a real point can't make NaN, nor a loop that never
    ends, out of nothing.

    Args:
        work: A piece of work.

    Returns:
        The inputs; the very same arrays where nothing is to be added.
    """
    bucket = work.key.bucket
    if bucket is None or bucket == work.batch:
        return work.inputs
    return tuple(
        np.concatenate([array, np.repeat(array[-1:], bucket - len(array), axis=0)])
        if spec.is_batched
        else array
        for spec, array in zip(work.key.inputs, work.inputs, strict=True)
    )
