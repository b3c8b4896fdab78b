"""What a call asks for, as a `Query` message: shared by all clients."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
import numpy.typing as npt

from jacserve import tensors, trees
from jacserve.errors import InvalidRequestError
from jacserve.framing import PIECE_BYTES, Frame
from jacserve.mapped_files import map_npy, map_npz
from jacserve.sparse import SparseLayout
from jacserve.streaming import parts
from jacserve.tensors import Array
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import (
    LAYOUTS,
    MODE_OPTIONS,
    QUANTITIES,
    Layout,
    ModeOption,
    Quantity,
    word,
)

N = TypeVar("N", bound=int)

# About thirty years; gRPC's clock overflows a little later.
_LONGEST_TIMEOUT_S = 1e9

Inputs = npt.ArrayLike | tuple[npt.ArrayLike, ...] | Mapping[str, npt.ArrayLike]


@dataclass(frozen=True, slots=True)
class Source:
    """An array in the server's storage, which a job reads from there.

    Attributes:
        path: A storage root of the server, and a path in it, such as
            "data/points.npy": an .npy, .npz, .zarr or .parquet.
        array: Which array of it: its name in an .npz file or a Zarr group; the
            column of a Parquet file, or several scalar columns, separated by commas,
            which form the last axis. Empty where there is one array only, and for
            all columns.
    """

    path: str
    array: str = ""

    def __array__(self, *_: Any, **__: Any) -> Array:
        """Refuses: its numbers are on the server.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a Source is read by the server, for a job. Use submit_job")


JobArray = npt.ArrayLike | Source | Path
JobInputs = JobArray | tuple[JobArray, ...] | Mapping[str, JobArray]


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
        exact: Has the same query give the same numbers, to the bit, whatever else
            the server is asked; otherwise a point may be computed in one batch with
            others' points.
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
    exact: bool
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


def sparse_layout_of(query: pb.Query) -> SparseLayout | None:
    """Returns the layout of sparse matrices, if a query asks for them."""
    if query.layout == pb.LAYOUT_COO:
        return "coo"
    is_default = query.layout == pb.LAYOUT_UNSPECIFIED and query.mode == pb.MODE_SPARSE
    return "csr" if query.layout == pb.LAYOUT_CSR or is_default else None


class JobOptions(TypedDict, total=False):
    """How a job is computed: each as in `EvaluateOptions`.

    Attributes:
        wrt: Names of the arguments to differentiate with respect to.
        mode: "auto", "forward", "reverse" or "sparse".
        layout: "matrix", "blocks", "csr" or "coo".
        cast: Lets the server convert inputs whose dtype the function does not
            accept.
        tangents: v of J v and H v; may also be read by the server, or from a file.
        cotangents: u of u^T J; likewise.
    """

    wrt: str | Sequence[str]
    mode: ModeOption
    layout: Layout
    cast: bool
    tangents: JobInputs
    cotangents: Any


