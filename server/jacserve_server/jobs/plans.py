"""What a job is to do, as plain data: a `JobPlan`, and the `Chunk`s that it has.

A chunk is independent of all others. It says everything that whoever computes it has
to know, on this machine or on another: what to compute, where its rows are, where the
results go.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jacserve_server.jobs.storage import Location
from jacserve_server.work import Computation


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where one array of a computation is.

    Attributes:
        location: The file or store.
        array: Which array of it; "" where there is one only.
        is_batched: Whether it has one row for each point; else all points share it.
        identity: Tells it from what may be there later; "" where that is not known.
    """

    location: Location
    array: str
    is_batched: bool
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """What is computed of every point.

    Attributes:
        job: The job's uid.
        turn: Names whose turn at the device it takes.
        computation: What to compute.
        sources: Where the computation's arrays are, in its order.
        point_count: How many points there are.
        output: The Zarr store of the results.
    """

    job: str
    turn: str
    computation: Computation
    sources: tuple[RowSource, ...]
    point_count: int
    output: Location


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a task: a chunk of the store.

    Attributes:
        task: What is computed of them.
        index: The chunk's place among all.
        start: The first row.
        stop: The row after the last one.
        batch_size: How many rows are computed at once.
    """

    task: Task
    index: int
    start: int
    stop: int
    batch_size: int

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    def batches(self) -> Iterator[tuple[int, int]]:
        """Yields the rows of each batch, counted from the first of the chunk."""
        for start in range(0, self.rows, self.batch_size):
            yield start, min(start + self.batch_size, self.rows)


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """What came of a chunk, whose results are in the store.

    Attributes:
        index: Which chunk.
        rows: How many rows it has.
        non_finite: How many of them gave NaN or Inf.
        first_non_finite: The first of these, counted from the job's first row.
        execute_s: Seconds that devices have spent on it.
    """

    index: int
    rows: int
    non_finite: int
    first_non_finite: int | None
    execute_s: float


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A task, divided.

    Attributes:
        task: What is computed of every point.
        batch_size: How many rows are computed at once.
        chunk_size: How many rows are kept at once; a multiple of it.
        fingerprint: Identifies the program.
    """

    task: Task
    batch_size: int
    chunk_size: int
    fingerprint: str

    @property
    def chunk_count(self) -> int:
        """How many chunks there are."""
        return -(-self.task.point_count // self.chunk_size)

    def chunk(self, index: int) -> Chunk:
        """Returns a chunk by its place."""
        start = index * self.chunk_size
        stop = min(start + self.chunk_size, self.task.point_count)
        return Chunk(self.task, index, start, stop, self.batch_size)
