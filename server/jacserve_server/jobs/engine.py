"""Computes chunks: the seam between jobs and the machines that run them.

An engine is given plain data and keeps nothing of a job that it could not make again.
So another one, on a cluster, can stand in this one's place.
"""

import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor as Pool
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from jacserve import tensors
from jacserve.tensors import Array, dtype_named
from jacserve_server.batches import bucket_for
from jacserve_server.errors import ServiceError
from jacserve_server.jobs import results
from jacserve_server.jobs.plans import Chunk, ChunkReport, RowSource, Task
from jacserve_server.jobs.results import Results
from jacserve_server.jobs.sizing import Sizes, choose_sizes
from jacserve_server.jobs.sources import Source, open_source
from jacserve_server.jobs.storage import unchanged
from jacserve_server.jobs.threads import in_thread
from jacserve_server.scheduler import Scheduler
from jacserve_server.work import InputSpec, Outcome, ProgramKey, Work

T = TypeVar("T")

_OPEN_SOURCES = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an engine found out about a task.

    Attributes:
        sizes: In what batches and chunks it is computed.
        fingerprint: Identifies the program.
    """

    sizes: Sizes
    fingerprint: str


class Engine(Protocol):
    """Computes chunks."""

    @property
    def width(self) -> int:
        """How many chunks are to be given to it at once, so that it is busy."""
        ...

    async def prepare(
        self, task: Task, sizes: Sizes | None, batch_size: int
    ) -> Prepared:
        """Gets ready for a task, and makes its store.

        Args:
            task: The task.
            sizes: Its sizes, where they are settled, and so its store is made.
            batch_size: How many rows are to be computed at once; 0 to have that
                measured.

        Returns:
            What is to be kept with the job.

        Raises:
            ServiceError: The task can't be computed, or not now.
        """
        ...

    async def run(self, chunk: Chunk) -> ChunkReport:
        """Computes a chunk, and writes it to the store.

        Args:
            chunk: The chunk.

        Returns:
            What came of it.

        Raises:
            ServiceError: It can't be computed, or not now.
        """
        ...

    async def sync(self, task: Task, indexes: Sequence[int]) -> None:
        """Waits until chunks that were written would outlive a loss of power.

        Args:
            task: Whose chunks.
            indexes: Their places.

        Raises:
            ServiceError: It can't be.
        """
        ...

    async def close(self, task: Task) -> None:
        """Lets go of a task's files."""
        ...


class LocalEngine:
    """Computes chunks on this machine, when no query needs it.

    Attributes:
        width: How many chunks keep it busy.
    """

    def __init__(
        self,
        scheduler: Scheduler[Any],
        fingerprint: Callable[[ProgramKey, str], Awaitable[str]],
        pool: Pool,
        *,
        slots: int,
        max_batch: Callable[[str], int | None],
    ) -> None:
        """Keeps its collaborators.

        Args:
            scheduler: Runs batches in the background.
            fingerprint: Identifies a program, for who has made a job.
            pool: Threads that read and write.
            slots: How many batches the devices run at once.
            max_batch: Returns the most rows that a function takes at once, by its
                qualified name.
        """
        # One is read or written while the others are computed.
        self.width = slots + 1
        self._scheduler = scheduler
        self._fingerprint = fingerprint
        self._pool = pool
        self._max_batch = max_batch
        self._sources = _OpenSources()
        self._results: dict[str, Results] = {}

    async def prepare(
        self, task: Task, sizes: Sizes | None, batch_size: int
    ) -> Prepared:
        """Gets ready for a task; see `Engine`."""
        if sizes is None:

            async def run(rows: int) -> Outcome:
                stop = min(rows, task.point_count)
                arrays = await self._in_thread(self._read, task, 0, stop)
                # Else it could not be seen that fewer at once are better.
                is_whole = not batch_size
                return await self._compute(task, arrays, rows, is_whole=is_whole)

            most = self._max_batch(task.computation.function)
            sizes, sample = await choose_sizes(
                run, task.point_count, batch_size=batch_size, max_batch=most
            )
            about = {
                "batch_size": sizes.batch_size,
                "device": sample.outline.device,
                "products_at_once": sample.outline.strategy.chunk_size,
                "versions": results.versions(),
            }
            await self._in_thread(
                results.create,
                task,
                results.leaves_of(sample),
                sizes.chunk_size,
                about,
            )
        else:
            await self._in_thread(results.remove_partial, task.output)
        opened = await self._in_thread(_opened, task)
        self._results[task.job] = opened
        key = ProgramKey(task.computation, bucket_for(sizes.batch_size))
        return Prepared(sizes, await self._fingerprint(key, task.job))

    async def run(self, chunk: Chunk) -> ChunkReport:
        """Computes a chunk, and writes it to the store; see `Engine`."""
        task = chunk.task
        arrays = await self._in_thread(self._read, task, chunk.start, chunk.stop)
        outcomes: list[Outcome] = []
        specs = task.computation.arrays
        for start, stop in chunk.batches():
            of_batch = [
                array[start:stop] if spec.is_batched else array
                for spec, array in zip(specs, arrays, strict=True)
            ]
            outcomes.append(await self._compute(task, of_batch, chunk.batch_size))
        return await self._in_thread(self._write, chunk, outcomes)

    async def sync(self, task: Task, indexes: Sequence[int]) -> None:
        """Waits until what was written is on the disk; see `Engine`."""
        await self._in_thread(self._results[task.job].sync, indexes)

    async def close(self, task: Task) -> None:
        """Lets go of a task's files; see `Engine`."""
        self._results.pop(task.job, None)
        await self._in_thread(self._sources.close, task.sources)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await in_thread(self._pool, call, *arguments)

    def _read(self, task: Task, start: int, stop: int) -> list[Array]:
        return [
            _fitted(self._sources.read(source, start, stop), source, spec)
            for source, spec in zip(task.sources, task.computation.arrays, strict=True)
        ]

    async def _compute(
        self,
        task: Task,
        arrays: Sequence[Array],
        batch_size: int,
        *,
        is_whole: bool = False,
    ) -> Outcome:
        """Computes a batch, filled up so that one program serves all of a job."""
        computation = task.computation
        pairs = list(zip(computation.arrays, arrays, strict=True))
        rows = next(len(array) for spec, array in pairs if spec.is_batched)
        whole = tuple(
            _filled(array, batch_size) if spec.is_batched else array
            for spec, array in pairs
        )
        work = Work(computation, whole, batch_size)
        outcome = await self._scheduler.submit_background(
            work, task.turn, is_whole=is_whole
        )
        if rows == batch_size:
            return outcome
        return replace(
            outcome,
            arrays=tuple(array[:rows] for array in outcome.arrays),
            finite=outcome.finite[:rows],
        )

    def _write(self, chunk: Chunk, outcomes: Sequence[Outcome]) -> ChunkReport:
        columns = zip(*(outcome.arrays for outcome in outcomes), strict=True)
        arrays = [_joined(column) for column in columns]
        finite = _joined([outcome.finite for outcome in outcomes])
        opened = self._results[chunk.task.job]
        opened.write(chunk.start, arrays, finite)
        bad = np.flatnonzero(~finite)
        return ChunkReport(
            index=chunk.index,
            rows=chunk.rows,
            non_finite=len(bad),
            first_non_finite=chunk.start + int(bad[0]) if len(bad) else None,
            execute_s=sum(outcome.execute_s for outcome in outcomes),
        )


