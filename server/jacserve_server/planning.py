"""Checks a query against its function's signature: `Query` in, `Work` out.

Every refusal that shapes, dtypes and names alone decide is made here, before any
memory or device time is spent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jacserve.dimensions import DimensionError, size_of
from jacserve.tensors import Array, cast_target, converted, format_shape
from jacserve.vocabulary import Layout
from jacserve_server.errors import ServiceError
from jacserve_server.quantities import QUANTITIES, in_order, needs_of
from jacserve_server.query import Query, SparsityQuery
from jacserve_server.signature import (
    INEXACT,
    WIDE,
    Argument,
    FunctionSpec,
)
from jacserve_server.vectors import Convert, Variable, fit_vectors
from jacserve_server.work import Computation, InputSpec, SparsityKey, Work

# A pattern is a picture for people, so one of moderate size is the default.
_DEFAULT_SIZE = 32
_MOST_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True)
class _Given:
    """An argument, and the array that a query gives for it."""

    argument: Argument
    array: Array
    field: str

    @property
    def has_batch(self) -> bool:
        return self.array.ndim > len(self.argument.shape)

    @property
    def point_shape(self) -> tuple[int, ...]:
        return self.array.shape[self.array.ndim - len(self.argument.shape) :]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A piece of work without its numbers.

    Attributes:
        computation: What to compute.
        batch: The rows; None for one point.
        is_exact: Whether it must not be computed together with other work.
        order: Which of the query's arrays comes where.
    """

    computation: Computation
    batch: int | None
    is_exact: bool
    order: tuple[int, ...]

    @staticmethod
    def of(work: Work, query: Query) -> "Plan":
        """Returns the plan by which a query became work.

        Args:
            work: The work.
            query: The query, whose arrays have not been converted.

        Returns:
            What all queries that differ in numbers alone have in common.
        """
        places = {id(array): place for place, array in enumerate(query.arrays)}
        order = tuple(places[id(array)] for array in work.arrays)
        return Plan(work.computation, work.batch, work.is_exact, order)

    def work(self, arrays: Sequence[Array]) -> Work:
        """Returns the work of a query with these arrays."""
        ordered = tuple([arrays[place] for place in self.order])
        return Work(self.computation, ordered, self.batch, self.is_exact)


def plan(
    query: Query,
    function: FunctionSpec,
    *,
    convert: Convert = converted,
) -> Work:
    """Fits a query to the function that it names.

    Args:
        query: What was asked.
        function: The function.
        convert: Converts an array to a dtype, where the query lets it be cast.

    Returns:
        What to compute, and on what.

    Raises:
        ServiceError: The query does not fit.
    """
    casting = convert if query.cast else None
    given = [
        _with_dtype(match, casting, function) for match in _matched(query, function)
    ]
    batch = _bind_shapes(given, function)
    if batch is not None and function.max_batch and batch > function.max_batch:
        raise ServiceError(
            "BATCH_TOO_LARGE",
            f"the batch has {batch} points, but {function.resource} takes at most "
            f"{function.max_batch} at once. Split it.",
            field="inputs",
            function=function.resource,
            batch=batch,
            max_batch=function.max_batch,
        )
    has_derivative = bool(needs_of(query.quantities))
    dtypes = {match.argument.name: match.array.dtype.name for match in given}
    _check_wrt(query.wrt, dtypes, function)
    wrt = _differentiated(query.wrt, dtypes, function) if has_derivative else ()
    by_name = {match.argument.name: match for match in given}
    variables = [
        Variable(name, by_name[name].point_shape, by_name[name].array.dtype.name)
        for name in wrt
    ]
    has_x64 = not WIDE.isdisjoint(dtypes.values())
    vectors = fit_vectors(
        query, function, variables, batch, has_x64=has_x64, convert=casting
    )
    computation = Computation(
        function=function.qualified_name,
        quantities=in_order(query.quantities),
        wrt=wrt,
        # Whether the mode exists depends on wrt and dtypes: tracing will show.
        mode=query.mode if has_derivative else None,
        layout=_canonical_layout(query, function),
        inputs=tuple(
            InputSpec(
                shape=match.point_shape,
                dtype=match.array.dtype.name,
                is_batched=match.has_batch,
            )
            for match in given
        ),
        tangents=vectors.tangents,
        cotangents=vectors.cotangents,
    )
    arrays = (*(match.array for match in given), *vectors.arrays)
    return Work(computation, arrays, batch, query.exact)


