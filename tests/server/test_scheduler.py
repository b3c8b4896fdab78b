"""The scheduler by itself: bounds and draining, with a fake executor."""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from jacserve_server.admission import Admission, Ticket
from jacserve_server.errors import ServiceError
from jacserve_server.fair_queue import FairQueue
from jacserve_server.scheduler import Scheduler
from jacserve_server.work import (
    Computation,
    InputSpec,
    Outcome,
    Outline,
    ProgramKey,
    Strategy,
    Work,
)


def outcome() -> Outcome:
    outline = Outline("f@1", (), {}, {}, Strategy(), None, "fake:0")
    return Outcome(outline, (), np.array(True), 0.5)


class FakeProgram(NamedTuple):
    name: str
    lane: str = ""

    @property
    def row_bytes(self) -> int:
        return 3 * 2**20 if self.name in {"large@1", "greedy@1"} else 8

    @property
    def is_brief(self) -> bool:
        return self.name == "brief@1"


class FakeExecutor:
    """Compiles nothing, runs until its gate opens, and keeps a diary."""

    def __init__(self, places: int = 1) -> None:
        self.places = places
        self.has = {("f@1", 0)}
        self.gate = asyncio.Event()
        self.diary: list[str] = []
        self.order: list[str] = []
        # What is hungry has room alone, or never.
        self.is_full = self.hungry_fails = False

    def ready(self, key: ProgramKey) -> None:
        del key

    def on(self, program: FakeProgram, place: int) -> FakeProgram | None:
        if place == 0:
            return program
        name = f"{program.name} on {place}"
        return FakeProgram(name) if (program.name, place) in self.has else None

    def when_ready(self, call: Callable[[], None]) -> None:
        self.call = call

    def run_now(self, program: FakeProgram, work: Work) -> Any:
        self.diary.append("now")
        return outcome()

    async def sparsity(self, sought: Any, client: str = "") -> Any:
        del sought

    async def prepare(self, key: ProgramKey, client: str = "") -> FakeProgram:
        return FakeProgram(key.computation.function)

    def run(self, program: FakeProgram, works: Any) -> Any:
        return asyncio.ensure_future(self._run(program, works))

    async def _run(self, program: FakeProgram, works: Any) -> Any:
        is_hungry = program.name in {"hungry@1", "greedy@1"}
        if is_hungry and (self.is_full or self.hungry_fails):
            raise ServiceError("DEVICE_OUT_OF_MEMORY", "there is no room")
        self.is_full = True
        try:
            return await self._run_whole(program, works)
        finally:
            self.is_full = False

    async def _run_whole(self, program: FakeProgram, works: Any) -> Any:
        self.diary.append("started")
        self.order.append(program.name.removesuffix("@1"))
        await self.gate.wait()
        self.diary.append("finished")
        return [outcome() for _ in works]


def make(slots: int = 1, max_queries: int = 3, max_bytes: int = 100, places: int = 1):
    executor = FakeExecutor(places)
    scheduler = Scheduler(
        executor,
        slots=slots,
        max_queries=max_queries,
        max_bytes=max_bytes,
        shard_rows=100,
    )
    return scheduler, executor


async def call(
    scheduler: Scheduler[FakeProgram],
    size_bytes: int = 1,
    *,
    client: str = "",
    name: str = "f",
) -> Outcome:
    computation = Computation(f"{name}@1", ("value",), (), None, "matrix", ())
    with scheduler.admitted(size_bytes, client=client) as ticket:
        work = Work(computation, (), None)
        return await scheduler.submit(work, ticket)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def test_more_than_the_bound_are_refused_at_once() -> None:
    async def scenario() -> None:
        scheduler, executor = make(max_queries=3)
        running = [asyncio.create_task(call(scheduler)) for _ in range(2)]
        await settled()
        with pytest.raises(ServiceError) as caught:
            await call(scheduler)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s
        executor.gate.set()
        outcomes = await asyncio.gather(*running)
        assert [outcome.execute_s for outcome in outcomes] == [0.5, 0.5]
        assert (await call(scheduler)).outline.device == "fake:0"

    run(scenario())


