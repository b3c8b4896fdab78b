"""Fits tangents and cotangents to what they are multiplied with.

In a query without a batch, a vector has the shape of what it belongs to, or one axis k
more for several at once. In a batch of b points, one without further axes is shared,
[b, ...] has one for each point, and [b, k, ...] several.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jacserve import trees
from jacserve.tensors import Array, cast_target, dtype_named, format_shape
from jacserve.trees import Path
from jacserve_server.errors import ServiceError
from jacserve_server.quantities import QUANTITIES
from jacserve_server.query import Query
from jacserve_server.signature import INEXACT, WIDE, FunctionSpec
from jacserve_server.work import InputSpec

Kind = Literal["tangents", "cotangents"]
# Converts an array to a dtype of this name.
Convert = Callable[[Array, str], Array]


@dataclass(frozen=True, slots=True)
class Variable:
    """An argument that is differentiated: its name, and shape and dtype at a point."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Vectors:
    """Vectors that fit, and what a program has to know of them."""

    tangents: tuple[InputSpec, ...] = ()
    cotangents: tuple[tuple[Path, InputSpec], ...] = ()
    arrays: tuple[Array, ...] = ()


def fit_vectors(
    query: Query,
    function: FunctionSpec,
    wrt: Sequence[Variable],
    batch: int | None,
    *,
    has_x64: bool,
    convert: Convert | None,
) -> Vectors:
    """Checks the vectors of a query.

    Args:
        query: What was asked.
        function: The function.
        wrt: The arguments differentiated, in order.
        batch: The points of the batch; None for one.
        has_x64: Whether it is computed with 64-bit types.
        convert: Converts an array to a dtype; None where it must not be.

    Returns:
        The vectors, converted where the query allows it. How many numbers a
        cotangent must have shows when the function is traced.

    Raises:
        ServiceError: A vector is missing or left over, or does not fit.
    """
    _check_presence(query, "tangents", len(query.tangents))
    _check_presence(query, "cotangents", len(query.cotangents))
    widest = _common_dtype(wrt)
    tangents = [
        _fitted(convert, array, shape, batch, f"tangents[{place}]", label, dtype)
        for place, label, array, shape, dtype in _tangents(query, function, wrt, widest)
    ]
    cotangents = [
        (
            path,
            *_fitted(
                convert, array, shape, batch, f"cotangents[{place}]", label, widest
            ),
        )
        for place, (path, label, array, shape) in enumerate(
            _cotangents(query, function)
        )
    ]
    for place, (_, spec, _, _) in enumerate(cotangents):
        if spec.dtype in WIDE and not has_x64:
            raise ServiceError(
                "DTYPE_MISMATCH",
                f"a cotangent is {spec.dtype}, but {function.resource} is given no "
                "64-bit inputs and returns no such results. Convert it.",
                field=f"cotangents[{place}].tensor.dtype",
                function=function.resource,
                dtype=spec.dtype,
            )
    for kind, several in (
        ("tangents", [spec.shape[: len(spec.shape) - r] for spec, _, r in tangents]),
        (
            "cotangents",
            [spec.shape[: len(spec.shape) - r] for _, spec, _, r in cotangents],
        ),
    ):
        if len(set(several)) > 1:
            raise ServiceError(
                "SHAPE_MISMATCH",
                f"the {kind} do not agree in an axis for several at once: "
                f"{', '.join(map(format_shape, several))}. Pass all with one, of the "
                "same length, or all without.",
                field=kind,
            )
    return Vectors(
        tangents=tuple(spec for spec, _, _ in tangents),
        cotangents=tuple((path, spec) for path, spec, _, _ in cotangents),
        arrays=(
            *(array for _, array, _ in tangents),
            *(array for _, _, array, _ in cotangents),
        ),
    )


def _check_presence(query: Query, kind: Kind, count: int) -> None:
    takers = [q for q in query.quantities if QUANTITIES[q].takes == kind]
    if bool(takers) == bool(count):
        return
    problem = f"{kind} were given, but no quantity takes them. Leave them out."
    if takers:
        verb = "needs" if len(takers) == 1 else "need"
        problem = f"{', '.join(takers)} {verb} {kind}. Pass {kind}=."
    raise ServiceError(
        "ARGUMENT_MISMATCH", problem, field=kind, quantities=", ".join(query.quantities)
    )


def _common_dtype(wrt: Sequence[Variable]) -> str:
    dtypes = {variable.dtype for variable in wrt}
    if not dtypes:
        return "float64"
    try:
        return np.result_type(*map(dtype_named, dtypes)).name
    except TypeError:  # float16 and bfloat16 have none in numpy; in JAX they do.
        return "float32"


