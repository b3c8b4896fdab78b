"""What a call asks for, as a `Query` message: shared by both clients."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import numpy.typing as npt

from jacserve import tensors
from jacserve.errors import InvalidRequestError
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import LAYOUTS, MODES, QUANTITIES, Layout, Mode, Quantity

N = TypeVar("N", bound=int)

Inputs = npt.ArrayLike | tuple[npt.ArrayLike, ...] | Mapping[str, npt.ArrayLike]


class Options(TypedDict, total=False):
    """How a call is answered; every field may be left out.

    Attributes:
        wrt: Names of the arguments to differentiate with respect to, in the order
            of their columns. Left out or empty: all that are differentiable.
        mode: "forward" costs n Jacobian-vector products, "reverse" m
            vector-Jacobian products; "auto", the default, takes the cheaper.
        layout: "matrix", the default, is [m, n]; "blocks" is one array for each
            result and argument, of the result's shape and then the argument's.
        cast: Lets the server convert inputs whose dtype the function does not
            accept; otherwise they are refused.
        require_finite: Raises NonFiniteError when the result has NaN or Inf;
            otherwise `Result.finite` says so.
        timeout_s: Seconds for the whole call, queueing and compilation included.
            None waits as long as it takes.
    """

    wrt: str | Sequence[str]
    mode: Mode
    layout: Layout
    cast: bool
    require_finite: bool
    timeout_s: float | None


def encode_query(
    function: str,
    inputs: Inputs,
    quantities: Quantity | Sequence[Quantity],
    options: Options,
) -> pb.Query:
    """Builds the message.

    Args:
        function: The function's name, with a version or without.
        inputs: One array, a tuple of arrays in declared order, or a mapping of
            arrays by argument name.
        quantities: What to compute; one or several.
        options: How to answer.

    Returns:
        The message.

    Raises:
        InvalidRequestError: A word or an array can't be sent.
    """
    return pb.Query(
        function=function,
        inputs=_encode_inputs(inputs),
        quantities=[
            _number(QUANTITIES, "quantities", word) for word in _listed(quantities)
        ],
        wrt=_listed(options.get("wrt", ())),
        mode=_number(MODES, "mode", options.get("mode", "auto")),
        layout=_number(LAYOUTS, "layout", options.get("layout", "matrix")),
        cast=options.get("cast", False),
        require_finite=options.get("require_finite", False),
    )


def _encode_inputs(inputs: Inputs) -> list[pb.Input]:
    named: Sequence[tuple[str, Any]]
    if isinstance(inputs, Mapping):
        named = list(inputs.items())
    elif isinstance(inputs, tuple):
        named = [("", array) for array in inputs]
    else:
        named = [("", inputs)]
    return [
        pb.Input(name=name, tensor=_encode_tensor(name or f"input {place}", array))
        for place, (name, array) in enumerate(named)
    ]


def _encode_tensor(label: str, array: npt.ArrayLike) -> pb.Tensor:
    try:
        return tensors.encode(array)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{label}: {error}", code="INVALID_ARGUMENT", reason="DTYPE_MISMATCH"
        ) from error


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _number(words: Mapping[str, N], field: str, word: str) -> N:
    if word not in words:
        raise InvalidRequestError(
            f"{field} has {word!r}, which does not exist. Take one of "
            f"{', '.join(words)}.",
            code="INVALID_ARGUMENT",
            reason="MALFORMED_REQUEST",
            field=field,
        )
    return words[word]
