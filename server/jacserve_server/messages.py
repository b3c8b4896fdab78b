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
    MODES,
    QUANTITIES,
    Layout,
    Mode,
    Quantity,
    word,
)
from jacserve_server.errors import ServiceError
from jacserve_server.query import Outcome, Query
from jacserve_server.signature import Dimension, FunctionSpec


def decode_query(message: pb.Query) -> Query:
    """Decodes a query from anywhere.

    Args:
        message: The message.

    Returns:
        The query; its arrays are views of the message's bytes.

    Raises:
        ServiceError: A field has no valid value, or a tensor is malformed.
    """
    if not message.quantities:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"no quantities were asked for. Name some of {', '.join(QUANTITIES)}.",
            field="quantities",
        )
    quantities = [_word(QUANTITIES, "quantities", q) for q in message.quantities]
    return Query(
        function=message.function,
        inputs=tuple(map(_decode_input, message.inputs)),
        quantities=cast("tuple[Quantity, ...]", tuple(dict.fromkeys(quantities))),
        wrt=tuple(message.wrt),
        mode=cast("Mode", _word(MODES, "mode", message.mode or pb.MODE_AUTO)),
        layout=cast(
            "Layout", _word(LAYOUTS, "layout", message.layout or pb.LAYOUT_MATRIX)
        ),
        cast=message.cast,
        require_finite=message.require_finite,
    )


def _decode_input(message: pb.Input) -> tuple[str, tensors.Array]:
    try:
        return message.name, tensors.decode(message.tensor)
    except MalformedTensorError as error:
        label = message.name or "an input"
        raise ServiceError(
            "MALFORMED_TENSOR",
            f"{label}: {error}",
            field=f"inputs[{message.name}].tensor",
            argument=message.name,
            shape=tensors.format_shape(tuple(message.tensor.shape)),
            data_bytes=len(message.tensor.data),
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


def encode_outcome(outcome: Outcome) -> pb.Result:
    """Encodes what came of a query.

    Args:
        outcome: What the executor returned.

    Returns:
        The message.
    """
    return pb.Result(
        function=f"functions/{outcome.key.function}",
        outputs=[
            pb.Output(
                quantity=QUANTITIES[quantity],
                path=trees.encode_path(path),
                tensor=tensors.encode(array),
            )
            for quantity, path, array in outcome.outputs
        ],
        mode=MODES[outcome.key.mode] if outcome.key.mode else None,
        is_finite=bool(outcome.finite.all()),
        device=outcome.device,
        bucket=outcome.key.bucket or 0,
        timing=pb.Timing(
            queue=_duration(outcome.queue_s),
            compile=_duration(outcome.compile_s),
            execute=_duration(outcome.execute_s),
        ),
    )


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
                is_differentiable=argument.is_differentiable,
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
        preferred_mode=MODES[spec.preferred_mode],
        largest_batch=spec.largest_batch or 0,
    )


def _encode_shape(shape: Iterable[Dimension | None]) -> list[pb.Dimension]:
    return [
        pb.Dimension(size=dimension)
        if isinstance(dimension, int)
        else pb.Dimension(symbol=dimension)
        for dimension in shape
    ]