def _tangents(
    query: Query, function: FunctionSpec, wrt: Sequence[Variable], widest: str
) -> list[tuple[int, str, Array, tuple[int, ...], str]]:
    """Returns place, label, array, shape, dtype of each tangent, in wrt's order."""
    tangents = list(query.tangents)
    if not tangents:
        return []
    names = [variable.name for variable in wrt]
    if query.layout != "blocks":
        if len(tangents) > 1 or tangents[0][0]:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                "tangents by argument belong to the blocks layout. Pass "
                'layout="blocks", or one array of n numbers, in the order of the '
                "columns.",
                field="tangents",
                function=function.resource,
            )
        n = sum(int(np.prod(variable.shape)) for variable in wrt)
        return [(0, "the tangent", tangents[0][1], (n,), widest)]
    labels = [
        label or (names[place] if place < len(names) else str(place))
        for place, (label, _) in enumerate(tangents)
    ]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ServiceError(
            "ARGUMENT_MISMATCH",
            f"the tangent of {twice[0]} was given twice. Pass each once.",
            field="tangents",
            function=function.resource,
            argument=twice[0],
        )
    if set(labels) != set(names):
        raise ServiceError(
            "ARGUMENT_MISMATCH",
            f"tangents were given for {', '.join(labels)}, but {', '.join(names)} "
            "are differentiated. Pass one for each of these.",
            field="tangents",
            function=function.resource,
            given=", ".join(labels),
            wrt=", ".join(names),
        )
    places = [labels.index(variable.name) for variable in wrt]
    return [
        (place, f"the tangent of {v.name}", tangents[place][1], v.shape, v.dtype)
        for place, v in zip(places, wrt, strict=True)
    ]


def _cotangents(
    query: Query, function: FunctionSpec
) -> list[tuple[Path, str, Array, tuple[int | None, ...]]]:
    """Returns path, label, array and shape of each cotangent; None is not yet known."""
    if query.layout != "blocks":
        if len(query.cotangents) > 1 or any(path for path, _ in query.cotangents):
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                "cotangents by result belong to the blocks layout. Pass "
                'layout="blocks", or one array of m numbers, in the order of the '
                "rows.",
                field="cotangents",
                function=function.resource,
            )
        return [((), "the cotangent", array, (None,)) for _, array in query.cotangents]
    ranks = {path: len(shape) for path, shape in function.results}
    found: list[tuple[Path, str, Array, tuple[int | None, ...]]] = []
    for place, (path, array) in enumerate(query.cotangents):
        if path not in ranks or path in [other for other, *_ in found]:
            raise ServiceError(
                "ARGUMENT_MISMATCH",
                f"{function.resource} has no result at "
                f"{trees.format_path(path) or 'the top'}, or its cotangent was given "
                "twice. Structure the cotangents as the result is.",
                field=f"cotangents[{place}].path",
                function=function.resource,
            )
        label = f"the cotangent {trees.format_path(path)}".strip()
        found.append((path, label, array, (None,) * ranks[path]))
    return found


def _fitted(
    convert: Convert | None,
    array: Array,
    shape: tuple[int | None, ...],
    batch: int | None,
    field: str,
    label: str,
    dtype: str,
) -> tuple[InputSpec, Array, int]:
    """Returns a vector as a program takes it, and the rank of a single one."""
    further = array.ndim - len(shape)
    fits = 0 <= further <= (1 if batch is None else 2) and all(
        expected is None or size == expected
        for size, expected in zip(array.shape[further:], shape, strict=True)
    )
    is_batched = batch is not None and further > 0
    if not fits or (is_batched and array.shape[0] != batch):
        single = tuple("m" if size is None else size for size in shape)
        more = (
            [("k", *single)]
            if batch is None
            else [(batch, *single), (batch, "k", *single)]
        )
        raise ServiceError(
            "SHAPE_MISMATCH",
            f"{label} has shape {format_shape(array.shape)}, but takes "
            f"{format_shape(single)}. Pass that, or "
            f"{' or '.join(map(format_shape, more))} for several.",
            field=f"{field}.tensor.shape",
            shape=format_shape(array.shape),
            expected=format_shape(single),
        )
    array = _with_dtype(convert, array, field, label, dtype)
    point_shape = array.shape[1:] if is_batched else array.shape
    spec = InputSpec(point_shape, array.dtype.name, is_batched=is_batched)
    return spec, array, len(shape)


def _with_dtype(
    convert: Convert | None, array: Array, field: str, label: str, dtype: str
) -> Array:
    given = array.dtype.name
    # The dtype of a result shows when the function is traced.
    is_open = field.startswith("cotangents") and given in INEXACT and not convert
    if given == dtype or is_open:
        return array
    if convert is not None and cast_target(given, (dtype,)):
        return convert(array, dtype)
    raise ServiceError(
        "DTYPE_MISMATCH",
        f"{label} is {given}, but takes {dtype}. Convert it"
        + (", or set cast." if cast_target(given, (dtype,)) else "."),
        field=f"{field}.tensor.dtype",
        dtype=given,
        accepted=dtype,
    )
