"""Whatever arrives, fails or leaves, and when: each gets its own answer, once."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jacserve_server.errors import ServiceError
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

# Of each of two devices; the second has only the programs of the first kind.
SLOTS = 1


class Handle(NamedTuple):
    key: ProgramKey
    place: int
    lane: str = ""
    row_bytes: int = 8
    is_brief: bool = False


OUTLINE = Outline("f@1", (), {}, {}, Strategy(), None, "fake:0")
KINDS = [
    Computation(
        name, ("value",), (), None, "matrix", (InputSpec((), "float64", False),)
    )
    for name in ("squares@1", "cubes@1")
]
POWERS = {"squares@1": 2, "cubes@1": 3}


class Executor:
    """Computes powers of the number in a work's input; fails where that is negative."""

    places = 2

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = iter(steps)
        self.running = Counter[int]()
        self.most_running = 0
        self.ran: Counter[float] = Counter()

    def ready(self, key: ProgramKey) -> Handle:
        return Handle(key, 0)

    async def prepare(self, key: ProgramKey, client: str = "") -> Handle:
        return Handle(key, 0)

    async def sparsity(self, sought: Any, client: str = "") -> Any:
        pytest.fail(f"nobody asks for the sparsity of {sought}")

    def on(self, program: Handle, place: int) -> Handle | None:
        key = program.key
        is_there = place == 0 or key.computation.function == "squares@1"
        return Handle(key, place) if is_there else None

    def when_ready(self, call: Any) -> None:
        del call

    def run_now(self, program: Handle, work: Work) -> Outcome:
        pytest.fail(f"{program} is not brief")

    def run(self, program: Handle, works: Sequence[Work]) -> Any:
        return asyncio.ensure_future(self._run(program, works))

    async def _run(self, program: Handle, works: Sequence[Work]) -> list[Outcome]:
        key, place = program.key, program.place
        function = key.computation.function
        assert len(works) <= (key.bucket or 1)
        assert all(work.computation.function == function for work in works)
        self.running[place] += 1
        self.most_running = max(self.most_running, self.running[place])
        try:
            for _ in range(next(self._steps, 0)):
                await asyncio.sleep(0)
            numbers = [float(work.arrays[0]) for work in works]
            if min(numbers) < 0:
                raise ServiceError("EXECUTION_FAILED", "a number is negative")
            self.ran.update(numbers)
            power = POWERS[function]
            return [
                Outcome(OUTLINE, (np.array(number**power),), np.array(True), 0.0,
                        coalesced_count=len(works))
                for number in numbers
            ]  # fmt: skip
        finally:
            self.running[place] -= 1


@dataclass(frozen=True)
class Call:
    """A query: who asks what, when, and after how many steps he gives up.

    Attributes:
        pause: Steps of the event loop since the query before.
        patience: Steps until he leaves, as by a deadline; None for ever.
    """

    client: str
    kind: Computation
    is_bad: bool
    is_exact: bool
    pause: int
    patience: int | None


calls = st.builds(
    Call,
    client=st.sampled_from("abc"),
    kind=st.sampled_from(KINDS),
    is_bad=st.sampled_from([False] * 9 + [True]),
    is_exact=st.sampled_from([False] * 4 + [True]),
    pause=st.integers(0, 3),
    patience=st.none() | st.integers(0, 12),
)


async def ask(scheduler: Scheduler[Any], number: int, call: Call) -> Outcome:
    with scheduler.admitted(1, client=call.client) as ticket:
        sign = -1 if call.is_bad else 1
        array = np.array(float(sign * number))
        work = Work(call.kind, (array,), None, is_exact=call.is_exact)
        return await scheduler.submit(work, ticket)


async def leave(asking: "asyncio.Task[Outcome]", patience: int) -> None:
    for _ in range(patience):
        await asyncio.sleep(0)
    asking.cancel()


async def play(planned: list[Call], steps: list[int]) -> tuple[Executor, list[Any]]:
    executor = Executor(steps)
    scheduler = Scheduler(executor, slots=SLOTS, max_queries=10_000, max_bytes=10_000)
    for kind in KINDS:
        seconds = {rows: [1.0 + 0.1 * rows] for rows in (1, 2, 4, 8)}
        assert scheduler.gains.record(kind, seconds).largest == 8
    asking, leaving = [], []
    for number, call in enumerate(planned, start=1):
        for _ in range(call.pause):
            await asyncio.sleep(0)
        task = asyncio.create_task(ask(scheduler, number, call))
        asking.append(task)
        if call.patience is not None:
            leaving.append(asyncio.create_task(leave(task, call.patience)))
    answers = await asyncio.gather(*asking, return_exceptions=True)
    await asyncio.gather(*leaving)
    await scheduler.drain()
    return executor, answers


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(planned=st.lists(calls, max_size=40), steps=st.lists(st.integers(0, 6)))
def test_each_gets_its_own_answer_once(planned: list[Call], steps: list[int]) -> None:
    executor, answers = asyncio.run(asyncio.wait_for(play(planned, steps), 20))
    assert not executor.running.total()
    assert executor.most_running <= SLOTS
    assert all(count == 1 for count in executor.ran.values())
    for number, (call, answer) in enumerate(zip(planned, answers, strict=True), 1):
        if isinstance(answer, asyncio.CancelledError):
            assert call.patience is not None
        elif call.is_bad:
            assert isinstance(answer, ServiceError)
            assert answer.reason == "EXECUTION_FAILED"
        else:
            assert isinstance(answer, Outcome)
            assert answer.arrays[0] == number ** POWERS[call.kind.function]
            assert answer.coalesced_count == 1 or not call.is_exact


def test_the_game_has_runs_of_many() -> None:
    patient = [Call(client, KINDS[0], False, False, 0, None) for client in "abab" * 5]
    executor, answers = asyncio.run(play(patient, [9] * 9))
    assert [answer.coalesced_count for answer in answers] == [1, 1] + [8] * 16 + [2] * 2
    assert len(executor.ran) == 20
