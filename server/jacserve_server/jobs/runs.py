"""One job, from its claim to its end: every chunk that is missing is computed once."""

import asyncio
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from jacserve_server.errors import ServiceError
from jacserve_server.jobs.engine import Engine
from jacserve_server.jobs.plans import ChunkReport, JobPlan, Task
from jacserve_server.jobs.records import ChunkRecord, JobRecord
from jacserve_server.jobs.requests import JobRequest
from jacserve_server.jobs.rows import least
from jacserve_server.jobs.sizing import Sizes
from jacserve_server.jobs.table import JobTable
from jacserve_server.jobs.threads import InThread
from jacserve_server.statuses import explained, status_of

T = TypeVar("T")
_log = logging.getLogger(__name__)

# So much work is lost at most when the machine loses its power, and so much is left to
# be waited for at the end.
_SYNC_S = 0.25
# The rate is that of so many seconds.
_RATE_S = 10.0
_FIRST_RETRY_S, _LONGEST_RETRY_S = 2.0, 300.0
# What passes when somebody mends it, or elsewhere.
_PASSING = {"STORAGE_UNAVAILABLE", "FUNCTION_CHANGED", "SHUTTING_DOWN"}
# What the machine has done to a job whose program has run well before, unless it does
# so again and again. Everything else is the job's own fault.
_STRIKES = {"DEVICE_OUT_OF_MEMORY", "WORKER_DIED"}
_MOST_STRIKES = 10
# From so many on, a job is not begun at once: it may be what ends its servers, and
# others get on meanwhile.
_SUSPICIOUS_STRIKES = 5


class _LostJobError(Exception):
    """The job is not this server's any more: cancelled, deleted or taken over."""


