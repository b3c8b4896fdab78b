"""The frozen values between the service and the device.

A query that fits its function is `Work`: a `Computation` on arrays. The program that
does it is named by a `ProgramKey`; what comes back is an `Outcome`. All of it is
plain data: names, shapes and numpy arrays, no closures, so that the executor may
live in another process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jacserve.sparse import Pattern
from jacserve.tensors import Array
from jacserve.trees import Path
from jacserve.vocabulary import (
    Curvature,
    Direction,
    Layout,
    Mode,
    ModeOption,
    Quantity,
)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One array as a program takes or makes it, such as an argument or a result.

    Attributes:
        shape: Its shape at one point.
        dtype: The dtype's name.
        is_batched: Whether it has one value for each row of the batch.
    """

    shape: tuple[int, ...]
    dtype: str
    is_batched: bool


@dataclass(frozen=True, slots=True)
class Computation:
    """What to compute of a function, whatever the points and however many.

    Attributes:
        function: Name and version, "spherical@1".
        quantities: What to compute, in the order of the contract.
        wrt: The arguments differentiated, in order; empty without a derivative.
        mode: How the caller wants it differentiated; None without a derivative.
        layout: How derivatives are laid out; "matrix" where it makes no difference,
            and "csr" for any sparse matrix.
        inputs: The arguments, in declared order.
        tangents: One of n numbers, or in the blocks layout one like each argument
            in `wrt`; each with a leading axis for several at once.
        cotangents: One of m numbers with an empty path, or one like each result,
            by path; likewise.
    """

    function: str
    quantities: tuple[Quantity, ...]
    wrt: tuple[str, ...]
    mode: ModeOption | None
    layout: Layout
    inputs: tuple[InputSpec, ...]
    tangents: tuple[InputSpec, ...] = ()
    cotangents: tuple[tuple[Path, InputSpec], ...] = ()
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Hashes once what every call finds its program by."""
        parts = (self.function, self.quantities, self.wrt, self.mode, self.layout)
        vectors = (self.inputs, self.tangents, self.cotangents)
        object.__setattr__(self, "_hash", hash((parts, vectors)))

    def __hash__(self) -> int:
        """Returns the hash of all that it compares by."""
        return self._hash

    @property
    def arrays(self) -> tuple[InputSpec, ...]:
        """Everything that its program takes: arguments, tangents, cotangents."""
        return (*self.inputs, *self.tangents, *(spec for _, spec in self.cotangents))


@dataclass(frozen=True, slots=True)
class Strategy:
    """How each derivative is made; None for those that are not needed.

    Attributes:
        jacobian: The mode of J, and of all that is computed of it.
        jvp: The mode of J v; reverse makes J first.
        vjp: The mode of u^T J; forward makes J first.
        hessian: The mode of H.
        hvp: The mode of H v; all but forward over reverse make H first.
        chunk_size: How many products make J or H at once; None for all.
        is_measured: Whether mode and chunk size were measured to be the fastest.
    """

    jacobian: Direction | Literal["sparse"] | None = None
    jvp: Direction | None = None
    vjp: Direction | None = None
    hessian: Curvature | Literal["sparse"] | None = None
    hvp: Curvature | None = None
    chunk_size: int | None = None
    is_measured: bool = False

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that it has, each once."""
        each = (self.jacobian, self.jvp, self.vjp, self.hessian, self.hvp)
        return tuple(mode for mode in dict.fromkeys(each) if mode is not None)

    @property
    def has_reverse(self) -> bool:
        """Whether anything is differentiated in reverse."""
        return any("reverse" in mode for mode in self.modes)


@dataclass(frozen=True, slots=True)
class SparsityKey:
    """What a sparsity pattern depends on.

    Attributes:
        function: Name and version.
        inputs: The inputs at one point.
        wrt: The arguments to differentiate.
        kind: Whether it is the pattern of J or of H.
    """

    function: str
    inputs: tuple[InputSpec, ...]
    wrt: tuple[str, ...]
    kind: Literal["jacobian", "hessian"]


@dataclass(frozen=True, slots=True, eq=False)
class Sparsity:
    """A sparsity pattern, and what a matrix that has it costs.

    Attributes:
        pattern: Where the entries are.
        color_count: How many products give the matrix.
        mode: Which products.
    """

    pattern: Pattern
    color_count: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """Everything that the choice of a program depends on, but the device.

    Attributes:
        computation: What it computes.
        bucket: The rows of its batch; None for one point without a batch axis.
    """

    computation: Computation
    bucket: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A query that fits its function.

    Attributes:
        computation: What to compute.
        arrays: Those of `computation.arrays`; batched ones have `batch` rows.
        batch: The rows; None for one point.
        is_exact: Whether it must not be computed together with other work.
    """

    computation: Computation
    arrays: tuple[Array, ...]
    batch: int | None
    is_exact: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What all outcomes of one program have in common: all but the numbers.

    Attributes:
        function: Name and version of the function.
        arrays: Quantity and path of each array.
        modes: How each derivative is made.
        patterns: Where the values of the sparse arrays stand.
        strategy: How J or H is made.
        bucket: The rows that the program computes; None for one point.
        device: The device that runs it.
    """

    function: str
    arrays: tuple[tuple[Quantity, Path], ...]
    modes: Mapping[Quantity, Mode]
    patterns: Mapping[Quantity, Pattern]
    strategy: Strategy
    bucket: int | None
    device: str


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of a piece of work.

    Attributes:
        outline: What its arrays are.
        arrays: The arrays of the outline, read-only.
        finite: For each row, whether all of its numbers are finite; a scalar for
            one point.
        execute_s: Seconds of running it.
        queue_s: Seconds of waiting for the device.
        compile_s: Seconds of waiting for the program to be compiled.
        coalesced_count: How many pieces of work the same run did.
    """

    outline: Outline
    arrays: tuple[Array, ...]
    finite: Array
    execute_s: float
    queue_s: float = 0.0
    compile_s: float = 0.0
    coalesced_count: int = 1
