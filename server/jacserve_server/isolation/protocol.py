"""What a server and its worker process say to each other.

All of it is JSON of plain data, read into the types below or refused. Patterns follow
their message as bytes. The arrays of executions are in regions of shared memory, at
places that both sides compute, so that nobody is told where to read or to write.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, TypeAdapter

from jacserve.sparse import Pattern
from jacserve.tensors import MAX_RANK, Array, dtype_named
from jacserve.trees import Path
from jacserve.vocabulary import DTYPES, Mode, Quantity
from jacserve_server.errors import Reason, ServiceError
from jacserve_server.work import (
    InputSpec,
    Outline,
    ProgramKey,
    SparsityKey,
    Strategy,
)

# As XLA aligns its own buffers, so that it reads arguments where they are.
_ALIGNMENT = 64


class ProtocolError(Exception):
    """The worker said what it must not; the text says what."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a registry is found again in another process.

    Attributes:
        modules: Those that have it: names, or paths of files, in the order in which
            they were imported.
        attribute: Its name in the first of them.
    """

    modules: tuple[str, ...]
    attribute: str


@dataclass(frozen=True, slots=True)
class Start:
    """Has a worker get ready: the first message.

    Attributes:
        origins: Where its functions are.
        search_path: Where Python looks for modules.
        device: The setting of this name; likewise the others.
        device_threads: None for the default of the device.
        compile_threads: Programs made at once.
        max_programs: Programs kept for each device.
        result_bytes: The most that one result may take.
        program_bytes: The most that one program may take; None for the default of
            the device.
        cache_dir: Folder for what outlives the process.
        max_cache_bytes: Compiled programs kept in it.
    """

    origins: tuple[Origin, ...]
    search_path: tuple[str, ...]
    device: str
    device_threads: int | None
    compile_threads: int
    max_programs: int
    result_bytes: int
    program_bytes: int | None
    cache_dir: str
    max_cache_bytes: int
    kind: Literal["start"] = "start"


@dataclass(frozen=True, slots=True)
class Prepare:
    """Asks for a program; answered by Prepared, or Unavailable.

    Attributes:
        id: Of this question; also the program's name from then on.
        key: Which program.
        place: On which device, counted from 0.
    """

    id: int
    key: ProgramKey
    place: int
    kind: Literal["prepare"] = "prepare"


@dataclass(frozen=True, slots=True)
class Run:
    """Asks to run a program; answered by Ran, or Unavailable.

    Attributes:
        id: Of this question.
        program: The program's name.
        batch: Rows of its arguments; None for one point.
        region: Where they are, and where its results go.
        size_bytes: The region's size.
        is_new: Whether the region's descriptor comes with this message.
        dropped: Regions that are not used any more.
    """

    id: int
    program: int
    batch: int | None
    region: int
    size_bytes: int
    is_new: bool
    dropped: tuple[int, ...] = ()
    kind: Literal["run"] = "run"


@dataclass(frozen=True, slots=True)
class FindSparsity:
    """Asks for a sparsity pattern; answered by Found."""

    id: int
    sought: SparsityKey
    kind: Literal["sparsity"] = "sparsity"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Asks what a program computes; answered by Fingerprinted."""

    id: int
    key: ProgramKey
    kind: Literal["fingerprint"] = "fingerprint"


Request: TypeAlias = Prepare | Run | FindSparsity | Fingerprint


@dataclass(frozen=True, slots=True)
class Ready:
    """Says that the worker has its functions and devices.

    Attributes:
        devices: The devices' names.
        device_kind: Their kind.
        threads: Programs that it runs at once on each.
        functions: Name and version of each function, and a digest of it.
    """

    devices: tuple[str, ...]
    device_kind: str
    threads: int
    functions: tuple[tuple[str, str], ...]
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True)
class Unfit:
    """Says that the worker can't get ready.

    Attributes:
        cause: What is at fault.
        text: Why.
    """

    cause: Literal["functions", "device", "other"]
    text: str
    kind: Literal["unfit"] = "unfit"


@dataclass(frozen=True, slots=True)
class PatternHead:
    """A pattern, whose rows and columns follow the message."""

    shape: tuple[int, int]
    nnz: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Says that a program can be run.

    Attributes:
        id: Of the question.
        arrays: Quantity and path of each array that it makes.
        results: Shape and dtype of each.
        modes: How each derivative is made.
        patterns: Where the values of sparse arrays stand.
        strategy: How J or H is made.
        device: Where it runs.
        is_lone: Whether it must not run beside its like.
    """

    id: int
    arrays: tuple[tuple[Quantity, Path], ...]
    results: tuple[InputSpec, ...]
    modes: tuple[tuple[Quantity, Mode], ...]
    patterns: tuple[tuple[Quantity, PatternHead], ...]
    strategy: Strategy
    device: str
    is_lone: bool
    kind: Literal["prepared"] = "prepared"


@dataclass(frozen=True, slots=True)
class Ran:
    """Says that results are in their region.

    Attributes:
        id: Of the question.
        execute_s: Seconds that it took.
    """

    id: int
    execute_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    kind: Literal["ran"] = "ran"


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Says that the worker does not have the program, or can't have it there."""

    id: int
    kind: Literal["unavailable"] = "unavailable"


@dataclass(frozen=True, slots=True)
class Found:
    """A sparsity pattern, and what a matrix that has it costs."""

    id: int
    pattern: PatternHead
    color_count: int
    mode: Mode
    kind: Literal["found"] = "found"


@dataclass(frozen=True, slots=True)
class Fingerprinted:
    """What identifies a program."""

    id: int
    text: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    kind: Literal["fingerprinted"] = "fingerprinted"