def plan_sparsity(sought: SparsityQuery, function: FunctionSpec) -> SparsityKey:
    """Fits a question about sparsity to the function that it names.

    Args:
        sought: What was asked.
        function: The function.

    Returns:
        Which pattern to find.

    Raises:
        ServiceError: The question does not fit.
    """
    symbols = function.signature.symbols
    for name, size in sought.sizes.items():
        if name not in symbols or not 0 <= size <= _MOST_ELEMENTS:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"sizes has {name} = {size}, but {function.resource} has the "
                f"dimensions {', '.join(symbols) or 'none'}, each of at most "
                f"{_MOST_ELEMENTS}. Name only these.",
                field="sizes",
                function=function.resource,
                dimension=name,
                size=size,
            )
    default = dict.fromkeys(symbols, _DEFAULT_SIZE)
    sizes = {**default, **function.declared_sizes, **sought.sizes}
    try:
        shapes = function.signature.shapes(sizes)
    except DimensionError as error:
        raise ServiceError(
            "SHAPE_MISMATCH", f"{error}. Pass other sizes.", field="sizes"
        ) from error
    elements = sum(math.prod(shape) for shape in shapes)
    if elements > _MOST_ELEMENTS:
        raise ServiceError(
            "SHAPE_MISMATCH",
            f"inputs of these sizes have {elements} numbers, and at most "
            f"{_MOST_ELEMENTS} are allowed. Pass smaller sizes.",
            field="sizes",
            elements=elements,
        )
    inputs = tuple(
        InputSpec(shape, argument.trial_dtype, is_batched=False)
        for shape, argument in zip(shapes, function.signature.arguments, strict=True)
    )
    dtypes = {
        argument.name: spec.dtype
        for argument, spec in zip(function.signature.arguments, inputs, strict=True)
    }
    _check_wrt(sought.wrt, dtypes, function)
    wrt = _differentiated(sought.wrt, dtypes, function)
    return SparsityKey(function.qualified_name, inputs, wrt, sought.kind)


def _canonical_layout(query: Query, function: FunctionSpec) -> Layout:
    """Returns the layout as far as it makes a difference."""
    specs = [QUANTITIES[quantity] for quantity in query.quantities]
    if query.layout == "blocks" and any(spec.has_blocks for spec in specs):
        if query.mode == "sparse":
            raise ServiceError(
                "MODE_UNSUPPORTED",
                "sparse mode makes matrices, not blocks. Pass another layout or mode.",
                field="layout",
                function=function.resource,
            )
        return "blocks"
    is_sparse = query.layout in {"csr", "coo"}
    return "csr" if is_sparse and any(spec.has_values for spec in specs) else "matrix"


def _matched(query: Query, function: FunctionSpec) -> list[_Given]:
    """Returns each argument with its array, in declared order."""
    arguments = {a.name: a for a in function.signature.arguments}
    declared = ", ".join(arguments)
    takes = f"{function.resource} takes {declared}"
    given: dict[str, _Given] = {}
    for place, (label, array) in enumerate(query.inputs):
        if not label and place >= len(arguments):
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"{len(query.inputs)} inputs were given, but {takes}. "
                f"Pass {len(arguments)}.",
                field="inputs",
                function=function.resource,
                given=len(query.inputs),
                declared=declared,
            )
        name = label or list(arguments)[place]
        problem = None
        if name not in arguments:
            problem = (
                f"there is no argument {name}: {takes}. Use these names, or pass "
                "the arrays in this order without names."
            )
        elif name in given:
            problem = f"{name} was given twice, but {takes}. Pass each once."
        if problem:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                problem,
                field=f"inputs[{place}].name",
                function=function.resource,
                argument=name,
                declared=declared,
            )
        given[name] = _Given(arguments[name], array, f"inputs[{place}].tensor")
    missing = [name for name in arguments if name not in given]
    if missing:
        raise ServiceError(
            "ARGUMENT_MISMATCH",
            f"{', '.join(missing)} was not given, but {takes}. "
            f"Pass {'all ' if len(arguments) > 1 else ''}{len(arguments)}.",
            field="inputs",
            function=function.resource,
            missing=", ".join(missing),
            declared=declared,
        )
    return [given[name] for name in arguments]


def _with_dtype(
    match: _Given,
    convert: Convert | None,
    function: FunctionSpec,
) -> _Given:
    argument, dtype = match.argument, match.array.dtype.name
    if dtype in argument.dtypes:
        return match
    target = cast_target(dtype, argument.dtypes)
    remedy = "Convert it yourself, if you mean to lose what it can't hold."
    if target is not None:
        remedy = f"Convert it, or set cast to have it converted to {target}."
    if target is not None and convert is not None:
        try:
            array = convert(match.array, target)
            return _Given(argument, array, match.field)
        except ValueError as error:
            remedy = f"It can't be converted: {error}."
    raise ServiceError(
        "DTYPE_MISMATCH",
        f"{argument.name} is {dtype}, but {function.resource} takes "
        f"{', '.join(argument.dtypes)}. {remedy}",
        field=f"{match.field}.dtype",
        function=function.resource,
        argument=argument.name,
        dtype=dtype,
        accepted=", ".join(argument.dtypes),
    )