class JobRun:
    """Runs a job that this server has claimed."""

    def __init__(
        self,
        record: JobRecord,
        server: str,
        *,
        engine: Engine,
        table: JobTable,
        in_thread: InThread,
        restore: Callable[[JobRecord], Awaitable[JobRequest]],
        on_progress: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Starts nothing yet.

        Args:
            record: The job as it was claimed.
            server: The id of this server.
            engine: Computes its chunks.
            table: Keeps what is computed.
            in_thread: Calls the table.
            restore: Makes a request of what the table has kept.
            on_progress: Called with the job's uid whenever it has got further.
            clock: The time, in seconds since 1970.
        """
        self._record = record
        self._uid = record.uid
        self._server = server
        self._engine = engine
        self._table = table
        self._in_thread = in_thread
        self._restore = restore
        self._on_progress = on_progress
        self._clock = clock
        self._task: Task | None = None
        self._done: set[int] = set()
        self._has_committed = False  # In this run.
        self._first_bad: int | None = None  # The first row that gave NaN or Inf.
        self._ready = 0  # Chunks before the first that is not done.
        self._unsettled: list[int] = []
        self._sync_at = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    async def run(self) -> None:
        """Runs it to its end, or until it is held up, lost, or this is cancelled."""
        try:
            await self._run()
        except asyncio.CancelledError:
            # Nothing happens to a job that was cancelled: it is not running any more.
            await self._in_thread(self._release)
            raise
        except _LostJobError:
            pass
        except Exception as error:
            await self._stop(error)
        finally:
            if self._task is not None:
                await self._engine.close(self._task)
            self._on_progress(self._uid)

    async def _stop(self, error: Exception) -> None:
        # No call has failed, but a fault is found in the log in the same way.
        request_id = uuid.uuid4().hex
        failure = explained(error, request_id)
        status = status_of(failure, request_id).SerializeToString()
        _log.info("job %s: %s", self._record.job_id, failure.message)
        try:
            is_strike = not _is_passing(failure)
            if is_strike and not self._is_forgiven(failure):
                await self._in_thread(self._finish, "failed", status)
                return
            attempts = 0 if self._has_committed else self._record.attempts
            delay_s = _FIRST_RETRY_S * 2.0 ** min(attempts, 30)
            retry_at = self._clock() + min(delay_s, _LONGEST_RETRY_S)
            await self._in_thread(self._release, status, retry_at, is_strike)
        except ServiceError as error:
            # It stays this server's, which claims it again when the table is back.
            _log.error("job %s: %s", self._record.job_id, error)

    def _is_forgiven(self, failure: ServiceError) -> bool:
        """Tells whether what may be the job's fault is no reason to give it up yet."""
        record = self._record
        has_run_well = self._has_committed or record.done_count > 0
        strikes = 0 if self._has_committed else record.strikes
        return (
            failure.reason in _STRIKES and has_run_well and strikes + 1 < _MOST_STRIKES
        )

    async def _run(self) -> None:
        await self._lie_low()
        request = await self._restore(self._record)
        self._task = task = request.task
        await self._in_thread(self._table.unsettle, self._uid, self._server, boot_id())
        chunks = await self._in_thread(self._table.chunks, self._uid)
        self._done = {chunk.index for chunk in chunks}
        # Those that a killed server has left may be in the machine's memory alone.
        self._unsettled = sorted(self._done)
        # It may be known from before, if the server ended before it could be told.
        self._first_bad = least(chunk.first_non_finite for chunk in chunks)
        plan = await self._planned(task, request.spec.batch_size)
        self._advance()
        self._sync_at = time.monotonic() + _SYNC_S
        await self._compute(plan, require_finite=request.require_finite)
        await self._settle()
        if not await self._in_thread(self._finish, "succeeded", None):
            raise _LostJobError

    async def _lie_low(self) -> None:
        """Waits, the longer the more servers have ended while they ran the job."""
        beyond = self._record.strikes - _SUSPICIOUS_STRIKES
        if beyond < 0:
            return
        # Not all at once, lest what is at fault always meets the same others.
        most_s = min(_FIRST_RETRY_S * 2.0 ** min(beyond, 30), _LONGEST_RETRY_S)
        pause_s = random.uniform(0.5, 1.0) * most_s
        _log.warning(
            "job %s is begun in %.0f s: it was running %d times when its server was "
            "killed, or its memory did not suffice",
            self._record.job_id,
            pause_s,
            self._record.strikes,
        )
        await asyncio.sleep(pause_s)

    async def _planned(self, task: Task, batch_size: int) -> JobPlan:
        record = self._record
        settled = None
        if record.batch_size is not None and record.chunk_size is not None:
            settled = Sizes(record.batch_size, record.chunk_size)
        prepared = await self._engine.prepare(task, settled, batch_size)
        sizes, fingerprint = prepared.sizes, prepared.fingerprint
        if settled is None:
            self._check_kept(await self._in_thread(self._plan, sizes, fingerprint))
        elif record.fingerprint != fingerprint:
            function = task.computation.function
            raise ServiceError(
                "FUNCTION_CHANGED",
                f"functions/{function} is not what it was when the job began, or it "
                "is differentiated or compiled in another way now. Bring that back, "
                "and the job goes on; or register the new one as another version, and "
                "submit the job again.",
                function=f"functions/{function}",
            )
        return JobPlan(task, sizes.batch_size, sizes.chunk_size, fingerprint)

    async def _compute(self, plan: JobPlan, *, require_finite: bool) -> None:
        missing = (i for i in range(plan.chunk_count) if i not in self._done)
        pending: set[asyncio.Task[ChunkReport]] = set()
        syncing: asyncio.Task[None] | None = None

        def fill() -> None:
            while len(pending) < self._engine.width:
                index = next(missing, None)
                if index is None:
                    return
                chunk = plan.chunk(index)
                # What comes before a row at fault may have another one.
                bad = self._first_bad if require_finite else None
                if bad is not None and chunk.start > bad:
                    return
                pending.add(asyncio.create_task(self._engine.run(chunk)))

        failure: BaseException | None = None
        fill()
        try:
            while pending:
                finished, pending = await asyncio.wait(
                    pending, return_when=asyncio.FIRST_COMPLETED
                )
                for each in finished:
                    if each.exception() is None:
                        bad = each.result().first_non_finite
                        self._first_bad = least((self._first_bad, bad))
                failure = next(filter(None, map(_exception, finished)), failure)
                if failure is None:
                    fill()
                # Those that are done count, even where another one has failed.
                for each in finished:
                    if each.exception() is None:
                        await self._commit(plan, each.result())
                if syncing is not None and syncing.done():
                    syncing.result()
                    syncing = None
                if syncing is None and time.monotonic() > self._sync_at:
                    syncing = asyncio.create_task(self._settle())
            if syncing is not None:
                await syncing
            if failure is not None:
                raise failure
            if require_finite and self._first_bad is not None:
                raise _not_finite(plan, self._first_bad)
        finally:
            left = [*pending, *([] if syncing is None else [syncing])]
            for each in left:
                each.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _commit(self, plan: JobPlan, report: ChunkReport) -> None:
        self._done.add(report.index)
        self._advance()
        now = time.monotonic()
        self._recent.append((now, report.rows))
        while now - self._recent[0][0] > _RATE_S and len(self._recent) > 2:
            self._recent.popleft()
        ready = min(self._ready * plan.chunk_size, plan.task.point_count)
        chunk = ChunkRecord(
            index=report.index,
            rows=report.rows,
            non_finite=report.non_finite,
            first_non_finite=report.first_non_finite,
            execute_s=report.execute_s,
        )
        is_kept = await self._in_thread(self._keep, chunk, self._rate(), ready)
        self._check_kept(is_kept)
        self._has_committed = True
        self._unsettled.append(report.index)
        self._on_progress(self._uid)

    def _advance(self) -> None:
        while self._ready in self._done:
            self._ready += 1

    def _rate(self) -> float:
        """Returns the rows per second of late; 0 before there are two chunks."""
        first, last = self._recent[0][0], self._recent[-1][0]
        rows = sum(rows for _, rows in self._recent) - self._recent[0][1]
        return rows / (last - first) if last > first else 0.0

    async def _settle(self) -> None:
        """Sees to it that what is committed outlives the machine."""
        committed, self._unsettled = self._unsettled, []
        if self._task is not None and committed:
            await self._engine.sync(self._task, committed)
            await self._in_thread(
                self._table.settle, self._uid, self._server, committed
            )
        self._sync_at = time.monotonic() + _SYNC_S

    def _check_kept(self, is_kept: bool) -> None:
        if not is_kept:
            raise _LostJobError

    def _plan(self, sizes: Sizes, fingerprint: str) -> bool:
        return self._table.plan(
            self._uid,
            self._server,
            batch_size=sizes.batch_size,
            chunk_size=sizes.chunk_size,
            fingerprint=fingerprint,
        )

    def _keep(self, chunk: ChunkRecord, points_per_s: float, ready: int) -> bool:
        return self._table.commit(
            self._uid,
            self._server,
            chunk,
            boot=boot_id() or "",
            points_per_s=points_per_s,
            ready_count=ready,
        )

    def _release(
        self,
        error: bytes | None = None,
        retry_at: float | None = None,
        is_strike: bool = False,
    ) -> bool:
        return self._table.release(
            self._uid,
            self._server,
            error=error,
            retry_at=retry_at,
            is_strike=is_strike,
        )

    def _finish(self, state: Any, error: bytes | None) -> bool:
        return self._table.finish(self._uid, self._server, state, error=error)


def _is_passing(failure: ServiceError) -> bool:
    return failure.reason in _PASSING or failure.retry_after_s is not None


def _exception(task: asyncio.Task[ChunkReport]) -> BaseException | None:
    return task.exception()


def boot_id() -> str | None:
    """Identifies this start of this machine; None where that can't be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _not_finite(plan: JobPlan, row: int) -> ServiceError:
    function = plan.task.computation.function
    return ServiceError(
        "RESULT_NOT_FINITE",
        f"{', '.join(plan.task.computation.quantities)} of functions/{function} has "
        f"NaN or Inf at point {row}. Pass other points, or leave require_finite out to "
        "have it recorded.",
        field="query.require_finite",
        function=f"functions/{function}",
        point=row,
    )
