"""Batch after batch, by either client: in order, and never more than a few at once."""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve.results import Result
from jacserve_server import Registry, serving
from server_process import server_process
from test_streams import SERVED, memory_of

registry = Registry()


def wait_a_little(x: np.ndarray) -> np.ndarray:
    time.sleep(float(x.ravel()[0]) * 1e-3)
    return np.asarray(x, x.dtype)


@registry.function
def naps(ms: Float[Array, "1"], x: Float[Array, "1"]) -> Float[Array, "1"]:
    """Takes so many milliseconds."""
    return x + 0.0 * jax.pure_callback(wait_a_little, ms, ms, vmap_method="sequential")


@registry.function
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2.0 * x


@pytest.fixture(scope="module")
def target() -> Generator[str]:
    with serving(registry) as server:
        yield server.target


# Maps by one of the clients; the test takes what it wants of the results.
Mapper = Callable[..., Iterator[Result]]


def mapped(target: str, **options: Any) -> Iterator[Result]:
    with jacserve.Client(target, timeout_s=30.0) as client:
        yield from client.map(**options)


def mapped_async(target: str, **options: Any) -> Iterator[Result]:
    """The asyncio client's, pulled by hand."""
    with asyncio.Runner() as runner:
        client = None

        async def connected() -> tuple[Any, Any]:
            client = jacserve.AsyncClient(target, timeout_s=30.0)
            return client, client.map(**options)

        client, results = runner.run(connected())
        try:
            while True:
                try:
                    yield runner.run(anext(results))
                except StopAsyncIteration:
                    return
        finally:

            async def close() -> None:
                await results.aclose()
                await client.close()

            runner.run(close())


both = pytest.mark.parametrize("mapper", [mapped, mapped_async])


