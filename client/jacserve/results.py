"""`Result` messages as values with arrays."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration

from jacserve import framing, sparse, trees
from jacserve.framing import Recognizer
from jacserve.sparse import Pattern, SparseLayout, SparseMatrix, decode_pattern
from jacserve.tensors import Array, TensorSpec, spec_of
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import MODES, QUANTITIES, Mode, word


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the server's time for one call went, in seconds.

    Attributes:
        queue_s: Waiting for a free device thread.
        compile_s: Waiting for the program to be compiled; 0 when it was ready.
        execute_s: Running the program.
    """

    queue_s: float
    compile_s: float
    execute_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Leaf:
    """One array of an answer, but for its numbers."""

    quantity: str
    path: trees.Path
    spec: TensorSpec
    size_bytes: int
    pattern: str


@dataclass(frozen=True, slots=True, eq=False)
class _Outline:
    """An answer, but for its numbers and its timing."""

    function: str
    leaves: tuple[_Leaf, ...]
    modes: Mapping[str, Mode]
    chunk_size: int | None
    measured: bool
    finite: bool
    device: str
    bucket: int | None
    coalesced_count: int
    is_flat: bool  # Whether each quantity is one array.
    finite_points: TensorSpec | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """The answer to one call: the quantities asked for, and how they came about.

    A quantity that was not asked for raises AttributeError. With a batch of b
    points, every array has a leading axis b.

    Attributes:
        quantities: Everything that was asked for, by name; sparse ones as
            SparseMatrix.
        sparse_layout: The layout of its sparse matrices; None where there are none.
        shared_patterns: Those of their patterns that hold for every point.
    """

    quantities: Mapping[str, Any]
    sparse_layout: SparseLayout | None
    shared_patterns: Sequence[Pattern]
    _outline: _Outline
    _timing: pb.Timing
    _finite_points: Array | None

    @property
    def function(self) -> str:
        """The function and version that ran, such as "spherical@1"."""
        return self._outline.function

    @property
    def modes(self) -> Mapping[str, Mode]:
        """How each derivative that was asked for was made."""
        return self._outline.modes

    @property
    def chunk_size(self) -> int | None:
        """How many products with J were made at once; None for all."""
        return self._outline.chunk_size

    @property
    def measured(self) -> bool:
        """Whether mode and chunk size were measured to be the fastest."""
        return self._outline.measured

    @property
    def finite(self) -> bool:
        """Whether every number of the answer is finite."""
        return self._outline.finite

    @property
    def finite_points(self) -> Array | None:
        """For each point, whether all of its numbers are finite: bool [b].

        Only of a job; None otherwise.
        """
        return self._finite_points

    @property
    def device(self) -> str:
        """The device that ran it, such as "cpu:0"; or several, separated by ", "."""
        return self._outline.device

    @property
    def bucket(self) -> int | None:
        """The rows computed: the batch padded to a bucket; None for one point."""
        return self._outline.bucket

    @property
    def coalesced_count(self) -> int:
        """How many queries one run of the program answered, this one included."""
        return self._outline.coalesced_count

    @property
    def timing(self) -> Timing:
        """Where the server's time went."""
        timing = self._timing
        return Timing(
            queue_s=_seconds(timing.queue_duration),
            compile_s=_seconds(timing.compile_duration),
            execute_s=_seconds(timing.execute_duration),
        )

    @property
    def mode(self) -> Mode | None:
        """The mode that made J, if it was needed, else that of what was asked for.

        None when no derivative was asked for, or several without J in modes that
        differ: see `modes`.
        """
        of_others = {"jvp", "vjp", "hessian", "hvp"}
        of_jacobian: set[Mode] = {
            mode for name, mode in self.modes.items() if name not in of_others
        }
        found = of_jacobian or set(self.modes.values())
        return found.pop() if len(found) == 1 else None

    @property
    def value(self) -> Any:
        """f(x): an array, or a tuple or dictionary of arrays as f returns them."""
        return self._quantity("value")

    @property
    def jacobian(self) -> Any:
        """J [m, n]; in the blocks layout nested arrays of shape result + argument.

        In a sparse layout, a scipy.sparse csr_array or coo_array where scipy is
        installed, else a SparseMatrix; always one for a batch, as a stack, and for
        16-bit numbers.
        """
        return self._matrix("jacobian")

    @property
    def gradient(self) -> Any:
        """J of a scalar function, [n]; in the blocks layout shaped like x."""
        return self._quantity("gradient")

    @property
    def determinant(self) -> Array:
        """Det J, a scalar."""
        return self._quantity("determinant")

    @property
    def abs_determinant(self) -> Array:
        """|det J|, a real scalar."""
        return self._quantity("abs_determinant")

    @property
    def slogdet(self) -> tuple[Array, Array]:
        """The sign of det J and log |det J|, two scalars."""
        return self._quantity("slogdet")

    @property
    def jvp(self) -> Any:
        """J v [m], or [k, m]; in the blocks layout structured as the result."""
        return self._quantity("jvp")

    @property
    def vjp(self) -> Any:
        """u^T J [n], or [k, n]; in the blocks layout shaped like the arguments."""
        return self._quantity("vjp")

    @property
    def hessian(self) -> Any:
        """H of a scalar function, [n, n]; in the blocks layout of any function.

        A block has the shape of a result, then of two arguments. Sparse as J is.
        """
        return self._matrix("hessian")

    @property
    def hvp(self) -> Any:
        """H v [n], or [k, n]; in the blocks layout shaped like the arguments."""
        return self._quantity("hvp")

    @property
    def newton_step(self) -> Any:
        """The solution s of J s = -f(x), [n]; of least squares when m != n.

        NaN, and `finite` false, where a square J is singular. In the blocks layout
        shaped like the arguments.
        """
        return self._quantity("newton_step")

    @property
    def singular_values(self) -> Array:
        """The singular values of J, the largest first, real [min(m, n)]."""
        return self._quantity("singular_values")

    @property
    def condition_number(self) -> Array:
        """The largest singular value of J over the smallest.

        Inf, or beyond 1 / eps, where J has no full rank.
        """
        return self._quantity("condition_number")

    def _matrix(self, name: str) -> Any:
        found = self._quantity(name)
        layout = self.sparse_layout
        if layout is None or not found.fits_scipy or not sparse.has_scipy():
            return found
        return found.to_scipy(layout)

    def _quantity(self, name: str) -> Any:
        if name not in self.quantities:
            raise AttributeError(
                f"{name} was not asked for. Add it to quantities; they were "
                f"{', '.join(self.quantities)}."
            )
        return self.quantities[name]

    def __repr__(self) -> str:
        """Shows shapes instead of numbers."""
        shown = ", ".join(
            f"{name}{trees.format_path(path)}={array.dtype}{list(array.shape)}"
            for name, tree in self.quantities.items()
            for path, array in trees.flatten(tree)
        )
        return f"<Result {self.function} {shown} mode={self.mode} on {self.device}>"


