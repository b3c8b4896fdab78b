"""Messages of the contract to the server's values, and back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from jacserve import sparse, tensors, trees
from jacserve.dimensions import Dimension
from jacserve.framing import bytes_field, number_field
from jacserve.sparse import Pattern
from jacserve.tensors import MAX_RANK, Array, MalformedTensorError
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import (
    DTYPES,
    LAYOUTS,
    MODE_OPTIONS,
    MODES,
    QUANTITIES,
    Layout,
    ModeOption,
    Quantity,
    word,
)
from jacserve_server.errors import ServiceError
from jacserve_server.measurements import Measurement, describe_input
from jacserve_server.query import Query, SparsityQuery
from jacserve_server.signature import FunctionSpec
from jacserve_server.work import InputSpec, Outcome, Sparsity, SparsityKey

_MOST_ENTRIES = 1000

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True, eq=False)
class Hollow(Generic[M]):
    """A message, and apart from it the bytes of its tensors.

    Attributes:
        message: The hollow message.
        payloads: The bytes of those tensors that have any, each in one row, in the
            order of the message's fields.
    """

    message: M
    payloads: list[Array]


# Makes the array of a tensor, which may be found unfit for it.
ArrayMaker = Callable[[pb.Tensor], Array]


def arrays_of(payloads: Iterable[Any]) -> ArrayMaker:
    """Returns a maker of arrays from their bytes.

    Args:
        payloads: The bytes of a hollow message's tensors, of those that have any, in
            the order of its fields.

    Returns:
        A function from each tensor in turn to its array, a view of the bytes.
    """
    left = iter(payloads)

    def make(tensor: pb.Tensor) -> Array:
        spec = tensors.spec_of(tensor, tensor.streamed_bytes)
        return spec.array(next(left) if tensor.streamed_bytes else b"")

    return make


def placeholder(tensor: pb.Tensor) -> Array:
    """Returns an array of zeros that takes no memory, before the bytes are there."""
    spec = tensors.spec_of(tensor, tensor.streamed_bytes)
    return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)


def check_lengths(message: pb.Query, max_rank: int = MAX_RANK) -> None:
    """Refuses lists and shapes that are longer than any function's can be.

    Args:
        message: The message.
        max_rank: The most axes of an array.

    Raises:
        ServiceError: One of them is.
    """
    for field, entries in (
        ("quantities", message.quantities),
        ("wrt", message.wrt),
        ("inputs", message.inputs),
        ("tangents", message.tangents),
        ("cotangents", message.cotangents),
        ("patterns", message.patterns),
    ):
        _check_length(field, len(entries))
    for field, given in (
        ("inputs", message.inputs),
        ("tangents", message.tangents),
        ("cotangents", message.cotangents),
    ):
        for place, each in enumerate(given):
            rank = len(each.tensor.shape)
            if rank > max_rank:
                raise ServiceError(
                    "MALFORMED_TENSOR",
                    f"{field}[{place}] has {rank} axes, but this server takes arrays "
                    f"of at most {max_rank}. Reshape the array.",
                    field=f"{field}[{place}].tensor",
                    rank=rank,
                    max_rank=max_rank,
                )


def _check_length(field: str, count: int) -> None:
    if count > _MOST_ENTRIES:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"{field} has {count} entries, and at most {_MOST_ENTRIES} are allowed. "
            "Name each once.",
            field=field,
            entries=count,
        )


def decode_query(
    message: pb.Query, array: ArrayMaker, *, max_rank: int = MAX_RANK
) -> Query:
    """Decodes a query from anywhere.

    Args:
        message: The hollow message.
        array: Makes the arrays of its tensors, in the order of its fields.
        max_rank: The most axes of an array.

    Returns:
        The query.

    Raises:
        ServiceError: A field has no valid value, or a tensor is malformed.
    """
    check_lengths(message, max_rank)
    if not message.quantities:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"no quantities were asked for. Name some of {', '.join(QUANTITIES)}.",
            field="quantities",
        )
    is_sparse = message.mode == pb.MODE_SPARSE
    default = pb.LAYOUT_CSR if is_sparse else pb.LAYOUT_MATRIX
    quantities = [_word(QUANTITIES, "quantities", q) for q in message.quantities]
    return Query(
        function=message.function,
        inputs=tuple(
            (given.name, _decode_tensor(given, given.name, f"inputs[{place}]", array))
            for place, given in enumerate(message.inputs)
        ),
        quantities=cast("tuple[Quantity, ...]", tuple(dict.fromkeys(quantities))),
        wrt=tuple(message.wrt),
        mode=cast(
            "ModeOption", _word(MODE_OPTIONS, "mode", message.mode or pb.MODE_AUTO)
        ),
        layout=cast("Layout", _word(LAYOUTS, "layout", message.layout or default)),
        cast=message.cast,
        require_finite=message.require_finite,
        tangents=tuple(
            (given.name, _decode_tensor(given, given.name, f"tangents[{place}]", array))
            for place, given in enumerate(message.tangents)
        ),
        cotangents=tuple(
            (
                _decode_path(given, f"cotangents[{place}]"),
                _decode_tensor(given, "", f"cotangents[{place}]", array),
            )
            for place, given in enumerate(message.cotangents)
        ),
        patterns=tuple(message.patterns),
        exact=message.exact,
    )


def decode_sparsity_query(message: pb.GetSparsityRequest) -> SparsityQuery:
    """Decodes a question about sparsity from anywhere.

    Args:
        message: The message.

    Returns:
        The question.

    Raises:
        ServiceError: A field has no valid value.
    """
    kinds: Mapping[int, Literal["jacobian", "hessian"]] = {
        pb.QUANTITY_UNSPECIFIED: "jacobian",
        pb.QUANTITY_JACOBIAN: "jacobian",
        pb.QUANTITY_HESSIAN: "hessian",
    }
    if message.quantity not in kinds:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"quantity is {message.quantity}, but only jacobian and hessian have a "
            "sparsity pattern. Set one of these.",
            field="quantity",
            number=message.quantity,
        )
    _check_length("sizes", len(message.sizes))
    _check_length("wrt", len(message.wrt))
    return SparsityQuery(
        function=message.name,
        sizes=dict(message.sizes),
        wrt=tuple(message.wrt),
        kind=kinds[message.quantity],
    )


def encode_sparsity(
    sparsity: Sparsity, sought: SparsityKey, function: FunctionSpec
) -> Hollow[pb.Sparsity]:
    """Encodes a pattern and what it costs.

    Args:
        sparsity: What was found.
        sought: What was sought.
        function: Of which function.

    Returns:
        The message.
    """
    pattern, payloads = sparse.describe_pattern(sparsity.pattern, "coo")
    message = pb.Sparsity(
        pattern=pattern,
        color_count=sparsity.color_count,
        mode=MODES[sparsity.mode],
        inputs=describe_inputs(sought.inputs, function),
    )
    return Hollow(message, payloads)


def pattern_bytes(pattern: Pattern, layout: str) -> int:
    """Returns what a pattern takes on the wire, names and lengths aside."""
    m, _ = pattern.shape
    return 4 * (pattern.nnz + (m + 1 if layout == "csr" else pattern.nnz))


def result_bytes(outcome: Outcome, query: Query) -> int:
    """Returns what an answer takes on the wire, names and lengths aside."""
    return sum(array.nbytes for array in outcome.arrays) + sum(
        pattern_bytes(pattern, query.layout)
        for pattern in outcome.outline.patterns.values()
        if pattern.hash not in query.patterns
    )


def describe_inputs(inputs: Iterable[InputSpec], function: FunctionSpec) -> str:
    """Returns inputs in words, such as "A: float32[2, 3], x: float32[3]"."""
    pairs = zip(function.signature.arguments, inputs, strict=True)
    return ", ".join(f"{a.name}: {describe_input(spec)}" for a, spec in pairs)


def _decode_path(message: pb.Cotangent, field: str) -> trees.Path:
    if any(step.WhichOneof("step") is None for step in message.path):
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"{field} has a path with an empty step. Set a key or an index in each.",
            field=f"{field}.path",
        )
    return trees.decode_path(message.path)


def _decode_tensor(
    message: pb.Input | pb.Cotangent, name: str, field: str, array: ArrayMaker
) -> Array:
    try:
        return array(message.tensor)
    except MalformedTensorError as error:
        label = name or field
        raise ServiceError(
            "MALFORMED_TENSOR",
            f"{label}: {error}",
            field=f"{field}.tensor",
            argument=label,
        ) from error


def _word(words: Mapping[str, int], field: str, number: int) -> str:
    try:
        return word(words, number)
    except KeyError:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"{field} has {number}, which is unspecified or unknown to this server. "
            f"Set one of {', '.join(words)}.",
            field=field,
            number=number,
        ) from None


def encode_outcome(outcome: Outcome, query: Query) -> Hollow[pb.Result]:
    """Encodes what all outcomes of a program and a query's like have in common.

    Args:
        outcome: What the scheduler returned.
        query: What the client asked for, and the patterns that it has.

    Returns:
        The message, without what `encode_circumstances` encodes.
    """
    outline = outcome.outline
    result = pb.Result(
        function=f"functions/{outline.function}",
        device=outline.device,
        bucket=outline.bucket,
        chunk_size=outline.strategy.chunk_size or 0,
        measured=outline.strategy.is_measured,
    )
    payloads: list[Array] = []
    for asked in query.quantities:
        for (quantity, path), array in zip(outline.arrays, outcome.arrays, strict=True):
            if quantity == asked:
                output = result.outputs.add(quantity=QUANTITIES[quantity])
                output.path.extend(trees.encode_path(path))
                if quantity in outline.modes:
                    output.mode = MODES[outline.modes[quantity]]
                if quantity in outline.patterns:
                    output.pattern = outline.patterns[quantity].hash
                payloads.append(tensors.describe_into(output.tensor, array))
    for pattern in outline.patterns.values():
        if pattern.hash not in query.patterns:
            message, indices = sparse.describe_pattern(pattern, query.layout)
            result.patterns.append(message)
            payloads += indices
    return Hollow(result, [payload for payload in payloads if payload.size])


def encode_circumstances(outcome: Outcome) -> bytes:
    """Encodes what differs from one outcome to the next, but for the arrays.

    By hand, because it is the only message that every answer has to make anew.

    Args:
        outcome: What the scheduler returned.

    Returns:
        The other fields of the message that `encode_outcome` makes, serialized.
    """
    finite = outcome.finite
    is_finite = bool(finite) if finite.ndim == 0 else bool(finite.all())
    timing = _duration(_EXECUTE, outcome.execute_s)
    if outcome.queue_s:
        timing += _duration(_QUEUE, outcome.queue_s)
    if outcome.compile_s:
        timing += _duration(_COMPILE, outcome.compile_s)
    return (
        number_field(_FINITE, is_finite)
        + number_field(_COALESCED, outcome.coalesced_count)
        + bytes_field(pb.Result.TIMING_FIELD_NUMBER, len(timing))
        + timing
    )


_FINITE = pb.Result.FINITE_FIELD_NUMBER
_COALESCED = pb.Result.COALESCED_COUNT_FIELD_NUMBER
_QUEUE = pb.Timing.QUEUE_DURATION_FIELD_NUMBER
_COMPILE = pb.Timing.COMPILE_DURATION_FIELD_NUMBER
_EXECUTE = pb.Timing.EXECUTE_DURATION_FIELD_NUMBER
_SECONDS, _NANOS = Duration.SECONDS_FIELD_NUMBER, Duration.NANOS_FIELD_NUMBER


def _duration(field: int, duration_s: float) -> bytes:
    seconds, nanos = divmod(int(duration_s * 1e9), 10**9)
    value = number_field(_SECONDS, seconds) + number_field(_NANOS, nanos)
    return bytes_field(field, len(value)) + value


def encode_function(
    spec: FunctionSpec,
    measurements: Iterable[Measurement],
    *,
    is_isolated: bool = False,
    quarantine_reason: str = "",
) -> pb.Function:
    """Encodes a function's description.

    Args:
        spec: All that is known of it.
        measurements: What was measured of it.
        is_isolated: Whether it runs in a worker process.
        quarantine_reason: Why it is not run any more; empty where it is.

    Returns:
        The message.
    """
    return pb.Function(
        name=f"functions/{spec.qualified_name}",
        documentation=spec.documentation,
        arguments=[
            pb.Argument(
                name=argument.name,
                dtypes=[DTYPES[dtype] for dtype in argument.dtypes],
                shape=_encode_shape(argument.shape),
                differentiable=argument.is_differentiable,
            )
            for argument in spec.signature.arguments
        ],
        results=[
            pb.ResultArray(path=trees.encode_path(path), shape=_encode_shape(shape))
            for path, shape in spec.results
        ],
        modes=[MODES[mode] for mode in spec.modes],
        missing_modes=[
            pb.MissingMode(mode=MODES[mode], reason=reason)
            for mode, reason in spec.missing_modes.items()
        ],
        preferred_mode=MODE_OPTIONS[spec.preferred_mode],
        max_batch=spec.max_batch or 0,
        measured_strategies=[_encode_measurement(each, spec) for each in measurements],
        sizes=spec.sizes,
        quarantine_reason=quarantine_reason,
        isolation=pb.ISOLATION_PROCESS if is_isolated else pb.ISOLATION_NONE,
    )


def _encode_measurement(
    measurement: Measurement, spec: FunctionSpec
) -> pb.MeasuredStrategy:
    fastest = measurement.timings[0]
    pairs = zip(spec.signature.arguments, measurement.inputs, strict=True)
    return pb.MeasuredStrategy(
        inputs=", ".join(f"{argument.name}: {text}" for argument, text in pairs),
        wrt=measurement.wrt,
        bucket=measurement.bucket,
        mode=MODES[fastest.mode],
        chunk_size=fastest.chunk_size or 0,
        speedup=measurement.speedup,
    )


def _encode_shape(shape: Iterable[Dimension | None]) -> list[pb.Dimension]:
    return [
        pb.Dimension(size=dimension)
        if isinstance(dimension, int)
        else pb.Dimension(symbol=dimension)  # None leaves the size unset.
        for dimension in shape
    ]