def _opened(task: Task) -> Results:
    return Results(task.output, task.job, is_writable=True)


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _filled(array: Array, rows: int) -> Array:
    """Repeats the last row: a real point makes no NaN out of nothing."""
    missing = rows - len(array)
    if not missing:
        return array
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def _fitted(array: Array, source: RowSource, spec: InputSpec) -> Array:
    """Checks rows that were read, and converts them where the job lets them be."""
    if array.dtype.name == "uint16" and spec.dtype == "bfloat16":
        array = array.view(dtype_named("bfloat16"))
    found = array.shape[1:] if spec.is_batched else array.shape
    if found != spec.shape:
        raise ServiceError(
            "SOURCE_UNREADABLE",
            f"{source.location.name} has rows of shape {list(found)} now, and had "
            f"{list(spec.shape)} when the job was made. Submit the job again.",
            source=source.location.name,
        )
    if array.dtype.name == spec.dtype:
        return array
    try:
        return tensors.converted(array, spec.dtype)
    except ValueError as error:
        raise ServiceError(
            "DTYPE_MISMATCH",
            f"{source.location.name} can't be converted to {spec.dtype}: {error}. "
            "Convert it yourself, if you mean to lose what it can't hold.",
            source=source.location.name,
        ) from error


class _OpenSources:
    """Files that are open, so that each is opened once for all chunks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[RowSource, _OpenSource] = OrderedDict()

    def read(self, source: RowSource, start: int, stop: int) -> Array:
        with self._lock:
            found = self._open.get(source)
            if found is None:
                found = self._open[source] = _OpenSource(source)
            self._open.move_to_end(source)
            evicted = None
            if len(self._open) > _OPEN_SOURCES:
                _, evicted = self._open.popitem(last=False)
        if evicted is not None:
            evicted.close()
        return found.read(start, stop)

    def close(self, sources: Sequence[RowSource]) -> None:
        with self._lock:
            found = [self._open.pop(each) for each in sources if each in self._open]
        for each in found:
            each.close()


class _OpenSource:
    """An open file, read by one thread at a time."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._opened: Source | None = None
        self._shared: Array | None = None

    def read(self, start: int, stop: int) -> Array:
        with self._lock:
            if self._shared is not None:
                return self._shared
            source = self._source
            with unchanged(source.location, source.array, source.identity):
                if self._opened is None:
                    self._opened = open_source(source.location, source.array)
                if source.is_batched:
                    return self._opened.read(start, stop)
                shared = self._opened.read_all()
            self._shared = shared
            return shared

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()
            self._opened = None
