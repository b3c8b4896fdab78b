"""What a call asks for, as a `Query` message: shared by both clients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import numpy.typing as npt

from jacserve import tensors
from jacserve.errors import InvalidRequestError
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import (
    LAYOUTS,
    MODE_OPTIONS,
    QUANTITIES,
    Layout,
    ModeOption,
    Quantity,
)

N = TypeVar("N", bound=int)

# About thirty years; gRPC's clock overflows a little later.
_LONGEST_TIMEOUT_S = 1e9

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
            None means the client's own; math.inf waits as long as it takes.
    """

    wrt: str | Sequence[str]
    mode: ModeOption
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
        TypeError: There is no such option, or a value is of the wrong type.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"there is no option {', '.join(sorted(unknown))}; there are "
            f"{', '.join(Options.__annotations__)}"
        )
    query = pb.Query(
        function=_checked("function", function, str),
        quantities=[
            _number(QUANTITIES, "quantities", word)
            for word in _words("quantities", quantities)
        ],
        wrt=_words("wrt", options.get("wrt") or ()),
        mode=_number(MODE_OPTIONS, "mode", options.get("mode", "auto")),
        layout=_number(LAYOUTS, "layout", options.get("layout", "matrix")),
        cast=_checked("cast", options.get("cast", False), bool),
        require_finite=_checked(
            "require_finite", options.get("require_finite", False), bool
        ),
    )
    # In place: a message made beforehand would be copied, bytes and all.
    for place, (name, array) in enumerate(_named(inputs)):
        try:
            tensors.encode_into(query.inputs.add(name=name).tensor, array)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"{name or f'input {place}'}: {error}",
                code="INVALID_ARGUMENT",
                reason="DTYPE_MISMATCH",
                field=f"inputs[{place}].tensor.dtype",
            ) from error
    return query


def timeout_of(timeout_s: float | None, default_s: float | None) -> float | None:
    """Returns the timeout for gRPC: a call's own, else the client's; None for none."""
    timeout_s = default_s if timeout_s is None else timeout_s
    if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S:
        return None
    if math.isnan(timeout_s):
        raise ValueError("timeout_s is NaN; pass seconds, or math.inf for no limit")
    return timeout_s


def _named(inputs: Inputs) -> list[tuple[str, Any]]:
    if isinstance(inputs, Mapping):
        return [
            (_checked("a name of inputs", name, str), array)
            for name, array in inputs.items()
        ]
    if isinstance(inputs, tuple):
        return [("", array) for array in inputs]
    return [("", inputs)]


T = TypeVar("T")


def _checked(label: str, value: T, kind: type) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{label} is {value!r}; pass a {kind.__name__}")
    return value


def _words(label: str, words: str | Sequence[str]) -> list[str]:
    if isinstance(words, str):
        return [words]
    return [_checked(label, word, str) for word in words]


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