@dataclass(frozen=True, slots=True)
class Failed:
    """An error of the contract.

    Attributes:
        id: Of the question.
        reason: The error's.
        message: The error's.
        field: The error's.
        values: Its metadata.
    """

    id: int
    reason: Reason
    message: str
    field: str = ""
    values: tuple[tuple[str, str], ...] = ()
    kind: Literal["failed"] = "failed"

    @staticmethod
    def of(identifier: int, error: ServiceError) -> "Failed":
        """Makes the message of an error."""
        values = tuple(error.metadata.items())
        return Failed(identifier, error.reason, error.message, error.field, values)

    @property
    def error(self) -> ServiceError:
        """The error."""
        values: dict[str, Any] = {
            name: value for name, value in self.values if name not in _OWN_NAMES
        }
        return ServiceError(self.reason, self.message, field=self.field, **values)


# Parameters of ServiceError, which no value may stand for.
_OWN_NAMES = {"self", "reason", "message", "field", "retry_after_s"}

Reply: TypeAlias = Prepared | Ran | Unavailable | Found | Fingerprinted | Failed

ORDERS: TypeAdapter[Start | Request] = TypeAdapter(
    Annotated[Start | Request, Field(discriminator="kind")]
)
NEWS: TypeAdapter[Ready | Unfit | Reply] = TypeAdapter(
    Annotated[Ready | Unfit | Reply, Field(discriminator="kind")]
)


@dataclass(frozen=True, slots=True)
class Slots:
    """Where arrays are in a region.

    Attributes:
        arrays: Offset, shape and dtype of each.
        size_bytes: Where the last one ends.
    """

    arrays: tuple[tuple[int, tuple[int, ...], np.dtype[Any]], ...]
    size_bytes: int

    def views(self, memory: memoryview) -> list[Array]:
        """Returns the arrays, which are read and written in place."""
        return [
            np.ndarray(shape, dtype, buffer=memory, offset=offset)
            for offset, shape, dtype in self.arrays
        ]


FLAG = InputSpec((), "bool", is_batched=True)


def slots(specs: Sequence[InputSpec], batch: int | None) -> Slots:
    """Lays out the arguments of an execution, its results and its flags.

    Args:
        specs: What it takes and makes.
        batch: Its rows; None for one point.

    Returns:
        Where each is.
    """
    arrays: list[tuple[int, tuple[int, ...], np.dtype[Any]]] = []
    offset = 0
    for spec in specs:
        rows = () if batch is None or not spec.is_batched else (batch,)
        shape = (*rows, *spec.shape)
        dtype = dtype_named(spec.dtype)
        arrays.append((offset, shape, dtype))
        size_bytes = math.prod(shape) * dtype.itemsize
        offset += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
    return Slots(tuple(arrays), offset)


def row_bytes(results: Sequence[InputSpec]) -> int:
    """Returns the bytes of one point's results."""
    return sum(
        math.prod(spec.shape) * dtype_named(spec.dtype).itemsize for spec in results
    )


def pattern_bytes(pattern: Pattern) -> bytes:
    """Returns a pattern's rows and columns, as they follow its message."""
    return pattern.rows.tobytes() + pattern.columns.tobytes()


def outline_of(news: Prepared, key: ProgramKey, tail: bytes) -> Outline:
    """Checks what a worker says of a program, and returns what its outcomes share.

    Args:
        news: What it says.
        key: Which program it was asked for.
        tail: The patterns, in the order of the message.

    Returns:
        The outline.

    Raises:
        ProtocolError: It can't be true.
    """
    quantities = set(key.computation.quantities)
    said = [*news.arrays, *news.modes, *news.patterns]
    if len(news.arrays) != len(news.results):
        raise ProtocolError("a program has other arrays than results")
    if not all(quantity in quantities for quantity, _ in said):
        raise ProtocolError("a program makes what nobody asked for")
    for spec in news.results:
        _check_result(spec, is_batched=key.bucket is not None)
    if not news.device.isprintable():
        raise ProtocolError("a device has no name")
    patterns: dict[Quantity, Pattern] = {}
    for quantity, head in news.patterns:
        patterns[quantity], tail = pattern_of(head, tail)
    if tail:
        raise ProtocolError("more bytes came than belong to a message")
    return Outline(
        function=key.computation.function,
        arrays=news.arrays,
        modes=dict(news.modes),
        patterns=patterns,
        strategy=news.strategy,
        bucket=key.bucket,
        device=news.device,
    )


def pattern_of(head: PatternHead, tail: bytes) -> tuple[Pattern, bytes]:
    """Reads a pattern.

    Args:
        head: Its shape, and how many entries it has.
        tail: Bytes that begin with these.

    Returns:
        The pattern, and the bytes that are left.

    Raises:
        ProtocolError: It is none.
    """
    (m, n), nnz = head.shape, head.nnz
    size_bytes = 8 * nnz
    if not (0 <= m < 2**31 and 0 <= n < 2**31 and 0 <= size_bytes <= len(tail)):
        raise ProtocolError("a pattern has no such size")
    rows, columns = np.frombuffer(tail, np.int32, 2 * nnz).reshape(2, nnz)
    order = rows.astype(np.int64) * n + columns
    is_inside = nnz == 0 or (
        rows.min() >= 0 and rows.max() < m and columns.min() >= 0 and columns.max() < n
    )
    if not (is_inside and (np.diff(order) > 0).all()):
        raise ProtocolError("a pattern has entries where it has none")
    return Pattern.of((m, n), rows, columns), tail[size_bytes:]


def _check_result(spec: InputSpec, *, is_batched: bool) -> None:
    if (
        spec.dtype not in DTYPES
        or len(spec.shape) > MAX_RANK
        or not all(0 <= size < 2**31 for size in spec.shape)
        or spec.is_batched != is_batched
    ):
        raise ProtocolError(f"a result is {spec}")