_TIMING = pb.Result.TIMING_FIELD_NUMBER
_NO_PATTERNS: Mapping[str, Pattern] = MappingProxyType({})


class ResultDecoder:
    """Decodes answers, and remembers those that differ in numbers alone."""

    def __init__(self) -> None:
        """Remembers nothing yet."""
        self._recognizer = Recognizer[_Outline](capacity=256)

    def decode(
        self,
        raw: bytes,
        layout: SparseLayout | None = None,
        known: Mapping[str, Pattern] = _NO_PATTERNS,
    ) -> Result:
        """Decodes an answer.

        Args:
            raw: A serialized pb.Result.
            layout: The sparse layout that was asked for, if any.
            known: The patterns that the query named, by hash.

        Returns:
            The answer, with writable arrays of its own.
        """
        if layout is None and (found := self._recognizer.find(raw)):
            outline, (timing, *payloads) = found
            read = pb.Timing.FromString(bytes(timing))
            return _result(outline, iter(payloads), read, None, known)
        message, payloads = framing.opened(raw, pb.Result)
        if layout is None:
            self._learn(raw, message)
        return decode_opened(message, payloads, layout, known)

    def _learn(self, raw: bytes, message: pb.Result) -> None:
        every = framing.fields(raw, 0, len(raw))
        timings = [f for f in every if f.number == _TIMING and f.is_bytes]
        _, holes = framing.cut(raw, pb.Result)
        spans = [(f.start, f.stop) for f in timings]
        spans += [(hole.start, hole.start + hole.size) for hole in holes if hole.start]
        # Where the timing comes first, as jacserve's servers send it.
        if len(timings) == 1 and sorted(spans) == spans:
            self._recognizer.learn(raw, spans, _outline(message))