class Source:
    """Batches, and how far ahead of the results they were pulled."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.pulled = 0
        self._count = count
        self._fail_at = fail_at

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self._count):
            if number == self._fail_at:
                raise KeyError("the source is dry")
            self.pulled += 1
            yield np.full(3, float(number))


@both
@pytest.mark.parametrize("window", [1, 2, 7])
def test_results_come_in_order_whatever_takes_longest(
    target: str, mapper: Mapper, window: int
) -> None:
    random = np.random.default_rng(0)
    batches = [
        (np.array([ms]), np.array([1.0 * n]))
        for n, ms in enumerate(random.uniform(0, 8, size=25))
    ]
    results = mapper(
        target, function="naps", batches=batches, quantities="value", window=window
    )
    assert [result.value[0] for result in results] == list(range(25))


@both
@pytest.mark.parametrize("window", [1, 3])
def test_batches_are_pulled_as_results_are(
    target: str, mapper: Mapper, window: int
) -> None:
    source = Source(20)
    results = mapper(
        target, function="double", batches=source, quantities="value", window=window
    )
    assert source.pulled == 0
    for taken, result in enumerate(results, 1):
        assert result.value[0] == 2.0 * (taken - 1)
        # Those on their way, and one in hand.
        assert source.pulled <= taken + window
    assert source.pulled == 20


@both
def test_no_more_than_the_window_is_pulled_ahead(target: str, mapper: Mapper) -> None:
    source = Source(20)
    results = mapper(
        target, function="double", batches=source, quantities="value", window=1
    )
    next(results)
    assert source.pulled <= 1 + 1 - 1


@both
def test_nothing_comes_of_nothing(target: str, mapper: Mapper) -> None:
    assert list(mapper(target, function="double", batches=[])) == []
    assert list(mapper(target, function="absent", batches=iter(()))) == []


@both
def test_an_error_comes_where_its_result_would(target: str, mapper: Mapper) -> None:
    batches = [np.ones(3), np.ones(3), np.ones((1, 1, 3)), np.ones(3)]
    results = mapper(
        target, function="double", batches=batches, quantities="value", window=4
    )
    assert next(results).value[0] == 2.0
    assert next(results).value[0] == 2.0
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        next(results)
    assert caught.value.reason == "SHAPE_MISMATCH"
    assert list(results) == []


@both
def test_a_source_that_fails_does_so_after_what_came_before(
    target: str, mapper: Mapper
) -> None:
    source = Source(10, fail_at=3)
    results = mapper(
        target, function="double", batches=source, quantities="value", window=2
    )
    taken: list[float] = []

    def take() -> None:
        taken.extend(result.value[0] for result in results)

    with pytest.raises(KeyError, match="dry"):
        take()
    assert taken == [0.0, 2.0, 4.0]


@both
def test_a_source_that_fails_is_heard(target: str, mapper: Mapper) -> None:
    source = Source(10, fail_at=0)
    with pytest.raises(KeyError, match="dry"):
        list(mapper(target, function="double", batches=source))


def test_a_window_of_nothing_is_refused(target: str) -> None:
    with jacserve.Client(target) as client, pytest.raises(ValueError, match="is 0"):
        list(client.map("double", [], window=0))


def test_a_window_of_nothing_is_refused_at_once(target: str) -> None:
    with jacserve.Client(target) as client, pytest.raises(ValueError, match="is 0"):
        client.map("double", [], window=0)


def test_who_leaves_half_way_leaves_no_threads(target: str) -> None:
    source = Source(1000)
    with jacserve.Client(target) as client:
        results: Any = client.map("double", source, quantities="value", window=4)
        for _ in range(5):
            next(results)
        results.close()
        pulled = source.pulled
        assert pulled <= 9
        deadline = time.monotonic() + 5
        while any(t.name.startswith("jacserve-map") for t in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert source.pulled == pulled
        # Dropped instead of closed.
        for _ in range(3):
            next(client.map("double", Source(10), quantities="value"))
        while any(t.name.startswith("jacserve-map") for t in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_leaves_half_way_leaves_no_calls(target: str) -> None:
    batches = [(np.array([ms]), np.ones(1)) for ms in (0.0, 2000.0)]
    with jacserve.Client(target) as client:
        list(client.map("naps", batches[:1], quantities="value"))
        results: Any = client.map("naps", batches * 2, quantities="value")
        next(results)
        results.close()
        time.sleep(0.2)
        assert not [
            t.name for t in threading.enumerate() if t.name.startswith("jacserve-map")
        ]


def test_who_leaves_an_async_map_leaves_no_tasks(target: str) -> None:
    source = Source(1000)

    async def scenario() -> None:
        async with jacserve.AsyncClient(target) as client:
            results: Any = client.map("double", source, quantities="value", window=4)
            for _ in range(5):
                await anext(results)
            await results.aclose()
            pulled = source.pulled
            assert pulled <= 9
            await asyncio.sleep(0.1)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert source.pulled == pulled
            assert (await client.value("double", np.ones(3)))[0] == 2.0

    asyncio.run(scenario())


def test_two_errors_of_an_async_map_are_one(
    target: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = (np.array([200.0]), np.ones(1)), (np.ones(2), np.ones(2))

    async def scenario() -> None:
        async with jacserve.AsyncClient(target) as client:
            results = client.map("naps", [good, bad, bad], quantities="value", window=3)
            assert (await anext(results)).value[0] == 1.0
            with pytest.raises(jacserve.InvalidRequestError):
                await anext(results)

    with caplog.at_level(logging.ERROR, "asyncio"):
        asyncio.run(scenario())
        gc.collect()
    assert "never retrieved" not in caplog.text


def test_an_async_map_takes_async_iterables(target: str) -> None:
    async def batches() -> AsyncIterator[np.ndarray]:
        for number in range(10):
            await asyncio.sleep(0.001)
            yield np.full(3, float(number))

    async def scenario() -> list[float]:
        async with jacserve.AsyncClient(target) as client:
            results = client.map("double", batches(), quantities="value", window=3)
            return [result.value[0] async for result in results]

    assert asyncio.run(scenario()) == [2.0 * number for number in range(10)]


def test_options_reach_every_batch(target: str) -> None:
    with jacserve.Client(target) as client:
        with pytest.raises(TypeError, match="no option colour"):
            list(client.map("double", [np.ones(3)], colour="red"))  # type: ignore[call-arg]
        slow = [(np.array([500.0]), np.ones(1))]
        list(client.map("naps", slow, quantities="value"))
        with pytest.raises(jacserve.DeadlineError):
            list(client.map("naps", slow, quantities="value", timeout_s=0.1))


def test_any_number_of_points_passes_through_a_bounded_memory() -> None:
    """40 batches of 8 MiB, and the answers: 640 MiB."""
    with server_process(SERVED) as server:
        batch = np.ones(2**20)
        with jacserve.Client(server.target, timeout_s=60.0) as client:
            pid, sizes = server.process.pid, list[float]()
            for _ in client.map("double", [batch] * 15, quantities="value"):
                pass
            for result in client.map("double", [batch] * 40, quantities="value"):
                sizes.append(memory_of(pid))
                assert result.value[0] == 2.0
    print("MiB:", min(sizes), max(sizes))
    assert max(sizes) - sizes[0] < 100
