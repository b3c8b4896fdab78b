"""The loops of a worker go on, whatever happens in one of their turns."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jacserve_server.jobs.liveness import Presence
from jacserve_server.jobs.records import JobRecord, NewJob
from jacserve_server.jobs.table import JobTable
from jacserve_server.jobs.threads import in_thread
from jacserve_server.jobs.worker import JobWorker


class Finishing:
    """Finishes the run of a job that it is made for, unless it can't be made."""

    def __init__(self, table: JobTable, failures: int) -> None:
        self._table = table
        self._failures = failures
        self.has_run = asyncio.Event()

    def __call__(self, record: JobRecord) -> Any:
        if self._failures:
            self._failures -= 1
            raise RuntimeError("can't start new thread")
        self._record = record
        return self

    async def run(self) -> None:
        record = self._record
        assert record.owner is not None
        assert self._table.finish(record.uid, record.owner, "succeeded")
        self.has_run.set()


@pytest.fixture
def presence(tmp_path: Path) -> Iterator[Presence]:
    with closing(Presence(tmp_path)) as made:
        yield made


@pytest.fixture
def table(tmp_path: Path) -> Iterator[JobTable]:
    with closing(JobTable(f"sqlite:///{tmp_path}/jobs.sqlite", "here")) as made:
        yield made


async def run_one(table: JobTable, presence: Presence, failures: int) -> None:
    """Has a worker run a job, and tidy up; both fail so often first."""
    runs = Finishing(table, failures)
    sweeps: list[int] = []
    is_tidy = asyncio.Event()

    async def sweep() -> None:
        sweeps.append(1)
        if len(sweeps) <= failures:
            worker.tidy_soon()
            raise FileNotFoundError("uploads")
        is_tidy.set()

    async def remove_files(record: JobRecord) -> None:
        """There are none."""

    pool = ThreadPoolExecutor(1)
    worker = JobWorker(
        table,
        presence,
        functions=["f@1"],
        make_run=runs,
        remove_files=remove_files,
        sweep=sweep,
        in_thread=partial(in_thread, pool),
        max_running=1,
        keep=10,
    )
    worker.start()
    try:
        async with asyncio.timeout(20):
            await runs.has_run.wait()
            await is_tidy.wait()
    finally:
        await worker.stop()
        pool.shutdown()


def test_a_turn_that_fails_is_followed_by_others(
    table: JobTable, presence: Presence
) -> None:
    table.create(
        NewJob(
            job_id="j",
            request=b"",
            digest="",
            function="f@1",
            point_count=1,
            output="",
            ttl_s=60.0,
            owner=presence.id,
        )
    )
    asyncio.run(run_one(table, presence, failures=2))
    assert table.counts()["succeeded"] == 1
