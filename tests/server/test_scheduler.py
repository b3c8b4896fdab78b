"""The scheduler by itself: bounds and draining, with a fake executor."""

import asyncio
from typing import Any, cast

import pytest

from jacserve_server.errors import ServiceError
from jacserve_server.query import Work
from jacserve_server.scheduler import Scheduler

WORK = cast("Work", object())


def make(max_queries: int = 2) -> tuple[Scheduler, asyncio.Event, list[str]]:
    gate, seen = asyncio.Event(), []

    async def execute(work: Work) -> Any:
        seen.append("started")
        await gate.wait()
        seen.append("finished")
        return work

    return Scheduler(execute, max_queries=max_queries), gate, seen


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def test_more_than_the_bound_are_refused_at_once() -> None:
    async def scenario() -> None:
        scheduler, gate, _ = make()
        running = [asyncio.create_task(scheduler.submit(WORK)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ServiceError) as caught:
            await scheduler.submit(WORK)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s
        gate.set()
        assert await asyncio.gather(*running) == [WORK, WORK]
        assert await scheduler.submit(WORK) is WORK

    run(scenario())


def test_the_cancelled_and_the_failed_leave_the_queue() -> None:
    async def scenario() -> None:
        scheduler, gate, _ = make(max_queries=1)
        task = asyncio.create_task(scheduler.submit(WORK))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gate.set()
        assert await scheduler.submit(WORK) is WORK

    run(scenario())


def test_draining_refuses_the_new_and_waits_for_the_running() -> None:
    async def scenario() -> None:
        scheduler, gate, seen = make()
        running = asyncio.create_task(scheduler.submit(WORK))
        await asyncio.sleep(0)
        draining = asyncio.create_task(scheduler.drain())
        await asyncio.sleep(0)
        with pytest.raises(ServiceError) as caught:
            await scheduler.submit(WORK)
        assert caught.value.reason == "SHUTTING_DOWN"
        assert not draining.done()
        gate.set()
        await draining
        assert seen == ["started", "finished"]
        assert await running is WORK

    run(scenario())


def test_an_idle_scheduler_drains_at_once() -> None:
    async def scenario() -> None:
        await make()[0].drain()

    run(scenario())
