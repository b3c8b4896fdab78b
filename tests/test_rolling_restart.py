"""Two servers are restarted in turn, while clients call: nobody notices."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

import jacserve
from server_process import ServerProcess, server_process

FUNCTIONS = """
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()


@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x**2
"""
LARGE = 400  # Its Jacobian has more than 1 MiB, and so comes by a stream.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Servers:
    """Servers on ports of their own, of which any can be restarted."""

    def __init__(self, folder: Path, count: int) -> None:
        self._file = folder / "functions.py"
        self._file.write_text(FUNCTIONS)
        self._folder = folder
        self._ports = [free_port() for _ in range(count)]
        self.targets = [f"127.0.0.1:{port}" for port in self._ports]
        self._running = [self._start(place) for place in range(count)]

    def _start(self, place: int) -> tuple[ServerProcess, ExitStack]:
        stack = ExitStack()
        process = server_process(
            *(self._file, "--port", str(self._ports[place])),
            JACSERVE_JOBS_DIR=str(self._folder / f"jobs-{place}"),
        )
        return stack.enter_context(process), stack

    def restart(self, place: int) -> None:
        """Ends a server as its supervisor would, and starts it until it listens."""
        server, stack = self._running[place]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0, server.errors()
        stack.close()
        self._running[place] = self._start(place)

    def close(self) -> None:
        for _, stack in self._running:
            stack.close()


@contextmanager
def running(folder: Path, count: int = 2) -> Generator[Servers]:
    servers = Servers(folder, count)
    try:
        yield servers
    finally:
        servers.close()


def points() -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    while True:
        yield random.normal(size=3)


def check(x: np.ndarray, jac: np.ndarray) -> None:
    np.testing.assert_allclose(jac, 2 * np.diag(x), rtol=1e-14)


class Callers:
    """Well-behaved clients, each of which calls in a thread of its own."""

    def __init__(self, targets: list[str]) -> None:
        self._targets = targets
        self._stop = threading.Event()
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []
        self._threads: list[threading.Thread] = []
        for call in (self.single, self.session, self.streamed, self.mapped, self.aio):
            self.counts[call.__name__] = 0
            self._threads.append(threading.Thread(target=self._run, args=(call,)))
            self._threads[-1].start()

    def _run(self, call: Callable[[Callable[[], bool]], None]) -> None:
        name = call.__name__

        def goes_on() -> bool:
            self.counts[name] += 1
            return not self._stop.is_set()

        try:
            call(goes_on)
        except BaseException as error:
            self.failures.append(f"{name} after {self.counts[name]} calls: {error!r}")

    def single(self, goes_on: Callable[[], bool]) -> None:
        with jacserve.Client(self._targets) as client:
            for x in points():
                check(x, client.jacobian("square", x))
                if not goes_on():
                    return

    def session(self, goes_on: Callable[[], bool]) -> None:
        with jacserve.Client(self._targets) as client, client.session() as session:
            for x in points():
                future = session.submit("square", x, quantities="jacobian")
                check(x, session.jacobian("square", x))
                check(x, future.result(timeout=60).jacobian)
                if not goes_on():
                    return

    def streamed(self, goes_on: Callable[[], bool]) -> None:
        x = np.linspace(1.0, 2.0, LARGE)
        with jacserve.Client(self._targets) as client:
            while goes_on():
                check(x, client.jacobian("square", x))

    def mapped(self, goes_on: Callable[[], bool]) -> None:
        def batches() -> Iterator[np.ndarray]:
            while goes_on():
                asked.append(np.random.default_rng(len(asked)).normal(size=(4, 3)))
                yield asked[-1]

        asked: list[np.ndarray] = []
        with jacserve.Client(self._targets) as client:
            found = client.map("square", batches(), quantities="jacobian")
            for place, result in enumerate(found):
                for x, jac in zip(asked[place], result.jacobian, strict=True):
                    check(x, jac)

    def aio(self, goes_on: Callable[[], bool]) -> None:
        async def call() -> None:
            async with jacserve.AsyncClient(self._targets) as client:
                for x in points():
                    first, second = await asyncio.gather(
                        client.jacobian("square", x), client.jacobian("square", 2 * x)
                    )
                    check(x, first)
                    check(2 * x, second)
                    if not goes_on():
                        return

        asyncio.run(call())

    def await_progress(self, calls: int = 5) -> None:
        """Waits until each has got further."""
        before, deadline = dict(self.counts), time.monotonic() + 60
        while time.monotonic() < deadline and not self.failures:
            if all(self.counts[x] >= before[x] + calls for x in before):
                return
            time.sleep(0.02)
        raise AssertionError((before, self.counts, self.failures))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()


def restarted(folder: Path, rounds: int) -> Callers:
    with running(folder) as servers:
        callers = Callers(servers.targets)
        try:
            callers.await_progress()
            for _ in range(rounds):
                for place in range(2):
                    # At once when the other one listens, before all clients know.
                    servers.restart(place)
            callers.await_progress()
        finally:
            callers.stop()
    return callers


@pytest.mark.slow
def test_a_rolling_restart_fails_no_call(tmp_path: Path) -> None:
    callers = restarted(tmp_path, rounds=1)
    assert callers.failures == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_rolling_restarts_fail_no_call(tmp_path: Path) -> None:
    callers = restarted(tmp_path, rounds=5)
    assert callers.failures == []
    assert min(callers.counts.values()) > 50, callers.counts
