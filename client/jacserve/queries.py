"""What a call asks for, as a `Query` message: shared by both clients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import numpy.typing as npt

from jacserve import tensors, trees
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
            vector-Jacobian products, "sparse" as many as the sparsity pattern has
            colours; "auto", the default, takes the cheaper.
        layout: "matrix", the default, is [m, n]; "blocks" is one array for each
            result and argument, of the result's shape and then the argument's;
            "csr" and "coo" are sparse, and "csr" is the default of mode "sparse".
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


class EvaluateOptions(Options, total=False):
    """The same, and the vectors that products are made with.

    Attributes:
        tangents: v of J v and H v: n numbers, or k rows of n for k tangents at
            once; in the blocks layout arrays shaped like the arguments
            differentiated, in a tuple or mapping where there are several. In a
            batch, one axis more gives each point its own.
        cotangents: u of u^T J: m numbers, or k rows of m; in the blocks layout
            arrays shaped and structured like the result. In a batch as above.
    """

    tangents: Inputs
    cotangents: Any


def encode_query(
    function: str,
    inputs: Inputs,
    quantities: Quantity | Sequence[Quantity],
    options: EvaluateOptions,
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
    unknown = options.keys() - EvaluateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"there is no option {', '.join(sorted(unknown))}; there are "
            f"{', '.join(EvaluateOptions.__annotations__)}"
        )
    query = pb.Query(
        function=_checked("function", function, str),
        quantities=[
            _number(QUANTITIES, "quantities", word)
            for word in _words("quantities", quantities)
        ],
        wrt=_words("wrt", options.get("wrt") or ()),
        mode=_number(MODE_OPTIONS, "mode", options.get("mode", "auto")),
        cast=_checked("cast", options.get("cast", False), bool),
        require_finite=_checked(
            "require_finite", options.get("require_finite", False), bool
        ),
    )
    if "layout" in options:
        query.layout = _number(LAYOUTS, "layout", options["layout"])
    # In place: a message made beforehand would be copied, bytes and all.
    for place, (name, array) in enumerate(_named("inputs", inputs)):
        tensor = query.inputs.add(name=name).tensor
        _encode(tensor, array, name or f"input {place}", f"inputs[{place}]")
    if "tangents" in options:
        for place, (name, array) in enumerate(_named("tangents", options["tangents"])):
            tensor = query.tangents.add(name=name).tensor
            _encode(tensor, array, f"tangent {name}".strip(), f"tangents[{place}]")
    if "cotangents" in options:
        _encode_cotangents(query, options["cotangents"])
    return query


def encode_sparsity_request(
    function: str,
    sizes: Mapping[str, int],
    wrt: str | Sequence[str],
    quantity: Quantity,
) -> pb.GetSparsityRequest:
    """Builds the message that asks for a pattern.

    Args:
        function: The function's name.
        sizes: Sizes of its symbolic dimensions.
        wrt: The arguments to differentiate.
        quantity: "jacobian" or "hessian".

    Returns:
        The message.

    Raises:
        InvalidRequestError: There is no such quantity.
        TypeError: A value is of the wrong type.
    """
    return pb.GetSparsityRequest(
        name=_checked("function", function, str),
        sizes={
            _checked("a name of sizes", name, str): _size(name, size)
            for name, size in sizes.items()
        },
        wrt=_words("wrt", wrt),
        quantity=_number(QUANTITIES, "quantity", quantity),
    )


def _size(name: str, size: int) -> int:
    if not 0 <= _checked(f"size {name}", size, int) < 2**31:
        raise InvalidRequestError(
            f"sizes has {name} = {size}. Pass whole numbers from 0 to 2^31 - 1.",
            code="INVALID_ARGUMENT",
            reason="ARGUMENT_MISMATCH",
            field="sizes",
        )
    return size


def _encode_cotangents(query: pb.Query, cotangents: Any) -> None:
    # A list is an array here, as everywhere: only tuples and mappings are trees.
    is_tree = isinstance(cotangents, tuple | Mapping)
    leaves = trees.flatten(cotangents) if is_tree else [((), cotangents)]
    for place, (path, array) in enumerate(leaves):
        cotangent = query.cotangents.add(path=trees.encode_path(path))
        label = f"cotangent {trees.format_path(path)}".strip()
        _encode(cotangent.tensor, array, label, f"cotangents[{place}]")


def _encode(tensor: pb.Tensor, array: Any, label: str, field: str) -> None:
    try:
        tensors.encode_into(tensor, array)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{label}: {error}",
            code="INVALID_ARGUMENT",
            reason="DTYPE_MISMATCH",
            field=f"{field}.tensor.dtype",
        ) from error


def timeout_of(timeout_s: float | None, default_s: float | None) -> float | None:
    """Returns the timeout for gRPC: a call's own, else the client's; None for none."""
    timeout_s = default_s if timeout_s is None else timeout_s
    if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S:
        return None
    if math.isnan(timeout_s):
        raise ValueError("timeout_s is NaN; pass seconds, or math.inf for no limit")
    return timeout_s


def _named(label: str, inputs: Inputs) -> list[tuple[str, Any]]:
    if isinstance(inputs, Mapping):
        return [
            (_checked(f"a name of {label}", name, str), array)
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
