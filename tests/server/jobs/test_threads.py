"""Calls in threads whose askers leave: nothing is cut short, and nobody complains."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from jacserve_server.errors import ServiceError
from jacserve_server.job_service import JobService
from jacserve_server.jobs.threads import in_thread


def complaints_about(leave: Any) -> list[str]:
    """Returns what the loop complains of after a coroutine has run."""
    complaints: list[str] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: complaints.append(what["message"]))
        await leave()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(run())
    return complaints


async def left_twice(asker: "asyncio.Task[Any]", has_begun: threading.Event) -> None:
    """Cancels an asker, and again while it waits for what it has begun."""
    await asyncio.to_thread(has_begun.wait)
    for _ in range(2):
        asker.cancel()
        await asyncio.sleep(0.01)
    with suppress(asyncio.CancelledError):
        await asker


def test_a_call_that_fails_when_its_asker_has_left_twice_is_not_complained_of() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def fail() -> None:
        has_begun.set()
        may_end.wait()
        raise OSError("the disk is full")

    async def leave() -> None:
        with ThreadPoolExecutor(1) as pool:
            await left_twice(asyncio.create_task(in_thread(pool, fail)), has_begun)
            may_end.set()
            await in_thread(pool, int)

    assert complaints_about(leave) == []


def test_jobs_that_can_t_be_opened_when_all_have_left_are_not_complained_of() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def fail() -> Any:
        has_begun.set()
        may_end.wait()
        raise ServiceError("STORAGE_UNAVAILABLE", "the disk is full")

    async def leave() -> None:
        unused: Any = None
        service = JobService(fail, unused, unused)
        await left_twice(asyncio.create_task(service.desk()), has_begun)
        may_end.set()
        await service.stop()

    assert complaints_about(leave) == []