def test_more_bytes_than_the_bound_are_refused_unless_alone() -> None:
    async def scenario() -> None:
        scheduler, executor = make(max_bytes=100)
        first = asyncio.create_task(call(scheduler, 500))
        await settled()
        with pytest.raises(ServiceError, match="of 500 bytes are in flight"):
            await call(scheduler, 1)
        executor.gate.set()
        await first
        await call(scheduler, 100)

    run(scenario())


def test_no_more_run_at_once_than_there_are_slots() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=2, max_queries=9)
        calls = [asyncio.create_task(call(scheduler)) for _ in range(5)]
        await settled()
        assert executor.diary == ["started"] * 2
        executor.gate.set()
        await asyncio.gather(*calls)
        assert executor.diary.count("finished") == 5

    run(scenario())


def test_who_is_cancelled_in_the_queue_costs_no_device_time() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=1, max_queries=9)
        calls = [asyncio.create_task(call(scheduler)) for _ in range(4)]
        await settled()
        for queued in calls[1:3]:
            queued.cancel()
        await settled()
        executor.gate.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert executor.diary == ["started", "finished"] * 2

    run(scenario())


def test_a_slot_is_free_when_its_run_is_over_not_when_its_asker_leaves() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=1, max_queries=9)
        first = asyncio.create_task(call(scheduler))
        await settled()
        first.cancel()
        second = asyncio.create_task(call(scheduler))
        await settled()
        assert executor.diary == ["started"]
        draining = asyncio.create_task(scheduler.drain())
        executor.gate.set()
        assert (await second).queue_s >= 0
        await draining
        assert executor.diary == ["started", "finished"] * 2

    run(scenario())


def test_a_failure_frees_its_slot() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=1, max_queries=1)
        executor.gate = None  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(3):
            with pytest.raises(AttributeError):
                await call(scheduler)

    run(scenario())


def test_draining_refuses_the_new_and_waits_for_the_running() -> None:
    async def scenario() -> None:
        scheduler, executor = make()
        running = asyncio.create_task(call(scheduler))
        await settled()
        draining = asyncio.create_task(scheduler.drain())
        await settled()
        with pytest.raises(ServiceError) as caught:
            await call(scheduler)
        assert caught.value.reason == "SHUTTING_DOWN"
        assert not draining.done()
        executor.gate.set()
        await draining
        assert executor.diary == ["started", "finished"]
        assert (await running).execute_s == 0.5

    run(scenario())


def test_an_idle_scheduler_drains_at_once() -> None:
    async def scenario() -> None:
        await make()[0].drain()

    run(scenario())


def test_a_brief_program_runs_at_once_though_every_slot_is_taken() -> None:
    async def scenario() -> None:
        scheduler, executor = make()
        long = asyncio.create_task(call(scheduler))
        await settled()
        brief = Work(
            Computation("brief@1", ("value",), (), None, "matrix", ()), (), None
        )
        await scheduler.submit(brief)
        assert executor.diary == ["started", "now"]
        executor.gate.set()
        await long

    run(scenario())


@pytest.mark.parametrize("max_queries", [1, 2, 3, 4, 16, 1024])
def test_one_client_takes_half_and_another_always_finds_room(max_queries) -> None:
    admission = Admission(max_queries=max_queries, max_bytes=2**30)

    def fill(client: str) -> None:
        for _ in range(max_queries + 1):
            admission.enter(Ticket(admission, client, 1))

    def taken(client: str) -> int:
        before = admission.queries
        with pytest.raises(ServiceError) as caught:
            fill(client)
        assert caught.value.reason == "QUEUE_FULL"
        return admission.queries - before

    first = taken("first")
    assert first == (max_queries + 1) // 2
    # Each that comes gets the half of what is left.
    left = max_queries - first
    for client in range(3):
        share = taken(str(client))
        assert share >= (left > 0)
        assert share <= (left + 1) // 2
        left -= share