def _bind_shapes(given: list[_Given], function: FunctionSpec) -> int | None:
    """Checks the shapes against the signature; returns the batch's rows."""
    sizes: dict[str, tuple[int, str]] = {}
    batch: tuple[int, str] | None = None
    for match in given:
        argument, shape = match.argument, match.array.shape
        if len(shape) - len(argument.shape) not in {0, 1}:
            raise _shape_mismatch(match, function)
        if match.has_batch:
            rows = (shape[0], argument.name)
            batch = batch or rows
            if rows[0] != batch[0]:
                raise _conflict("the batch", batch, rows, match.field)
        for dimension, size in zip(argument.shape, match.point_shape, strict=True):
            if isinstance(dimension, int):
                if size != dimension:
                    raise _shape_mismatch(match, function)
            elif dimension.isidentifier():
                bound = sizes.setdefault(dimension, (size, argument.name))
                if size != bound[0]:
                    here = (size, argument.name)
                    raise _conflict(dimension, bound, here, match.field)
    _check_expressions(given, {symbol: size for symbol, (size, _) in sizes.items()})
    return batch[0] if batch else None


def _check_expressions(given: list[_Given], sizes: dict[str, int]) -> None:
    for match in given:
        argument = match.argument
        for dimension, size in zip(argument.shape, match.point_shape, strict=True):
            if isinstance(dimension, int) or dimension.isidentifier():
                continue
            try:
                expected: int | str = size_of(dimension, sizes)
            except DimensionError as error:
                expected = str(error)
            if size != expected:
                known = ", ".join(f"{s} = {n}" for s, n in sizes.items())
                shape = format_shape(match.array.shape)
                raise ServiceError(
                    "SHAPE_MISMATCH",
                    f"{argument.name} has shape {shape}, but with {known} its axis "
                    f"{dimension} is {expected}, not {size}. Pass arrays whose sizes "
                    "agree.",
                    field=f"{match.field}.shape",
                    argument=argument.name,
                    shape=shape,
                    expected=expected,
                )


def _shape_mismatch(match: _Given, function: FunctionSpec) -> ServiceError:
    argument = match.argument
    shape, single = format_shape(match.array.shape), format_shape(argument.shape)
    batched = format_shape(("b", *argument.shape))
    points: dict[int, str] = {0: "a scalar", 1: f"a vector of length {single[1:-1]}"}
    point = points.get(len(argument.shape), f"an array {single}")
    return ServiceError(
        "SHAPE_MISMATCH",
        f"{argument.name} has shape {shape}, but {function.resource} takes {single}. "
        f"Pass {point}, or {batched} for a batch.",
        field=f"{match.field}.shape",
        function=function.resource,
        argument=argument.name,
        shape=shape,
        expected=single,
    )


def _conflict(
    dimension: str, first: tuple[int, str], second: tuple[int, str], field: str
) -> ServiceError:
    return ServiceError(
        "SHAPE_MISMATCH",
        f"{dimension} is {first[0]} in {first[1]}, but {second[0]} in {second[1]}. "
        "Pass arrays whose sizes agree.",
        field=f"{field}.shape",
        dimension=dimension,
        sizes=f"{first[0]}, {second[0]}",
        arguments=f"{first[1]}, {second[1]}",
    )


def _check_wrt(
    wrt: tuple[str, ...], dtypes: Mapping[str, str], function: FunctionSpec
) -> None:
    for place, argument in enumerate(wrt):
        problem = None
        if argument not in dtypes:
            problem = (
                f"wrt names {argument or 'nothing'}, but {function.resource} takes "
                f"{', '.join(dtypes)}. Use these names."
            )
        elif dtypes[argument] not in INEXACT:
            problem = (
                f"wrt names {argument}, which is {dtypes[argument]}: only real and "
                "complex arguments have derivatives. Leave it out of wrt."
            )
        elif argument in wrt[:place]:
            problem = f"wrt names {argument} twice. Name each argument once."
        if problem:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                problem,
                field=f"wrt[{place}]",
                function=function.resource,
                argument=argument,
                dtype=dtypes.get(argument, ""),
                declared=", ".join(dtypes),
            )


def _differentiated(
    wrt: tuple[str, ...], dtypes: Mapping[str, str], function: FunctionSpec
) -> tuple[str, ...]:
    """Returns the arguments to differentiate with respect to."""
    differentiable = tuple(name for name, dtype in dtypes.items() if dtype in INEXACT)
    if not differentiable:
        raise ServiceError(
            "QUANTITY_UNSUPPORTED",
            f"{function.resource} has no real or complex argument to differentiate. "
            "Ask for value alone.",
            field="quantities",
            function=function.resource,
        )
    return wrt or differentiable
