"""A server that is killed at each step of each call: callers hear of it, and go on."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

import fault_functions
import jacserve
from jacserve.channels import EVALUATE_STREAM
from jacserve.framing import PIECE_BYTES
from jacserve.queries import QueryEncoder
from server_process import ServerProcess, server_process

FUNCTIONS = Path(fault_functions.__file__)
# Whoever waits for a server that is dead has to hear of it well before this.
PATIENCE_S = 30.0
POINT = np.arange(3.0)


class Home:
    """One address, and whichever server listens there."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        self._running = ExitStack()
        process = server_process(
            *(FUNCTIONS, "--port", str(self._port)), FAULT_FOLDER=str(self.folder)
        )
        self.server: ServerProcess = self._running.enter_context(process)
        self._stack.push(self._running)

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()
        self._running.close()

    def wait_until_held(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while not (self.folder / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.01)

    def let_go(self) -> None:
        (self.folder / "go").touch()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with ExitStack() as stack:
        yield Home(tmp_path, stack)


@pytest.fixture
def client(home: Home) -> Iterator[jacserve.Client]:
    with jacserve.Client(home.server.target) as connected:
        yield connected


def fails_soon(call: Callable[[], object]) -> None:
    start = time.monotonic()
    with pytest.raises(jacserve.UnavailableError):
        call()
    assert time.monotonic() - start < PATIENCE_S


def check(client: jacserve.Client) -> None:
    found = client.jacobian("square", POINT, timeout_s=PATIENCE_S)
    np.testing.assert_array_equal(found, np.diag(2 * POINT))


def recover(home: Home, client: jacserve.Client) -> None:
    """A new server at the address is found by the client that had the old one."""
    home.let_go()
    home.start()
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return check(client)
        except jacserve.UnavailableError:  # It may wait before it connects again.
            assert time.monotonic() < end
            time.sleep(0.1)


def test_before_a_call(home, client) -> None:
    check(client)
    home.kill()
    fails_soon(lambda: client.jacobian("square", POINT))
    recover(home, client)


def test_while_it_computes(home, client) -> None:
    with ThreadPoolExecutor(3) as pool, client.session() as session:
        waiting = [
            pool.submit(client.value, "held", POINT),
            pool.submit(session.value, "held", POINT),
            session.submit("held", POINT, quantities="value"),
        ]
        home.wait_until_held()
        home.kill()
        for future in waiting:
            fails_soon(lambda future=future: future.result(PATIENCE_S))
        recover(home, client)
        np.testing.assert_array_equal(
            session.jacobian("square", POINT), np.diag(2 * POINT)
        )


@pytest.mark.slow
def test_in_the_middle_of_a_query(home, client) -> None:
    ask = QueryEncoder().encode("square", np.ones(2 * PIECE_BYTES // 8), "value", {})
    half_way, killed = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        all_parts = iter(ask.to_parts())
        yield next(all_parts)
        yield next(all_parts)
        half_way.set()
        assert killed.wait(PATIENCE_S)
        yield from all_parts

    with grpc.insecure_channel(home.server.target) as channel:
        call = channel.stream_stream(EVALUATE_STREAM)(parts())
        assert half_way.wait(PATIENCE_S)
        home.kill()
        killed.set()
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    recover(home, client)


@pytest.mark.slow
def test_in_the_middle_of_an_answer(home, client) -> None:
    ask = QueryEncoder().encode("square", np.ones(2**24 // 8), "value", {})
    with grpc.insecure_channel(home.server.target) as channel:
        answers = iter(channel.stream_stream(EVALUATE_STREAM)(iter(ask.to_parts())))
        next(answers)  # Flow control holds back most of the rest.
        home.kill()
        with pytest.raises(grpc.RpcError) as raised:
            list(answers)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    recover(home, client)


@pytest.mark.slow
def test_in_the_middle_of_a_map(home, client) -> None:
    def batches() -> Iterator[np.ndarray]:
        for place in range(100):
            if place == 4:
                home.kill()
            yield np.full((8, 3), float(place))

    done = 0

    def pass_through() -> None:
        nonlocal done
        for place, result in enumerate(client.map("square", batches())):
            np.testing.assert_array_equal(result.value, np.full((8, 3), place**2.0))
            done += 1

    fails_soon(pass_through)
    assert done <= 4
    recover(home, client)
