"""What a run makes of failures: what passes holds a job up, all else ends it."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from jacserve.v1 import jobs_pb2
from jacserve_server.errors import ServiceError
from jacserve_server.jobs.engine import Prepared
from jacserve_server.jobs.plans import Chunk, ChunkReport, Task
from jacserve_server.jobs.records import JobRecord, NewJob
from jacserve_server.jobs.requests import JobRequest
from jacserve_server.jobs.runs import JobRun
from jacserve_server.jobs.sizing import Sizes
from jacserve_server.jobs.storage import Location
from jacserve_server.jobs.table import JobTable
from jacserve_server.jobs.threads import in_thread
from jacserve_server.work import Computation

NOW = 1000.0


class FailingEngine:
    """Computes so many chunks, and then fails."""

    width = 1

    def __init__(self, chunks: int, failure: Exception) -> None:
        self._left = chunks
        self._failure = failure

    async def prepare(
        self, task: Task, sizes: Sizes | None, batch_size: int
    ) -> Prepared:
        return Prepared(sizes or Sizes(1, 1), "print")

    async def run(self, chunk: Chunk) -> ChunkReport:
        if not self._left:
            raise self._failure
        self._left -= 1
        return ChunkReport(chunk.index, 1, 0, None, 0.0)

    async def sync(self, task: Task, indexes: Sequence[int]) -> None:
        """Nothing is written."""

    async def close(self, task: Task) -> None:
        """Nothing is open."""


@pytest.fixture
def table(tmp_path: Path) -> Iterator[JobTable]:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    # Later than whatever the runs have waited for.
    with closing(JobTable(url, "here", clock=lambda: NOW + 400.0)) as made:
        yield made


def claimed(table: JobTable) -> JobRecord:
    record = table.claim("a", ["f@1"], lambda _: True, running=())
    assert record is not None
    return record


def held_up_before(table: JobTable, times: int) -> JobRecord:
    """Makes a job, and claims it after so many attempts."""
    table.create(
        NewJob(
            job_id="j",
            request=b"",
            digest="",
            function="f@1",
            point_count=9,
            output="",
            ttl_s=60.0,
            owner="a",
        )
    )
    for _ in range(times):
        table.release(claimed(table).uid, "a", error=b"full")
    return claimed(table)


def after_failing(
    table: JobTable, record: JobRecord, chunks: int, failure: Exception
) -> JobRecord:
    """Returns what becomes of a job that computes so many chunks, and fails."""
    output = Location("/nowhere", "j.zarr", "jobs/j.zarr")
    computation = Computation("f@1", ("jacobian",), ("x",), "auto", "matrix", ())
    task = Task(record.uid, "j", computation, (), record.point_count, output)
    request = JobRequest("j", jobs_pb2.JobSpec(), task, False, ())

    async def restore(_: JobRecord) -> JobRequest:
        return request

    async def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            made = JobRun(
                record,
                "a",
                engine=FailingEngine(chunks, failure),
                table=table,
                in_thread=partial(in_thread, pool),
                restore=restore,
                on_progress=lambda _: None,
                clock=lambda: NOW,
            )
            await made.run()

    asyncio.run(run())
    found = table.get(record.uid)
    assert found is not None
    return found


def test_what_holds_a_job_up_after_a_chunk_is_its_first_attempt(
    table: JobTable,
) -> None:
    full = ServiceError("STORAGE_UNAVAILABLE", "the disk is full")
    record = held_up_before(table, 6)
    job = after_failing(table, record, 1, full)
    assert (job.state, job.attempts, job.retry_at) == ("queued", 1, NOW + 2.0)


def test_a_job_that_gets_no_further_waits_ever_longer(table: JobTable) -> None:
    full = ServiceError("STORAGE_UNAVAILABLE", "the disk is full")
    record = held_up_before(table, 6)
    job = after_failing(table, record, 0, full)
    assert (job.state, job.attempts, job.retry_at) == ("queued", 7, NOW + 128.0)


DIED = ServiceError("WORKER_DIED", "the process that ran it died")
NO_MEMORY = ServiceError("DEVICE_OUT_OF_MEMORY", "there is no room")
LATER = ServiceError("WORKER_DIED", "it can't be started", retry_after_s=5.0)
WRONG = ServiceError("EXECUTION_FAILED", "the pump is dry")


@pytest.mark.parametrize(
    ("failure", "chunks", "state"),
    [
        (LATER, 0, "queued"),
        (DIED, 0, "failed"),
        (NO_MEMORY, 0, "failed"),
        (MemoryError(), 0, "failed"),
        (DIED, 1, "queued"),
        (NO_MEMORY, 1, "queued"),
        (MemoryError(), 1, "queued"),
        (WRONG, 1, "failed"),
    ],
)
def test_what_the_machine_does_to_a_job_that_has_run_holds_it_up(
    table: JobTable, failure: Exception, chunks: int, state: str
) -> None:
    job = after_failing(table, held_up_before(table, 0), chunks, failure)
    assert job.state == state
    assert job.error is not None


def test_a_job_is_given_up_that_gets_no_further_for_want_of_memory(
    table: JobTable,
) -> None:
    record = held_up_before(table, 0)
    states: list[str] = []
    for chunks in (1, 0, 0, 2, *[0] * 9):
        table.release(record.uid, "a")
        states.append(after_failing(table, claimed(table), chunks, NO_MEMORY).state)
    assert states == [*["queued"] * 12, "failed"]
