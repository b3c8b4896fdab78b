"""Runs the jobs of the table, some at a time, and removes those that are over."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress

from jacserve_server.errors import ServiceError
from jacserve_server.jobs.liveness import Presence
from jacserve_server.jobs.records import JobRecord
from jacserve_server.jobs.runs import JobRun
from jacserve_server.jobs.table import JobTable
from jacserve_server.jobs.threads import InThread

_log = logging.getLogger(__name__)

# How often it looks for jobs that other servers have left, and for those held up.
_LOOK_S = 1.0
_TIDY_S = 30.0


class JobWorker:
    """Claims jobs and runs them. Used from one event loop."""

    def __init__(
        self,
        table: JobTable,
        presence: Presence,
        *,
        functions: Collection[str],
        make_run: Callable[[JobRecord], JobRun],
        remove_files: Callable[[JobRecord], Awaitable[None]],
        sweep: Callable[[], Awaitable[None]],
        in_thread: InThread,
        max_running: int,
        keep: int,
    ) -> None:
        """Runs nothing yet.

        Args:
            table: Has the jobs.
            presence: Says which servers live.
            functions: The functions of this server, by qualified name.
            make_run: Makes the run of a job.
            remove_files: Removes a job's files.
            sweep: Removes what others have left behind.
            in_thread: Calls the table.
            max_running: How many jobs run at once.
            keep: How many jobs are kept that have ended.
        """
        self._table = table
        self._presence = presence
        self._functions = functions
        self._make_run = make_run
        self._remove_files = remove_files
        self._sweep = sweep
        self._in_thread = in_thread
        self._max_running = max_running
        self._keep = keep
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._awake, self._untidy = asyncio.Event(), asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to claim jobs."""
        self._loops = [
            asyncio.create_task(self._claim_for_ever()),
            asyncio.create_task(self._tidy_for_ever()),
        ]

    def wake(self) -> None:
        """Has it look for jobs now."""
        self._awake.set()

    def tidy_soon(self) -> None:
        """Has it remove the files of deleted jobs without delay."""
        self._untidy.set()

    def stop_run(self, uid: str) -> None:
        """Stops the run of a job that was cancelled, if it runs here."""
        if run := self._runs.get(uid):
            run.cancel()

    async def stop(self) -> None:
        """Stops all runs, and leaves their jobs to others."""
        tasks = [*self._loops, *self._runs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _claim_for_ever(self) -> None:
        while True:
            self._awake.clear()
            try:
                while len(self._runs) < self._max_running:
                    record = await self._in_thread(self._claim, tuple(self._runs))
                    if record is None:
                        break
                    self._begin(record)
            except ServiceError as error:
                _log.error("jobs wait: %s", error)
            except Exception:
                # Whatever it is, it may pass, and there is nobody to start this again.
                _log.exception("jobs wait")
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._awake.wait()

    def _claim(self, running: Collection[str]) -> JobRecord | None:
        return self._table.claim(
            self._presence.id,
            self._functions,
            self._presence.is_alive,
            running=running,
        )

    def _begin(self, record: JobRecord) -> None:
        run = asyncio.create_task(self._make_run(record).run())
        self._runs[record.uid] = run

        def end(_: object) -> None:
            del self._runs[record.uid]
            self._awake.set()
            self._untidy.set()  # It may have been deleted while it ran.

        run.add_done_callback(end)

    async def _tidy_for_ever(self) -> None:
        while True:
            self._untidy.clear()
            try:
                await self._tidy()
            except ServiceError as error:
                _log.error("jobs are not tidied up: %s", error)
            except Exception:
                _log.exception("jobs are not tidied up")
            with suppress(TimeoutError):
                async with asyncio.timeout(_TIDY_S):
                    await self._untidy.wait()

    async def _tidy(self) -> None:
        """Deletes the jobs that are over, and the files of all that are deleted."""
        for uid in await self._in_thread(self._expired):
            await self._in_thread(self._table.forget, uid)
        condemned = await self._in_thread(
            self._table.condemned, self._presence.id, self._presence.is_alive
        )
        for record in condemned:
            if record.uid not in self._runs:
                await self._remove(record)
        await self._sweep()

    def _expired(self) -> list[str]:
        return self._table.expired(keep=self._keep)

    async def _remove(self, record: JobRecord) -> None:
        try:
            await self._remove_files(record)
        except Exception:
            _log.exception("files of job %s can't be removed", record.uid)
            return
        await self._in_thread(self._table.purge, record.uid)
