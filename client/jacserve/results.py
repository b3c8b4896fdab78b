"""`Result` messages as values with arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration

from jacserve import sparse, tensors, trees
from jacserve.sparse import Pattern, SparseLayout, SparseMatrix, decode_pattern
from jacserve.tensors import Array
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


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """The answer to one call: the quantities asked for, and how they came about.

    A quantity that was not asked for raises AttributeError. With a batch of b
    points, every array has a leading axis b.

    Attributes:
        function: The function and version that ran, such as "spherical@1".
        quantities: Everything that was asked for, by name; sparse ones as
            SparseMatrix.
        modes: How each derivative that was asked for was made.
        chunk_size: How many products with J were made at once; None for all.
        measured: Whether mode and chunk size were measured to be the fastest.
        finite: Whether every number of the answer is finite.
        device: The device that ran it, such as "cpu:0".
        bucket: The rows computed: the batch padded to a bucket; None for one point.
        timing: Where the time went.
    """

    function: str
    quantities: Mapping[str, Any]
    modes: Mapping[str, Mode]
    chunk_size: int | None
    measured: bool
    finite: bool
    device: str
    bucket: int | None
    timing: Timing
    sparse_layout: SparseLayout | None = None

    @property
    def patterns(self) -> list[Pattern]:
        """The patterns of its sparse matrices."""
        matrices = self.quantities.values()
        return [m.pattern for m in matrices if isinstance(m, SparseMatrix)]

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


def decode_result(
    message: pb.Result, query: pb.Query, known: Mapping[str, Pattern]
) -> Result:
    """Decodes an answer.

    Args:
        message: The message.
        query: What it answers.
        known: The patterns that the query named, by hash.

    Returns:
        The answer, with writable arrays of its own.
    """
    layout = _sparse_layout(query)
    patterns = dict(known)
    patterns.update((p.hash, decode_pattern(p)) for p in message.patterns)
    leaves: dict[str, list[tuple[trees.Path, Any]]] = {}
    modes: dict[str, Mode] = {}
    for output in message.outputs:
        quantity = word(QUANTITIES, output.quantity)
        array: Any = tensors.decode(output.tensor).copy()
        if output.pattern:
            array = SparseMatrix(array, patterns[output.pattern])
        elif layout and quantity in {"jacobian", "hessian"}:
            # Sparse mode was not the way to it; the caller asked for one type.
            array = sparse.from_dense(array)
        leaves.setdefault(quantity, []).append((trees.decode_path(output.path), array))
        if output.mode:
            modes[quantity] = cast("Mode", word(MODES, output.mode))
    return Result(
        function=message.function.removeprefix("functions/"),
        quantities={name: trees.unflatten(found) for name, found in leaves.items()},
        modes=modes,
        chunk_size=message.chunk_size or None,
        measured=message.measured,
        finite=message.finite,
        device=message.device,
        bucket=message.bucket if message.HasField("bucket") else None,
        timing=Timing(
            queue_s=_seconds(message.timing.queue_duration),
            compile_s=_seconds(message.timing.compile_duration),
            execute_s=_seconds(message.timing.execute_duration),
        ),
        sparse_layout=layout,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos * 1e-9


def _sparse_layout(query: pb.Query) -> SparseLayout | None:
    if query.layout == pb.LAYOUT_COO:
        return "coo"
    is_default = query.layout == pb.LAYOUT_UNSPECIFIED and query.mode == pb.MODE_SPARSE
    return "csr" if query.layout == pb.LAYOUT_CSR or is_default else None
