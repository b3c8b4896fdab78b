"""Messages of the contract to the server's values, and back."""

from collections.abc import Iterable, Mapping
from typing import cast

from google.protobuf.duration_pb2 import Duration

from jacserve import tensors, trees
from jacserve.tensors import MalformedTensorError
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import (
    DTYPES,
    LAYOUTS,
    MODE_OPTIONS,
    QUANTITIES,
    Layout,
    ModeOption,
    Quantity,
    word,
)
from jacserve_server.errors import ServiceError
from jacserve_server.query import Query
from jacserve_server.signature import Dimension, FunctionSpec
from jacserve_server.work import Outcome

_MOST_ENTRIES = 1000


def decode_query(message: pb.Query) -> Query:
    """Decodes a query from anywhere.

    Args:
        message: The message.

    Returns:
        The query; its arrays are read-only.

    Raises:
        ServiceError: A field has no valid value, or a tensor is malformed.
    """
    for field in ("quantities", "wrt", "inputs"):
        count = len(getattr(message, field))
        if count > _MOST_ENTRIES:
            raise ServiceError(
                "MALFORMED_REQUEST",
                f"{field} has {count} entries, and at most {_MOST_ENTRIES} are "
                "allowed. Name each once.",
                field=field,
                entries=count,
            )
    if not message.quantities:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"no quantities were asked for. Name some of {', '.join(QUANTITIES)}.",
            field="quantities",
        )
    quantities = [_word(QUANTITIES, "quantities", q) for q in message.quantities]
    return Query(
        function=message.function,
        inputs=tuple(
            _decode_input(place, given) for place, given in enumerate(message.inputs)
        ),
        quantities=cast("tuple[Quantity, ...]", tuple(dict.fromkeys(quantities))),
        wrt=tuple(message.wrt),
        mode=cast(
            "ModeOption", _word(MODE_OPTIONS, "mode", message.mode or pb.MODE_AUTO)
        ),
        layout=cast(
            "Layout", _word(LAYOUTS, "layout", message.layout or pb.LAYOUT_MATRIX)
        ),
        cast=message.cast,
        require_finite=message.require_finite,
    )


def _decode_input(place: int, message: pb.Input) -> tuple[str, tensors.Array]:
    try:
        return message.name, tensors.decode(message.tensor)
    except MalformedTensorError as error:
        label = message.name or f"input {place}"
        raise ServiceError(
            "MALFORMED_TENSOR",
            f"{label}: {error}",
            field=f"inputs[{place}].tensor",
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


def encode_outcome(outcome: Outcome, quantities: tuple[Quantity, ...]) -> pb.Result:
    """Encodes what came of a query.

    Args:
        outcome: What the scheduler returned.
        quantities: What the client asked for, in its order.

    Returns:
        The message.
    """
    result = pb.Result(
        function=f"functions/{outcome.function}",
        finite=bool(outcome.finite.all()),
        device=outcome.device,
        bucket=outcome.bucket,
        timing=pb.Timing(
            queue_duration=_duration(outcome.queue_s),
            compile_duration=_duration(outcome.compile_s),
            execute_duration=_duration(outcome.execute_s),
        ),
    )
    if outcome.mode is not None:
        result.mode = MODE_OPTIONS[outcome.mode]
    # In place: a message made beforehand would be copied, bytes and all.
    for asked in quantities:
        for quantity, path, array in outcome.outputs:
            if quantity == asked:
                output = result.outputs.add(quantity=QUANTITIES[quantity])
                output.path.extend(trees.encode_path(path))
                tensors.encode_into(output.tensor, array)
    return result


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def encode_function(spec: FunctionSpec) -> pb.Function:
    """Encodes a function's description.

    Args:
        spec: All that is known of it.

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
        modes=[MODE_OPTIONS[mode] for mode in spec.modes],
        missing_modes=[
            pb.MissingMode(mode=MODE_OPTIONS[mode], reason=reason)
            for mode, reason in spec.missing_modes.items()
        ],
        preferred_mode=MODE_OPTIONS[spec.preferred_mode],
        max_batch=spec.max_batch or 0,
    )


def _encode_shape(shape: Iterable[Dimension | None]) -> list[pb.Dimension]:
    return [
        pb.Dimension(size=dimension)
        if isinstance(dimension, int)
        else pb.Dimension(symbol=dimension)  # None leaves the size unset.
        for dimension in shape
    ]