class Form:
    """All of a query but its numbers, as many queries share it.

    Attributes:
        query: The hollow message; never changed.
        frame: The message around the numbers.
        size_bytes: How many bytes the numbers take.
        quantities: The words of what it asks for.
        is_streamed: Whether its answer is known to be too large for one message.
    """

    __slots__ = ("frame", "is_streamed", "quantities", "query", "size_bytes")

    def __init__(self, query: pb.Query, size_bytes: int) -> None:
        """Makes the frame."""
        self.query = query
        self.frame = Frame(query)
        self.size_bytes = size_bytes
        self.quantities = frozenset(
            word(QUANTITIES, number) for number in query.quantities
        )
        self.is_streamed = size_bytes > PIECE_BYTES

    @property
    def sparse_layout(self) -> SparseLayout | None:
        """The layout of sparse matrices, if the query asks for them."""
        return sparse_layout_of(self.query)

    def naming(self, patterns: Iterable[str]) -> "Form":
        """Returns the form that names these sparsity patterns."""
        query = pb.Query()
        query.CopyFrom(self.query)
        query.patterns[:] = patterns
        named = Form(query, self.size_bytes)
        named.is_streamed = self.is_streamed
        return named


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A query, ready to be sent.

    Attributes:
        form: What it says.
        arrays: Its arrays; those that have any bytes.
    """

    form: Form
    arrays: list[Array]

    def to_bytes(self) -> bytes:
        """Returns the whole message."""
        return self.form.frame.filled(map(tensors.buffer_of, self.arrays))

    def to_parts(self) -> Iterator[bytes]:
        """Yields the message in parts, for EvaluateStream."""
        return parts(self.form.query, list(map(tensors.bytes_of, self.arrays)))


class QueryEncoder:
    """Makes asks, and remembers the forms of those that differ in numbers alone."""

    _CAPACITY = 256

    def __init__(self) -> None:
        """Remembers nothing yet."""
        self._forms: dict[Any, Form] = {}

    def encode(
        self,
        function: str,
        inputs: Inputs,
        quantities: Quantity | Sequence[Quantity],
        options: EvaluateOptions,
    ) -> Ask:
        """Makes what is to be sent.

        Args:
            function: The function's name, with a version or without.
            inputs: One array, a tuple of arrays in declared order, or a mapping of
                arrays by argument name.
            quantities: What to compute; one or several.
            options: How to answer.

        Returns:
            The ask; it has the very arrays where it was given arrays.

        Raises:
            InvalidRequestError: A word or an array can't be sent.
            TypeError: There is no such option, or a value is of the wrong type.
        """
        _check_options(options, _OPTIONS)
        given = _given(inputs, options)
        kind = (
            function,
            quantities if isinstance(quantities, str) else (*quantities,),
            *([_settled(options.get(name)) for name in _SETTINGS] if options else ()),
            *[(group, label, x.dtype, x.shape) for group, label, x in given],
        )
        try:
            form = self._forms.get(kind)
        except TypeError:  # Something in it is of a type that is refused below.
            form = None
        if form is None:
            form = _form(function, quantities, options, given)
            if len(self._forms) >= self._CAPACITY:
                self._forms = {}
            self._forms[kind] = form
        return Ask(form, [x for _, _, x in given if x.size])


def encode_job_query(
    function: str,
    inputs: JobInputs,
    quantities: Quantity | Sequence[Quantity],
    options: JobOptions,
    *,
    require_finite: bool,
) -> tuple[pb.Query, list[Array]]:
    """Makes the query of a job.

    Args:
        function: The function's name, with a version or without.
        inputs: As for `QueryEncoder.encode`; an array may also be a `Source`, or the
            path of an .npy file; and all of them that of an .npz file, by name. Files
            are mapped into memory.
        quantities: What to compute; one or several.
        options: How to compute it.
        require_finite: Whether NaN or Inf fails the job.

    Returns:
        The hollow message, and those of its arrays that have any bytes.

    Raises:
        InvalidRequestError: A word or an array can't be sent.
        OSError: A file can't be read.
        TypeError: There is no such option, or a value is of the wrong type.
    """
    _check_options(options, JobOptions.__annotations__.keys())
    if "tangents" in options:
        options = {**options, "tangents": _unpacked("tangents", options["tangents"])}
    given = _given(_unpacked("inputs", inputs), options, _read)
    form_options = cast(
        "EvaluateOptions", {**options, "require_finite": require_finite}
    )
    query = _query(function, quantities, form_options, given)
    arrays = [x for _, _, x in given if not isinstance(x, Source)]
    return query, [x for x in arrays if x.size]


def _read(value: Any) -> Array | Source:
    if isinstance(value, Source):
        return value
    if not isinstance(value, os.PathLike):
        return np.asarray(value)
    path = Path(cast("os.PathLike[str]", value))
    if path.suffix != ".npy":
        raise ValueError(
            f"{path} is no .npy file. Load it, and pass its arrays; pass an .npz file "
            "in place of all arrays; or have the server read it, as a Source"
        )
    return map_npy(path)


def _unpacked(group: str, inputs: JobInputs) -> JobInputs:
    """Returns the arrays of an .npz file by name; everything else as it is."""
    if not isinstance(inputs, os.PathLike):
        return inputs
    path = Path(cast("os.PathLike[str]", inputs))
    if path.suffix != ".npz":
        return path
    try:
        return map_npz(path)
    except ValueError as error:
        raise _not_an_array(group, 0, "", error) from error


def _check_options(options: Mapping[str, Any], known: Set[str]) -> None:
    if not options.keys() <= known:
        unknown = options.keys() - known
        raise TypeError(
            f"there is no option {', '.join(sorted(unknown))}; there are "
            f"{', '.join(known)}"
        )


_OPTIONS = EvaluateOptions.__annotations__.keys()
_SETTINGS = ("wrt", "mode", "layout", "cast", "require_finite", "exact")

# Which part of the query an array belongs to, how the part calls it, and the array.
_Given = tuple[str, Any, Any]


def _settled(value: Any) -> Any:
    """Returns an option in a form that can be compared, and is of its own type."""
    if isinstance(value, list):
        return (*value,)
    return (type(value), value) if isinstance(value, int | float) else value


def _is_array(inputs: object) -> bool:
    return isinstance(inputs, np.ndarray)


def _given(
    inputs: Inputs | JobInputs,
    options: EvaluateOptions | JobOptions,
    read: Callable[[Any], Any] = np.asarray,
) -> list[_Given]:
    if not options and _is_array(inputs):  # The usual case, at once.
        return [("inputs", "", np.asarray(cast("Any", inputs)))]
    found = _arrays("inputs", _named("inputs", inputs), read)
    if "tangents" in options:
        found += _arrays("tangents", _named("tangents", options["tangents"]), read)
    if "cotangents" in options:
        tree = options["cotangents"]
        # A list is an array here, as everywhere: only tuples and mappings are trees.
        is_tree = isinstance(tree, tuple | Mapping)
        leaves = trees.flatten(tree) if is_tree else [((), tree)]
        found += _arrays("cotangents", leaves, read)
    return found


def _arrays(
    group: str, labelled: Iterable[tuple[Any, Any]], read: Callable[[Any], Any]
) -> list[_Given]:
    found: list[_Given] = []
    for label, value in labelled:
        try:
            found.append((group, label, read(value)))
        except (TypeError, ValueError) as error:
            raise _not_an_array(group, len(found), label, error) from error
    return found


def _not_an_array(
    group: str, place: int, label: Any, error: Exception
) -> InvalidRequestError:
    if group == "cotangents":
        words = f"cotangent {trees.format_path(label)}"
    elif group == "tangents":
        words = f"tangent {label}"
    else:
        words = label or f"input {place}"
    return InvalidRequestError(
        f"{words.strip()}: {error}",
        code="INVALID_ARGUMENT",
        reason="DTYPE_MISMATCH",
        field=f"{group}[{place}].tensor.dtype",
    )


def _form(
    function: str,
    quantities: Quantity | Sequence[Quantity],
    options: EvaluateOptions,
    given: Sequence[_Given],
) -> Form:
    query = _query(function, quantities, options, given)
    return Form(query, sum(x.nbytes for _, _, x in given))


def _query(
    function: str,
    quantities: Quantity | Sequence[Quantity],
    options: EvaluateOptions,
    given: Iterable[_Given],
) -> pb.Query:
    query = pb.Query(
        function=_checked("function", function, str),
        quantities=[
            number_of(QUANTITIES, "quantities", word)
            for word in _words("quantities", quantities)
        ],
        wrt=_words("wrt", options.get("wrt") or ()),
        mode=number_of(MODE_OPTIONS, "mode", options.get("mode", "auto")),
        cast=_checked("cast", options.get("cast", False), bool),
        require_finite=_checked(
            "require_finite", options.get("require_finite", False), bool
        ),
        exact=_checked("exact", options.get("exact", False), bool),
    )
    if "layout" in options:
        query.layout = number_of(LAYOUTS, "layout", options["layout"])
    places: Counter[str] = Counter()
    for group, label, x in given:
        place = places[group]
        places[group] += 1
        if group == "cotangents":
            entry = query.cotangents.add(path=trees.encode_path(label))
        elif group == "tangents":
            entry = query.tangents.add(name=label)
        else:
            entry = query.inputs.add(name=label)
        if isinstance(x, Source):
            entry.source.path = _checked("the path of a source", x.path, str)
            entry.source.array = _checked("the array of a source", x.array, str)
            continue
        try:
            tensors.describe_into(entry.tensor, x)
        except (TypeError, ValueError) as error:
            raise _not_an_array(group, place, label, error) from error
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
        quantity=number_of(QUANTITIES, "quantity", quantity),
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


def timeout_of(timeout_s: float | None, default_s: float | None) -> float | None:
    """Returns the timeout for gRPC: a call's own, else the client's; None for none."""
    timeout_s = default_s if timeout_s is None else timeout_s
    if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S:
        return None
    if math.isnan(timeout_s):
        raise ValueError("timeout_s is NaN; pass seconds, or math.inf for no limit")
    return timeout_s


def _named(label: str, inputs: Inputs | JobInputs) -> list[tuple[str, Any]]:
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


def number_of(words: Mapping[str, N], field: str, word: str) -> N:
    """Returns the number of the wire for a word of a caller.

    Args:
        words: One of the vocabulary's tables.
        field: The field that it is for.
        word: The word.

    Returns:
        The number.

    Raises:
        InvalidRequestError: There is no such word.
    """
    if word not in words:
        raise InvalidRequestError(
            f"{field} has {word!r}, which does not exist. Take one of "
            f"{', '.join(words)}.",
            code="INVALID_ARGUMENT",
            reason="MALFORMED_REQUEST",
            field=field,
        )
    return words[word]
