import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jacserve_server.single_flight import SingleFlight


def run(scenario, threads: int = 1, capacity: int = 2) -> None:
    async def limited(pool: ThreadPoolExecutor) -> None:
        cache = SingleFlight[str, str](
            lambda _, make: pool.submit(make), capacity=capacity
        )
        await asyncio.wait_for(scenario(cache), 10)

    with ThreadPoolExecutor(threads) as pool:
        asyncio.run(limited(pool))


def test_an_entry_is_made_once_for_all_who_ask() -> None:
    made: list[str] = []
    gate = threading.Event()

    def make() -> str:
        gate.wait(10)
        made.append("a")
        return "A"

    async def scenario(cache: SingleFlight[str, str]) -> None:
        asking = [asyncio.create_task(cache.get("a", make)) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert cache.ready("a") is None
        gate.set()
        assert await asyncio.gather(*asking) == ["A"] * 5
        assert cache.ready("a") == "A"
        assert made == ["a"]

    run(scenario)


def test_what_has_begun_is_finished_for_the_next() -> None:
    begun, gate = threading.Event(), threading.Event()

    def make() -> str:
        begun.set()
        gate.wait(10)
        return "A"

    async def scenario(cache: SingleFlight[str, str]) -> None:
        asking = asyncio.create_task(cache.get("a", make))
        await asyncio.to_thread(begun.wait, 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        gate.set()
        assert await cache.get("a", lambda: pytest.fail("made again")) == "A"

    run(scenario)


def test_what_nobody_waits_for_is_not_begun() -> None:
    gate = threading.Event()
    made: list[str] = []

    async def scenario(cache: SingleFlight[str, str]) -> None:
        first = asyncio.create_task(cache.get("a", lambda: str(gate.wait(10))))
        second, third = (
            asyncio.create_task(cache.get("b", lambda: made.append("b") or "B"))
            for _ in range(2)
        )
        fourth = asyncio.create_task(cache.get("c", lambda: made.append("c") or "C"))
        await asyncio.sleep(0.05)
        second.cancel()  # The third still waits for b.
        fourth.cancel()
        await asyncio.gather(second, fourth, return_exceptions=True)
        # Asking again at once does not find the cancelled one.
        again = asyncio.create_task(cache.get("c", lambda: made.append("d") or "D"))
        gate.set()
        assert await asyncio.gather(first, third, again) == ["True", "B", "D"]
        assert made == ["b", "d"]

    run(scenario)


def test_a_failure_reaches_all_and_is_not_kept() -> None:
    async def scenario(cache: SingleFlight[str, str]) -> None:
        asking = [cache.get("a", lambda: str(1 // 0)) for _ in range(3)]
        failed = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(error) for error in failed] == [ZeroDivisionError] * 3
        assert await cache.get("a", lambda: "A") == "A"

    run(scenario)


def test_the_least_recently_used_goes_first() -> None:
    async def scenario(cache: SingleFlight[str, str]) -> None:
        for key in "ab":
            await cache.get(key, key.upper)
        assert cache.ready("a") == "A"
        await cache.get("c", "c".upper)
        await asyncio.sleep(0)
        assert [cache.ready(key) for key in "abc"] == ["A", None, "C"]

    run(scenario)


def test_what_waits_to_be_made_drives_out_nothing() -> None:
    gate = threading.Event()

    async def scenario(cache: SingleFlight[str, str]) -> None:
        await cache.get("a", "a".upper)
        asking = [
            asyncio.create_task(cache.get(key, lambda: str(gate.wait(10))))
            for key in "cdef"
        ]
        await cache.get("b", "b".upper)
        await asyncio.sleep(0)
        assert [cache.ready(key) for key in "ab"] == ["A", "B"]
        gate.set()
        await asyncio.gather(*asking)

    run(scenario, threads=2)
