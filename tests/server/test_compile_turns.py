import asyncio
import threading
from concurrent.futures import CancelledError
from contextlib import closing

import pytest

from jacserve_server.compile_turns import (
    CompileBudgets,
    CompileTurns,
    is_owners_alone,
    owner_of,
)
from jacserve_server.errors import ServiceError
from jacserve_server.single_flight import SingleFlight


def run(scenario, *budget) -> None:
    async def main() -> None:
        turns = CompileTurns(1, CompileBudgets(*budget))
        try:
            await asyncio.wait_for(scenario(turns), 20)
        finally:
            turns.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("client", "owner"),
    [
        ("", ""),
        ("token:ada", "token:ada"),
        ("token:ipv4:1.2.3.4:5", "token:ipv4:1.2.3.4:5"),
        ("ipv4:127.0.0.1:5123", "ipv4:127.0.0.1"),
        ("ipv6:%5B2001:db8::7:8:9:a%5D:5123", "ipv6:2001:db8::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5123", "ipv6:fe80::/64"),
        ("unix:", "unix:"),
    ],
)
def test_who_connects_again_is_the_same(client: str, owner: str) -> None:
    assert owner_of(client) == owner


def test_a_flood_of_one_does_not_hold_up_another() -> None:
    order: list[str] = []

    async def scenario(turns: CompileTurns) -> None:
        gate = threading.Event()
        first = turns.submit("ada", lambda: order.append(str(gate.wait(10))))
        flood = [turns.submit("ada", lambda: order.append("ada")) for _ in range(20)]
        other = turns.submit("bob", lambda: order.append("bob"))
        gate.set()
        await asyncio.gather(*map(asyncio.wrap_future, [first, *flood, other]))

    run(scenario)
    assert order.index("bob") <= 2


def test_one_client_has_no_more_waiting_than_it_may() -> None:
    async def scenario(turns: CompileTurns) -> None:
        gate = threading.Event()
        calls = [turns.submit("ada", lambda: gate.wait(10)) for _ in range(65)]
        with pytest.raises(ServiceError) as caught:
            turns.submit("ada", lambda: True)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s
        turns.submit("", lambda: True)
        # What nobody waits for any more makes room.
        assert calls[-1].cancel()
        more = turns.submit("ada", lambda: True)
        gate.set()
        assert await asyncio.wrap_future(more)

    run(scenario)


def test_a_budget_is_refilled_with_time() -> None:
    now = [0.0]

    async def scenario(turns: CompileTurns) -> None:
        def compile_for(seconds: float) -> None:
            threading.Event().wait(seconds)

        await asyncio.wrap_future(turns.submit("ada", lambda: compile_for(0.3)))
        with pytest.raises(ServiceError) as caught:
            turns.submit("ada", lambda: True)
        wait_s = caught.value.retry_after_s
        assert caught.value.reason == "COMPILE_BUDGET_SPENT"
        assert wait_s is not None
        # The others, and the server itself, have theirs.
        assert await asyncio.wrap_future(turns.submit("bob", lambda: True))
        assert await asyncio.wrap_future(turns.submit("", lambda: True))
        now[0] += wait_s - 2.0
        with pytest.raises(ServiceError):
            turns.submit("ada", lambda: True)
        now[0] += 2.0
        assert await asyncio.wrap_future(turns.submit("ada", lambda: True))

    run(scenario, 0.2, lambda: now[0])


def test_what_waits_when_a_budget_is_spent_is_not_begun() -> None:
    begun: list[str] = []

    async def scenario(turns: CompileTurns) -> None:
        gate = threading.Event()

        def compile_until() -> None:
            gate.wait(10)
            threading.Event().wait(0.3)

        first = turns.submit("ada", compile_until)
        flood = [turns.submit("ada", lambda: begun.append("ada")) for _ in range(20)]
        other = turns.submit("bob", lambda: begun.append("bob"))
        gate.set()
        await asyncio.gather(*map(asyncio.wrap_future, [first, other]))
        for each in flood:
            with pytest.raises(ServiceError) as caught:
                await asyncio.wrap_future(each)
            assert caught.value.reason == "COMPILE_BUDGET_SPENT"
        assert begun == ["bob"]

    run(scenario, 0.2)