def test_bytes_are_shared_as_places_are() -> None:
    admission = Admission(max_queries=1000, max_bytes=100)
    for _ in range(5):
        admission.enter(Ticket(admission, "first", 10))
    with pytest.raises(ServiceError, match=r"50 bytes of this client.*50 of 100 bytes"):
        admission.enter(Ticket(admission, "first", 1))
    other = Ticket(admission, "other", 50)
    with other, pytest.raises(ServiceError, match="100 bytes are in flight"):
        admission.enter(Ticket(admission, "third", 1))
    admission.enter(Ticket(admission, "third", 1))


def test_a_large_result_counts_until_it_is_answered() -> None:
    async def scenario() -> None:
        scheduler, executor = make(max_queries=99, max_bytes=2**20)
        # Alone it fits, though it has 2 MiB more than are free.
        large = asyncio.create_task(call(scheduler, name="large"))
        await settled()
        with pytest.raises(ServiceError, match=f"of {2**21 + 1} bytes are in flight"):
            await call(scheduler, client="other")
        executor.gate.set()
        await large
        # Beside another it does not, and gives back the place that it had.
        executor.gate.clear()
        small = asyncio.create_task(call(scheduler))
        await settled()
        with pytest.raises(ServiceError, match=f"one more of {2**21} bytes has no"):
            await call(scheduler, client="other", name="large")
        executor.gate.set()
        await small
        await call(scheduler, client="other", name="large")

    run(scenario())


def test_clients_take_turns_and_each_of_them_in_order() -> None:
    async def scenario() -> None:
        scheduler, executor = make(max_queries=99)
        names = ["a0", "a1", "a2", "a3", "b0", "b1", "c0"]
        calls = [
            asyncio.create_task(call(scheduler, client=name[0], name=name))
            for name in names
        ]
        await settled()
        executor.gate.set()
        await asyncio.gather(*calls)
        assert executor.order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]

    run(scenario())


def test_the_order_stays_when_some_leave() -> None:
    queue = FairQueue[str]()
    for item in ("a0", "a1", "a2", "b0", "c0", "c1"):
        queue.put(item[0], item)
    queue.remove("a", "a1")
    queue.remove("b", "b0")
    queue.put("c", "c-", is_first=True)
    found = []
    while queue:
        item = next(queue.heads())
        queue.take(item[0], item)
        found.append(item)
    assert found == ["a0", "c-", "a2", "c0", "c1"]
    assert list(queue.heads()) == []


def test_a_device_without_the_program_is_used_as_soon_as_it_has_it() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=2, max_queries=99, places=2)
        calls = [asyncio.create_task(call(scheduler)) for _ in range(5)]
        await settled()
        assert executor.order == ["f", "f"]
        executor.has.add(("f@1", 1))
        executor.call()
        await settled()
        assert executor.order == ["f", "f"] + ["f@1 on 1"] * 2
        executor.gate.set()
        await asyncio.gather(*calls)
        assert len(executor.order) == 5

    run(scenario())


def test_the_emptier_device_goes_first() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=2, max_queries=99, places=2)
        executor.has.add(("f@1", 1))
        calls = [asyncio.create_task(call(scheduler)) for _ in range(4)]
        await settled()
        assert executor.order == ["f", "f@1 on 1"] * 2
        executor.gate.set()
        await asyncio.gather(*calls)

    run(scenario())


def test_who_waits_for_another_device_holds_up_no_other_client() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=1, max_queries=99, places=2)
        executor.has.add(("g@1", 1))
        calls = [asyncio.create_task(call(scheduler, client="a")) for _ in range(3)]
        calls.append(asyncio.create_task(call(scheduler, client="b", name="g")))
        await settled()
        assert executor.order == ["f", "g@1 on 1"]
        executor.gate.set()
        await asyncio.gather(*calls)

    run(scenario())


def test_when_a_part_fails_those_that_wait_cost_no_device_time() -> None:
    async def scenario() -> None:
        scheduler, executor = make(max_queries=99, places=4)
        executor.gate = None  # pyright: ignore[reportAttributeAccessIssue]
        inputs = (InputSpec((), "float64", is_batched=True),)
        computation = Computation("f@1", ("value",), (), None, "matrix", inputs)
        with pytest.raises(AttributeError):
            await scheduler.submit(Work(computation, (np.zeros(1000),), 1000))
        await scheduler.drain()
        # The device that was free had the first part; by then the second had begun.
        assert len(executor.order) <= 2

    run(scenario())


