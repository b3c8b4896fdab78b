"""What clients may ask of jobs: to create, find, watch, stop and read them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from jacserve.v1 import jobs_pb2
from jacserve.vocabulary import LAYOUTS, QUANTITIES, word
from jacserve_server.admission import shutting_down
from jacserve_server.catalog import Catalog
from jacserve_server.config import Config
from jacserve_server.errors import ServiceError
from jacserve_server.jobs import downloads, storage
from jacserve_server.jobs.clocks import SteadyClock
from jacserve_server.jobs.engine import Engine, LocalEngine
from jacserve_server.jobs.folder import JobFolder
from jacserve_server.jobs.intake import Intake
from jacserve_server.jobs.messages import encode_job, encode_page, read_page
from jacserve_server.jobs.records import JobRecord
from jacserve_server.jobs.requests import id_of, spec_of
from jacserve_server.jobs.results import Results
from jacserve_server.jobs.runs import JobRun
from jacserve_server.jobs.states import FINAL
from jacserve_server.jobs.storage import Location
from jacserve_server.jobs.table import JobTable, TableError
from jacserve_server.jobs.threads import in_thread
from jacserve_server.jobs.worker import JobWorker
from jacserve_server.machine import Machine

T = TypeVar("T")

# A watcher hears of a job at most so often, and of one that another server runs
# after so long.
_NEWS_S, _POLL_S = 0.25, 1.0
_IO_THREADS = 4


class JobDesk:
    """Keeps jobs and has them run. Used from one event loop."""

    def __init__(self, catalog: Catalog, machine: Machine, config: Config) -> None:
        """Opens the table of jobs; `start` has jobs run. It may block.

        Args:
            catalog: The functions.
            machine: Computes them.
            config: The settings.

        Raises:
            TableError: The table can't be opened.
            OSError: The folder of jobs can't be used.
        """
        self._config = config
        self._catalog = catalog
        self._folder = JobFolder(config.jobs_dir)
        self._clock = SteadyClock()
        try:
            self._table = JobTable(
                config.jobs_database or f"sqlite:///{config.jobs_dir / 'jobs.sqlite'}",
                self._folder.id,
                clock=self._clock,
            )
        except BaseException:
            self._folder.close()
            raise
        self._pool = ThreadPoolExecutor(_IO_THREADS, "jobs")
        # The table's calls wait for each other anyway.
        self._table_pool = ThreadPoolExecutor(2, "jobs-table")
        self._engine: Engine = LocalEngine(
            machine.scheduler,
            machine.executor.fingerprint,
            self._pool,
            slots=machine.slots,
            max_batch=lambda name: catalog.find(name).spec.max_batch,
        )
        self._intake = Intake(
            catalog,
            config,
            self._folder,
            self._table,
            in_pool=self._in_pool,
            in_table=self._in_table,
        )
        self._is_stopped = False
        self._news: dict[str, set[asyncio.Event]] = {}
        self._worker = JobWorker(
            self._table,
            self._folder.presence,
            functions=[spec.qualified_name for spec in catalog.specs],
            make_run=self._make_run,
            remove_files=self._remove_files,
            sweep=self._sweep,
            in_thread=self._in_table,
            max_running=config.max_running_jobs,
            keep=config.max_finished_jobs,
        )

    def start(self) -> None:
        """Begins to run jobs."""
        self._worker.start()

    async def stop(self) -> None:
        """Stops all jobs; they go on when a server starts again."""
        await self._worker.stop()
        self._is_stopped = True
        for uid in self._news:
            self._tell(uid)

    def close(self) -> None:
        """Lets go of the table and the folder, when no call is answered any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._table_pool.shutdown(wait=True)
        self._table.close()
        self._folder.close()

    async def counts(self) -> Mapping[str, int]:
        """Returns how many jobs are in each state.

        Raises:
            ServiceError: The table can't be read.
        """
        return dict((await self._in_table(self._table.counts)).items())

    async def create(self, raws: AsyncIterator[bytes], owner: str) -> jobs_pb2.Job:
        """Creates a job, unless it is there.

        Args:
            raws: Serialized CreateJobRequests.
            owner: Who creates it.

        Returns:
            The job.

        Raises:
            ServiceError: It can't be created.
        """
        record, is_new = await self._intake.create(raws, owner)
        if is_new:
            self._worker.wake()
        return encode_job(record)

    async def get(self, name: str, owner: str) -> jobs_pb2.Job:
        """Finds a job.

        Args:
            name: Its id, or its resource name.
            owner: Whose it is.

        Returns:
            The job as it is now.

        Raises:
            ServiceError: There is none.
        """
        return encode_job(await self._find(id_of(name), owner))

    async def _find(self, job_id: str, owner: str) -> JobRecord:
        record = await self._in_table(self._table.find, job_id, owner)
        if record is None:
            raise _not_found(job_id)
        return record

    async def list(
        self, request: jobs_pb2.ListJobsRequest, owner: str
    ) -> jobs_pb2.ListJobsResponse:
        """Lists jobs, the newest first.

        Args:
            request: Which page, of which jobs.
            owner: Whose; "-" for all.

        Returns:
            The page.

        Raises:
            ServiceError: There is no such page.
        """
        page = read_page(request, owner)

        def jobs() -> "list[JobRecord]":
            return self._table.jobs(
                states=page.states,
                identity=page.identity,
                before=page.before,
                limit=page.size + 1,
            )

        return encode_page(await self._in_table(jobs), page.size)

    async def watch(self, name: str, owner: str) -> AsyncGenerator[jobs_pb2.Job]:
        """Yields a job whenever it has got further, until it has ended.

        Args:
            name: Its id, or its resource name.
            owner: Whose it is.

        Raises:
            ServiceError: There is none, or no longer.
        """
        job_id = id_of(name)
        record = await self._find(job_id, owner)
        uid, told = record.uid, None
        event = asyncio.Event()
        self._news.setdefault(uid, set()).add(event)
        try:
            while True:
                if record.uid != uid:
                    raise _not_found(job_id)
                if record != told:
                    yield encode_job(record)
                    told = record
                if record.state in FINAL:
                    return
                if self._is_stopped:
                    raise shutting_down()
                await asyncio.sleep(_NEWS_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S - _NEWS_S):
                        await event.wait()
                event.clear()
                record = await self._find(job_id, owner)
        finally:
            events = self._news[uid]
            events.discard(event)
            if not events:
                del self._news[uid]

    async def cancel(self, name: str, owner: str) -> jobs_pb2.Job:
        """Stops a job; does nothing to one that has ended.

        Args:
            name: Its id, or its resource name.
            owner: Whose it is.

        Returns:
            The job as it is now.

        Raises:
            ServiceError: There is none.
        """
        job_id = id_of(name)
        record = await self._in_table(self._table.cancel, job_id, owner)
        if record is None:
            raise _not_found(job_id)
        self._worker.stop_run(record.uid)
        self._tell(record.uid)
        return encode_job(record)

    async def delete(self, name: str, owner: str) -> None:
        """Stops a job and forgets it.

        Args:
            name: Its id, or its resource name.
            owner: Whose it is.

        Raises:
            ServiceError: There is none.
        """
        job_id = id_of(name)
        uid = await self._in_table(self._table.delete, job_id, owner)
        if uid is None:
            raise _not_found(job_id)
        self._worker.stop_run(uid)
        self._tell(uid)
        self._worker.tidy_soon()

    async def read(
        self, request: jobs_pb2.ReadJobResultRequest, owner: str
    ) -> AsyncGenerator[bytes]:
        """Reads results of a range of points.

        Args:
            request: Which results of which points.
            owner: Whose job it is.

        Yields:
            Serialized ReadJobResultResponses.

        Raises:
            ServiceError: There is no such job, or the points are not computed.
        """
        job_id = id_of(request.name)
        record = await self._find(job_id, owner)
        spec = spec_of(record.request)
        asked = dict.fromkeys(spec.query.quantities)
        wanted = dict.fromkeys(request.quantities) or asked
        for place, number in enumerate(wanted):
            if number not in asked:
                words = ", ".join(word(QUANTITIES, each) for each in asked)
                raise ServiceError(
                    "QUANTITY_UNSUPPORTED",
                    f"jobs/{job_id} has {words}, and quantity {number} was asked for. "
                    "Ask for these.",
                    field=f"quantities[{place}]",
                    quantity=number,
                )
        start, count = request.start, request.count
        stop = start + count if count else record.point_count
        if not 0 <= start < stop <= record.point_count:
            raise ServiceError(
                "MALFORMED_REQUEST",
                f"points {start} to {stop} were asked for, and jobs/{job_id} has "
                f"{record.point_count}. Pass a range of these.",
                field="start",
                start=start,
                stop=stop,
                points=record.point_count,
            )
        if stop > record.ready_count:
            await self._check_computed(record, start, stop)
        try:
            output = self._intake.output(record)
            results = await self._in_pool(self._opened, output, record.uid)
            layout = word(LAYOUTS, spec.query.layout) if spec.query.layout else "csr"
            async for part in downloads.parts(
                results,
                start,
                stop,
                quantities=[word(QUANTITIES, number) for number in wanted],
                layout=layout,
                block_rows=record.chunk_size or 1,
                in_thread=self._in_pool,
            ):
                yield part
        except ServiceError:
            # Its results go a moment after the job.
            if (await self._find(job_id, owner)).uid != record.uid:
                raise _not_found(job_id) from None
            raise

    def _opened(self, output: Location, uid: str) -> Results:
        return Results(output, uid, is_writable=False)

    async def _check_computed(self, record: JobRecord, start: int, stop: int) -> None:
        chunks = await self._in_table(self._table.chunks, record.uid)
        done = {chunk.index for chunk in chunks}
        size = record.chunk_size
        if size is None or not done.issuperset(range(start // size, -(-stop // size))):
            raise ServiceError(
                "JOB_NOT_FINISHED",
                f"points {start} to {stop} of jobs/{record.job_id} are not all "
                f"computed: it is {record.state}, and its first {record.ready_count} "
                f"of {record.point_count} points are. Wait for it, or read these.",
                job=f"jobs/{record.job_id}",
                state=record.state,
                ready=record.ready_count,
                points=record.point_count,
            )

    async def _sweep(self) -> None:
        for uid in await self._in_pool(self._folder.sweep):
            if await self._in_table(self._table.get, uid) is None:
                await self._in_pool(self._folder.remove, uid)

    def _make_run(self, record: JobRecord) -> JobRun:
        return JobRun(
            record,
            self._folder.presence.id,
            engine=self._engine,
            table=self._table,
            in_thread=self._in_table,
            restore=self._intake.restore,
            on_progress=self._tell,
            clock=self._clock,
        )

    async def _remove_files(self, record: JobRecord) -> None:
        await self._in_pool(self._folder.remove, record.uid)
        # What a client has had written to a place of its own is the client's.
        if not spec_of(record.request).output:
            results = self._folder.results(record.uid)
            await self._in_pool(storage.remove, results)

    def _tell(self, uid: str) -> None:
        for event in self._news.get(uid, ()):
            event.set()

    async def _in_pool(self, call: Callable[..., T], /, *arguments: Any) -> T:
        return await in_thread(self._pool, call, *arguments)

    async def _in_table(self, call: Callable[..., T], /, *arguments: Any) -> T:
        try:
            return await in_thread(self._table_pool, call, *arguments)
        except TableError as error:
            raise ServiceError("STORAGE_UNAVAILABLE", str(error)) from error


def _not_found(job_id: str) -> ServiceError:
    return ServiceError(
        "JOB_NOT_FOUND",
        f"there is no job {job_id}. List the jobs to see their ids; those that have "
        "ended are deleted in time.",
        field="name",
        job=f"jobs/{job_id}",
    )