def decode_opened(
    message: pb.Result,
    payloads: Iterable[Any],
    layout: SparseLayout | None = None,
    known: Mapping[str, Pattern] = _NO_PATTERNS,
) -> Result:
    """Decodes an answer whose bytes are apart.

    Args:
        message: The hollow message.
        payloads: The bytes of its tensors; those that can be written to become the
            answer's arrays, others are copied.
        layout: The sparse layout that was asked for, if any.
        known: The patterns that the query named, by hash.

    Returns:
        The answer.
    """
    outline, read = _outline(message), message.timing
    return _result(outline, iter(payloads), read, layout, known, message)


def _outline(message: pb.Result) -> _Outline:
    leaves: list[_Leaf] = []
    modes: dict[str, Mode] = {}
    for output in message.outputs:
        quantity, size = word(QUANTITIES, output.quantity), output.tensor.streamed_bytes
        spec, path = spec_of(output.tensor, size), trees.decode_path(output.path)
        leaves.append(_Leaf(quantity, path, spec, size, output.pattern))
        if output.mode:
            modes[quantity] = cast("Mode", word(MODES, output.mode))
    return _Outline(
        function=message.function.removeprefix("functions/"),
        leaves=tuple(leaves),
        modes=MappingProxyType(modes),
        chunk_size=message.chunk_size or None,
        measured=message.measured,
        finite=message.finite,
        device=message.device,
        bucket=message.bucket if message.HasField("bucket") else None,
        coalesced_count=message.coalesced_count,
        is_flat=all(leaf.path == () for leaf in leaves),
        finite_points=_finite_points_spec(message),
    )


def _finite_points_spec(message: pb.Result) -> TensorSpec | None:
    if not message.HasField("finite_points"):
        return None
    tensor = message.finite_points
    spec = spec_of(tensor, tensor.streamed_bytes)
    if (spec.dtype.kind, len(spec.shape)) != ("b", 1):
        raise ValueError("the finite points of a result are not a row of bool")
    return spec


def _result(
    outline: _Outline,
    payloads: Iterator[Any],
    timing: pb.Timing,
    layout: SparseLayout | None,
    known: Mapping[str, Pattern],
    message: pb.Result | None = None,
) -> Result:
    arrays: list[Any] = []
    for leaf in outline.leaves:
        array = leaf.spec.array(next(payloads) if leaf.size_bytes else b"")
        arrays.append(array if array.flags.writeable else array.copy())
    patterns: Mapping[str, Pattern] = {}
    if layout and message is not None:
        found = [decode_pattern(pattern, payloads) for pattern in message.patterns]
        every = {**known, **{pattern.hash: pattern for pattern in found}}
        patterns = {
            leaf.pattern: every[leaf.pattern] for leaf in outline.leaves if leaf.pattern
        }
        arrays = list(map(partial(_sparse, patterns), outline.leaves, arrays))
    finite_points = None
    if (spec := outline.finite_points) is not None:
        # Their field comes last.
        flags = spec.array(next(payloads) if spec.shape[0] else b"")
        finite_points = flags if flags.flags.writeable else flags.copy()
    if outline.is_flat:
        names = [leaf.quantity for leaf in outline.leaves]
        quantities = dict(zip(names, arrays, strict=True))
    else:
        leaves: dict[str, list[tuple[trees.Path, Any]]] = {}
        for leaf, array in zip(outline.leaves, arrays, strict=True):
            leaves.setdefault(leaf.quantity, []).append((leaf.path, array))
        quantities = {name: trees.unflatten(found) for name, found in leaves.items()}
    shared = tuple(patterns.values())
    return Result(quantities, layout, shared, outline, timing, finite_points)


def _sparse(patterns: Mapping[str, Pattern], leaf: _Leaf, array: Array) -> Any:
    is_matrix = leaf.quantity in {"jacobian", "hessian"}
    if leaf.path and (leaf.pattern or is_matrix):
        raise ValueError("a sparse matrix is in parts")
    if leaf.pattern:
        pattern = patterns[leaf.pattern]
        if array.shape[-1:] != (pattern.nnz,):
            raise ValueError("a sparse matrix has not as many values as its pattern")
        return SparseMatrix(array, pattern)
    # Where sparse mode was not the way to it, the caller still asked for one type.
    return sparse.from_dense(array) if is_matrix else array


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos * 1e-9