def background(
    scheduler: Scheduler[FakeProgram], name: str, client: str = "job"
) -> Any:
    computation = Computation(f"{name}@1", ("value",), (), None, "matrix", ())
    work = Work(computation, (), None)
    return asyncio.create_task(scheduler.submit_background(work, client))


def test_the_background_takes_all_slots_that_nobody_has_asked_for() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=2)
        runs = [background(scheduler, f"b{n}") for n in range(3)]
        await settled()
        assert executor.order == ["b0", "b1"]
        executor.gate.set()
        await asyncio.gather(*runs)

    run(scenario())


def test_the_background_leaves_a_slot_to_queries_and_waits_for_them() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=2, max_queries=9)
        first = asyncio.create_task(call(scheduler, name="q0"))
        await settled()
        # One slot is free, and it is the last one.
        runs = [background(scheduler, "b0")]
        await settled()
        assert executor.order == ["q0"]
        queries = [asyncio.create_task(call(scheduler, name=f"q{n}")) for n in (1, 2)]
        await settled()
        assert executor.order == ["q0", "q1"]
        executor.gate.set()
        await asyncio.gather(first, *queries, *runs)
        assert executor.order == ["q0", "q1", "q2", "b0"]

    run(scenario())


def test_jobs_take_turns_in_the_background() -> None:
    async def scenario() -> None:
        scheduler, executor = make(slots=1)
        runs = [background(scheduler, f"a{n}", "a") for n in range(3)]
        runs += [background(scheduler, f"b{n}", "b") for n in range(2)]
        await settled()
        executor.gate.set()
        await asyncio.gather(*runs)
        # The second job came when the turn was already the first one's.
        assert executor.order == ["a0", "a1", "b0", "a2", "b1"]

    run(scenario())


def test_what_had_no_memory_beside_others_is_run_when_they_have_finished() -> None:
    async def main() -> None:
        scheduler, executor = make(slots=2)
        first = asyncio.create_task(call(scheduler))
        await settled()
        hungry = asyncio.create_task(call(scheduler, name="hungry"))
        await settled()
        assert not hungry.done()
        executor.gate.set()
        await asyncio.gather(first, hungry)
        assert executor.order == ["f", "hungry"]

    run(main())


def test_what_has_no_memory_even_alone_fails() -> None:
    async def main() -> None:
        scheduler, executor = make(slots=2)
        executor.hungry_fails = True
        with pytest.raises(ServiceError, match="no room"):
            await call(scheduler, name="hungry")
        first = asyncio.create_task(call(scheduler))
        await settled()
        hungry = asyncio.create_task(call(scheduler, name="hungry"))
        await settled()
        executor.gate.set()
        await first
        with pytest.raises(ServiceError, match="no room"):
            await hungry

    run(main())


def test_a_result_counts_once_however_often_it_is_tried() -> None:
    async def main() -> None:
        scheduler, executor = make(slots=2, max_queries=99, max_bytes=3 * 2**20)
        executor.hungry_fails = True
        others = [asyncio.create_task(call(scheduler)) for _ in range(6)]
        greedy = asyncio.create_task(call(scheduler, client="other", name="greedy"))
        executor.gate.set()
        with pytest.raises(ServiceError, match="no room") as caught:
            await greedy
        assert caught.value.reason == "DEVICE_OUT_OF_MEMORY"
        await asyncio.gather(*others)

        # A batch keeps its place for the whole, which its parts are joined into.
        inputs = (InputSpec((), "float64", is_batched=True),)
        batch = Computation("greedy@1", ("value",), (), None, "matrix", inputs)
        with scheduler.admitted(1) as ticket:
            with pytest.raises(ServiceError, match="no room"):
                await scheduler.submit(Work(batch, (np.zeros(8),), 8), ticket)
            assert ticket.size_bytes == 1 + 23 * 2**20
        assert scheduler.load.in_flight.size_bytes == 0

    run(main())