def test_who_waits_for_an_entry_of_another_has_a_budget_of_its_own() -> None:
    async def scenario(turns: CompileTurns) -> None:
        cache = SingleFlight[str, str](
            turns.submit, capacity=9, is_owners_alone=is_owners_alone
        )
        gate = threading.Event()
        turns.submit("ada", lambda: gate.wait(10))
        asking = [
            asyncio.create_task(cache.get("entry", lambda: "made", owner))
            for owner in ("ada", "bob", "eve")
        ]
        await asyncio.sleep(0.3)
        gate.set()
        refused, *made = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(refused, Exception)
        assert is_owners_alone(refused)
        assert made == ["made"] * 2

    run(scenario, 0.2)


def test_one_budget_holds_for_all_who_compile() -> None:
    async def main() -> None:
        budgets, pause = CompileBudgets(0.2), threading.Event()
        with closing(CompileTurns(1, budgets)) as one:
            await asyncio.wrap_future(one.submit("ada", lambda: pause.wait(0.3)))
        with closing(CompileTurns(1, budgets)) as other:
            with pytest.raises(ServiceError, match=r"0.2 s in 3600 s"):
                other.submit("ada", lambda: True)

    asyncio.run(main())


def test_what_fails_spends_too_and_its_error_comes_back() -> None:
    def fail() -> None:
        threading.Event().wait(0.02)
        raise ValueError("no")

    async def scenario(turns: CompileTurns) -> None:
        with pytest.raises(ValueError, match="no"):
            await asyncio.wrap_future(turns.submit("ada", fail))
        with pytest.raises(ServiceError):
            turns.submit("ada", fail)

    run(scenario, 0.01)


def test_what_waits_is_cancelled_at_the_end() -> None:
    async def main() -> None:
        turns = CompileTurns(1)
        gate = threading.Event()
        turns.submit("ada", lambda: gate.wait(10))
        waiting = turns.submit("ada", lambda: True)
        turns.close()
        gate.set()
        with pytest.raises(CancelledError):
            waiting.result(10)

    asyncio.run(main())


async def filled(
    entries: list[str], *, capacity: int, share: int | None = None
) -> SingleFlight[str, str]:
    """Makes entries, each named by its owner and a number, such as "a1"."""
    turns = CompileTurns(1)
    cache = SingleFlight[str, str](turns.submit, capacity=capacity, share=share)
    for entry in entries:
        await cache.get(entry, lambda entry=entry: entry, entry[:-1])
    turns.close()
    return cache


@pytest.mark.parametrize(
    ("entries", "capacity", "share", "left"),
    [
        # Of one owner the oldest goes.
        (["a1", "a2", "a3"], 2, None, {"a2", "a3"}),
        # A share of its own bounds each, also where there is room.
        (["a1", "a2", "a3", "b1"], 9, 2, {"a2", "a3", "b1"}),
        # Whoever has the most loses first, whoever asks.
        (["a1", "a2", "a3", "b1"], 3, None, {"a2", "a3", "b1"}),
        (["b1", "a1", "a2", "a3", "a4"], 3, None, {"b1", "a3", "a4"}),
        # What belongs to the server goes last, and is not bounded by a share.
        (["1", "2", "a1", "a2", "a3"], 3, 2, {"1", "2", "a3"}),
        (["1", "2", "3"], 2, 1, {"2", "3"}),
    ],
)
def test_nobody_drives_out_all_that_others_have(
    entries: list[str], capacity: int, share: int | None, left: set[str]
) -> None:
    async def main() -> None:
        cache = await filled(entries, capacity=capacity, share=share)
        assert {entry for entry in entries if cache.has(entry)} == left

    asyncio.run(main())
