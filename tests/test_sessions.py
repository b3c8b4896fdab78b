"""Sessions, as the contract has them and as the client offers them."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import (
    CancelledError,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.rpc import (  # pyright: ignore[reportMissingTypeStubs]
    error_details_pb2,
    status_pb2,
)
from jaxtyping import Array, Float

import jacserve
from jacserve import framing, tensors
from jacserve.channels import SESSION
from jacserve.errors import translated
from jacserve.session import Session
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server import Registry, serving, sessions
from jacserve_server.callers import SCOPES, Call, Caller
from server_process import server_process

registry = Registry()
release = threading.Event()
# How often `patient` has begun, and with what.
begun = SimpleQueue[float]()
started = SimpleQueue[float]()


ended = SimpleQueue[float]()


def wait_for_release(x: np.ndarray) -> np.ndarray:
    begun.put(float(x.ravel()[0]))
    started.put(0.0)
    try:
        assert release.wait(30)
    finally:
        ended.put(0.0)
    return x


@registry.function
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2.0 * x


@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x * x


@registry.function
def patient(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Runs until it is told to stop."""
    return jax.pure_callback(wait_for_release, x, x, vmap_method="sequential")


@registry.function
def slow(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Takes some milliseconds, and so a thread of the device."""
    y = jax.pure_callback(lambda v: (time.sleep(0.003), v)[1], x, x)
    return y + 1.0


@registry.function
def sleepy(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Takes a second."""
    return jax.pure_callback(lambda v: (time.sleep(1.0), v)[1], x, x)


@registry.function
def root(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sqrt(x)


@pytest.fixture(scope="module")
def target() -> Generator[str]:
    with serving(registry, device_threads=2, max_queries=200) as server:
        yield server.target


@pytest.fixture(autouse=True)
def patience() -> Generator[None]:
    release.clear()
    while not begun.empty():
        begun.get()
    yield
    release.set()
    quiet = 0
    while quiet < 3:  # What a test has left in the queue of the device ends, too.
        time.sleep(0.01)
        quiet = quiet + 1 if started.qsize() == ended.qsize() else 0


@pytest.fixture
def client(target: str) -> Generator[jacserve.Client]:
    with jacserve.Client(target) as connected:
        yield connected
        release.set()


new_query: Any = pb.Query
X = np.array([1.0, 2.0, 3.0])


def query_of(
    function: str = "double", x: np.ndarray = X, quantity: int = 1, **more: Any
) -> pb.Query:
    query = new_query(function=function, quantities=[quantity], **more)
    tensors.encode_into(query.inputs.add().tensor, x)
    return query


class RawSession:
    """A session by protobuf alone."""

    def __init__(self, channel: grpc.Channel, target: str) -> None:
        self._target = target
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        method: Any = channel.stream_stream(SESSION)
        self.call = method(iter(self._requests.get, None), timeout=60)

    def send(self, id_: int, query: pb.Query, timeout_s: float | None = None) -> None:
        request = pb.SessionRequest(id=id_, query=query)
        if timeout_s is not None:
            request.timeout.FromMilliseconds(int(timeout_s * 1000))
        self.send_raw(request.SerializeToString())

    def cancel(self, id_: int) -> None:
        self.send_raw(pb.SessionRequest(id=id_, cancel=True).SerializeToString())

    def send_raw(self, raw: bytes) -> None:
        self._requests.put(raw)

    def half_close(self) -> None:
        self._requests.put(None)

    def answer(self) -> pb.SessionResponse:
        with translated(self._target):
            return pb.SessionResponse.FromString(next(self.call))

    def rest(self) -> list[pb.SessionResponse]:
        with translated(self._target):
            return [pb.SessionResponse.FromString(raw) for raw in self.call]


@contextmanager
def raw_session(target: str) -> Generator[RawSession]:
    with grpc.insecure_channel(target) as channel:
        session = RawSession(channel, target)
        try:
            yield session
        finally:
            session.half_close()
            session.call.cancel()


@pytest.fixture
def raw(client: jacserve.Client, target: str) -> Generator[RawSession]:
    del client
    with raw_session(target) as session:
        yield session
        release.set()


def value_of(answer: pb.SessionResponse) -> list[float]:
    assert answer.WhichOneof("answer") == "result", answer.error
    return np.frombuffer(answer.result.outputs[0].tensor.data).tolist()


def reason_of(answer: pb.SessionResponse) -> str:
    assert answer.WhichOneof("answer") == "error"
    for detail in answer.error.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            assert info.domain == "jacserve"
            return info.reason
    return ""


def occupy(raw: RawSession, count: int = 2, first: int = 1000) -> None:
    """Keeps the device busy until `release` is set."""
    for id_ in range(first, first + count):
        raw.send(id_, query_of("patient", np.full(3, float(id_))))
        begun.get(timeout=30)


# --- The contract ---------------------------------------------------------------------


def test_answers_carry_their_ids_and_may_overtake(raw: RawSession) -> None:
    raw.send(2**64 - 1, query_of("patient"))
    begun.get(timeout=30)
    for id_ in (0, 7, 2**63):
        raw.send(id_, query_of(x=X + id_ % 10))
        answer = raw.answer()
        assert answer.id == id_
        assert value_of(answer) == (2 * (X + id_ % 10)).tolist()
    release.set()
    answer = raw.answer()
    assert answer.id == 2**64 - 1
    assert value_of(answer) == X.tolist()


def test_the_answer_to_one_is_that_of_evaluate(raw: RawSession, target: str) -> None:
    raw.send(1, query_of(quantity=2))
    answer = raw.answer()
    assert answer.result.function == "functions/double@1"
    assert answer.result.outputs[0].quantity == pb.QUANTITY_JACOBIAN
    assert answer.result.finite
    assert answer.result.coalesced_count >= 1
    with jacserve.Client(target) as client:
        jac = client.jacobian("double", X)
    assert answer.result.outputs[0].tensor.data == jac.tobytes()


def test_an_error_does_not_end_the_stream(raw: RawSession) -> None:
    expected = [
        (query_of("absent"), 5, "FUNCTION_NOT_FOUND"),
        (pb.Query(), 3, "MALFORMED_REQUEST"),
        (query_of(x=X[None, None]), 3, "SHAPE_MISMATCH"),
        (query_of("root", -X, require_finite=True), 9, "RESULT_NOT_FINITE"),
        (query_of(x=np.ones(2**9), quantity=2), 9, "STREAM_REQUIRED"),
        (query_of(patterns=["abc"]), 9, "PATTERN_UNKNOWN"),
    ]
    for id_, (query, code, reason) in enumerate(expected):
        raw.send(id_, query)
        answer = raw.answer()
        assert (answer.id, answer.error.code) == (id_, code)
        assert reason_of(answer) == reason
        assert answer.error.message
    raw.send(99, query_of())
    assert value_of(raw.answer()) == (2 * X).tolist()


def test_a_query_that_is_noise_is_answered_with_an_error(raw: RawSession) -> None:
    for noise in (b"\xff" * 9, b"\x0a\x03abc\x12", b""):
        head = pb.SessionRequest(id=5).SerializeToString()
        raw.send_raw(head + framing.bytes_field(15, len(noise)) + noise)
        assert reason_of(raw.answer()) == "MALFORMED_REQUEST"
    raw.send(6, query_of())
    assert raw.answer().id == 6


def test_an_id_in_flight_can_not_be_used_again(raw: RawSession) -> None:
    occupy(raw, 1)
    raw.send(1000, query_of())
    with pytest.raises(jacserve.InvalidRequestError, match="id 1000") as caught:
        raw.answer()
    assert caught.value.reason == "STREAM_BROKEN"


def test_an_id_can_be_used_again_after_its_answer(raw: RawSession) -> None:
    for turn in range(3):
        for function in ("double", "slow"):
            raw.send(1, query_of(function, X + turn))
            assert raw.answer().id == 1


@pytest.mark.parametrize(
    "noise", [b"\xff" * 20, b"\x08", b"\x7a\x05abc", b"\x12\x02\x08", b"\x0b\x0c"]
)
def test_a_garbled_message_breaks_the_stream(raw: RawSession, noise: bytes) -> None:
    raw.send_raw(noise)
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        raw.answer()
    assert caught.value.reason == "STREAM_BROKEN"


def test_tiny_fields_hold_nobody_up(raw: RawSession) -> None:
    raw.send_raw(b"\x30\x01" * 2**19)
    start = time.monotonic()
    with suppress(jacserve.JacobianError):
        raw.answer()
    assert time.monotonic() - start < 0.3


def test_a_cancelled_query_is_never_begun(raw: RawSession) -> None:
    occupy(raw)
    for id_ in range(10):
        raw.send(id_, query_of("patient", np.full(3, float(id_))))
    for id_ in range(1, 10):
        raw.cancel(id_)
    raw.cancel(12345)  # There is none; it does no harm.
    answers = [raw.answer() for _ in range(9)]
    assert {answer.id for answer in answers} == set(range(1, 10))
    assert {answer.error.code for answer in answers} == {1}
    release.set()
    assert {raw.answer().id for _ in range(3)} == {0, 1000, 1001}
    assert begun.get(timeout=30) == 0.0
    assert begun.empty()
    raw.cancel(0)  # It has its answer.
    raw.send(0, query_of())
    assert raw.answer().id == 0


def test_a_timeout_is_the_querys_own(raw: RawSession) -> None:
    occupy(raw)
    for id_ in range(5):
        raw.send(id_, query_of("patient", np.full(3, float(id_))), timeout_s=0.2)
    start = time.monotonic()
    answers = [raw.answer() for _ in range(5)]
    assert time.monotonic() - start < 5
    assert {answer.id for answer in answers} == set(range(5))
    assert {answer.error.code for answer in answers} == {4}  # DEADLINE_EXCEEDED
    release.set()
    assert {raw.answer().id for _ in range(2)} == {1000, 1001}
    assert begun.empty()


@pytest.mark.parametrize("seconds", [2**62, 315_576_000_000, -1, -(2**62)])
def test_absurd_timeouts(raw: RawSession, seconds: int) -> None:
    request = pb.SessionRequest(id=1, query=query_of("slow"))
    request.timeout.seconds = seconds
    raw.send_raw(request.SerializeToString())
    answer = raw.answer()
    assert answer.error.code == (0 if seconds > 0 else 4)


def test_more_than_a_session_may_have_are_held_back(raw: RawSession) -> None:
    count = 150
    for id_ in range(count):
        raw.send(id_, query_of("patient", np.full(3, float(id_))))
    begun.get(timeout=30)
    time.sleep(0.3)
    release.set()
    answers = [raw.answer() for _ in range(count)]
    assert sorted(answer.id for answer in answers) == list(range(count))
    for answer in answers:
        assert value_of(answer) == [float(answer.id)] * 3


def test_a_full_session_can_still_be_told_to_cancel(raw: RawSession) -> None:
    for id_ in range(64):
        raw.send(id_, query_of("patient", np.full(3, float(id_))))
    for _ in range(2):
        begun.get(timeout=30)
    raw.cancel(63)
    first: Future[pb.SessionResponse] = Future()
    threading.Thread(target=lambda: first.set_result(raw.answer()), daemon=True).start()
    try:
        assert first.result(timeout=2).id == 63
    finally:
        release.set()
        first.result(timeout=30)


def test_a_half_close_waits_for_what_is_pending(raw: RawSession) -> None:
    for id_ in range(20):
        raw.send(id_, query_of("slow", np.full(3, float(id_))))
    raw.half_close()
    answers = raw.rest()
    assert sorted(answer.id for answer in answers) == list(range(20))


def test_an_empty_session(raw: RawSession) -> None:
    raw.half_close()
    assert raw.rest() == []


class SlowAnswerer:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.events: dict[bytes, asyncio.Event] = {}

    def begun(self) -> Call:
        return Call("Session", Caller("", SCOPES, ""), "", 0.0)

    def answer_now(self, raw: bytes, call: Call) -> bytes | None:
        return raw if raw.startswith(b"brief") else None

    async def answer(self, raw: bytes, call: Call) -> bytes:
        await self.events.setdefault(raw, asyncio.Event()).wait()
        return raw

    def answered(self, call: Call) -> None:
        pass

    def failed(self, call: Call, error: BaseException) -> bytes:
        raise AssertionError from error


def request(id_: int, query: bytes) -> bytes:
    head = pb.SessionRequest(id=id_).SerializeToString()
    return head + framing.bytes_field(15, len(query)) + query


async def answered_in_spite_of_a_slow_reader(*, brief: bool, half_close: bool) -> int:
    """Ends the last query while the answer to another is being written."""
    answerer = SlowAnswerer()
    more = asyncio.Event()

    async def requests() -> AsyncIterator[bytes]:
        yield request(1, b"one")
        yield request(2, b"brief two" if brief else b"two")
        if not half_close:
            await more.wait()

    count = 0

    async def read() -> None:
        nonlocal count
        async for _ in sessions.Session(answerer).answers(requests()):
            count += 1
            for event in answerer.events.values():
                event.set()
            await asyncio.sleep(0.05)  # While gRPC writes it.

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    answerer.events[b"one"].set()
    await asyncio.sleep(0.3)
    more.set()
    await asyncio.wait_for(reading, 5)
    return count


def test_answers_are_not_lost_while_another_is_written() -> None:
    problem = "an answer that is ready while another is written, and none is pending"
    lost = [
        (brief, half_close)
        for brief in (False, True)
        for half_close in (False, True)
        if asyncio.run(
            answered_in_spite_of_a_slow_reader(brief=brief, half_close=half_close)
        )
        != 2
    ]
    assert not lost, problem


def test_a_client_that_waits_for_each_answer_gets_it(target: str, client) -> None:
    """As in the test before, over the wire: no request comes to stir the server."""
    del client
    with raw_session(target) as raw:
        for turn in range(150):
            for id_ in range(3):
                raw.send(id_, query_of("slow" if id_ else "double", X + turn))
            got: Future[list[int]] = Future()

            def collect(got: Future[list[int]] = got) -> None:
                try:
                    got.set_result([raw.answer().id for _ in range(3)])
                except Exception as error:
                    got.set_exception(error)

            threading.Thread(target=collect, daemon=True).start()
            assert sorted(got.result(timeout=10)) == [0, 1, 2], turn


# --- Servers that go, and clients that go ---------------------------------------------


def test_an_idle_session_does_not_hold_up_a_shutdown() -> None:
    with serving(registry, grace_s=20.0) as server:
        client = jacserve.Client(server.target)
        session = client.session()
        assert session.value("double", X)[0] == 2.0
        port = int(server.target.rpartition(":")[2])
        start = time.monotonic()
    assert time.monotonic() - start < 5
    with pytest.raises(jacserve.UnavailableError):
        session.value("double", X)
    with serving(registry, port=port):
        deadline = time.monotonic() + 20
        while True:
            try:
                assert session.value("square", X)[2] == 9.0
                break
            except jacserve.UnavailableError:
                assert time.monotonic() < deadline
    session.close()
    client.close()


def left_alone(session: Session) -> None:
    """Ends a session that may never be told that it has ended."""
    if (stream := session._stream) is not None:
        stream._call.cancel()
    session.close()


def test_who_waits_while_the_server_goes_is_told() -> None:
    with serving(registry, grace_s=0.3) as server:
        client = jacserve.Client(server.target)
        session = client.session()
        session.value("double", X)
        future = session.submit("patient", X, quantities="value")
        begun.get(timeout=30)
    try:
        assert isinstance(future.exception(timeout=3), jacserve.UnavailableError)
    finally:
        release.set()
        left_alone(session)
        client.close()


LEFT = """
import sys, numpy as np, jacserve
client = jacserve.Client(sys.argv[1])
session = client.session()
if sys.argv[2] == "later":
    session.value("double", np.ones(3))
future = session.submit("sleepy", np.ones(3), quantities="value")
print("submitted", flush=True)
error = future.exception()
print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize(
    "when",
    [
        "later",
        "at first",
    ],
)
def test_a_client_is_told_when_its_server_is_killed(when: str) -> None:
    with server_process(Path(__file__)) as server:
        command = [sys.executable, "-c", LEFT, server.target, when]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "submitted\n"
            time.sleep(0.2)
            server.process.kill()
            try:
                process.wait(4)
            finally:
                process.kill()
            assert process.stdout.read() == "UnavailableError\n"


def test_a_drained_query_of_a_session_has_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JACSERVE_GRACE_S", "10")
    with server_process(Path(__file__)) as server:
        with jacserve.Client(server.target, timeout_s=30.0) as client:
            session = client.session()
            session.value("sleepy", X)
            future = session.submit("sleepy", X, quantities="value")
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            assert future.result(timeout=10).value.tolist() == X.tolist()


KILLED = """
import sys, numpy as np, os, threading, jacserve
client = jacserve.Client(sys.argv[1])
session = client.session()
futures = [session.submit("slow", np.ones(3), quantities="value") for _ in range(60)]
threading.Timer(0.05, lambda: os.kill(os.getpid(), 9)).start()
while True:
    session.submit("slow", np.ones(3), quantities="value")
"""


def test_a_client_that_is_killed_frees_its_places() -> None:
    with serving(registry, max_queries=200) as server:
        for _ in range(2):
            command = [sys.executable, "-c", KILLED, server.target]
            with subprocess.Popen(command) as process:
                assert process.wait(60) == -signal.SIGKILL
        with jacserve.Client(server.target) as client, client.session() as session:
            time.sleep(0.5)
            submitted = [
                session.submit("slow", X, quantities="value") for _ in range(25)
            ]
            assert all(f.result(timeout=30).value[0] == 2.0 for f in submitted)


# --- The client's session -------------------------------------------------------------


def test_threads_share_a_session_and_each_gets_its_own(client) -> None:
    """Inputs say which query an answer belongs to, whatever else is going on."""
    outcomes: Counter[str] = Counter()
    with client.session(window=20) as session:
        session.value("slow", X)  # Compiled.

        def work(seed: int) -> None:
            chance = random.Random(seed)
            submitted: list[tuple[float, str, Future[jacserve.Result]]] = []
            for turn in range(60):
                mark = float(seed * 1000 + turn)
                x = np.full(chance.choice([1, 3]), mark)
                function = chance.choice(["double", "slow", "root", "square", "absent"])
                timeout_s = chance.choice([None, None, 60.0, 0.001])
                ask = chance.choice([session.evaluate, session.submit])
                try:
                    got: Any = ask(function, x, quantities="value", timeout_s=timeout_s)
                    if isinstance(got, Future):
                        submitted.append((mark, function, got))
                        if chance.random() < 0.3:
                            time.sleep(chance.random() * 0.003)
                            got.cancel()
                    else:
                        check(function, mark, got)
                        outcomes["evaluated"] += 1
                except jacserve.DeadlineError:
                    assert timeout_s == 0.001
                except jacserve.NotFoundError:
                    assert function == "absent"
            for mark, function, future in submitted:
                try:
                    check(function, mark, future.result(timeout=30))
                    outcomes["done"] += 1
                except CancelledError:
                    outcomes["cancelled"] += 1
                except jacserve.DeadlineError:
                    outcomes["late"] += 1
                except jacserve.NotFoundError:
                    assert function == "absent"

        with ThreadPoolExecutor(6) as pool:
            for each in [pool.submit(work, seed) for seed in range(6)]:
                each.result(timeout=60)
        assert outcomes["done"] > 20
        assert outcomes["evaluated"] > 20


def check(function: str, mark: float, result: jacserve.Result) -> None:
    expected = {
        "double": 2 * mark,
        "slow": mark + 1,
        "root": np.sqrt(mark),
        "square": mark * mark,
    }
    assert result.value.tolist() == [expected[function]] * len(result.value)


def test_each_future_is_done_once(client) -> None:
    done = Counter[int]()
    with client.session(window=8) as session:
        for number in range(200):
            x = np.full(3, 1.0 * number)
            future = session.submit("double", x, quantities="value")
            future.add_done_callback(lambda _, n=number: done.update([n]))
            if number % 7 == 0:
                future.cancel()
    assert done == Counter(range(200))


def test_the_window_holds_back(client) -> None:
    with client.session(window=3) as session:
        futures = [session.submit("patient", X, quantities="value") for _ in range(3)]
        with ThreadPoolExecutor(1) as pool:
            fourth = pool.submit(session.submit, "patient", X, quantities="value")
            time.sleep(0.2)
            assert not fourth.done()
            assert futures[2].cancel()  # It makes room for another.
            futures[2] = fourth.result(timeout=10)
        release.set()
        for future in futures:
            assert future.result(timeout=30).value.tolist() == X.tolist()


def test_a_refused_query_leaves_the_window_as_it_was(client) -> None:
    with client.session(window=1) as session:
        for _ in range(5):
            with pytest.raises(jacserve.InvalidRequestError):
                session.submit("double", X, mode="sideways")  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                session.submit("double", X, nonsense=True)  # type: ignore[call-arg]
            with pytest.raises(jacserve.NotFoundError):
                session.submit("absent", X).result(timeout=10)
        assert session.submit("double", X).result(timeout=10).value[0] == 2.0
    with pytest.raises(ValueError, match="window is 0"):
        client.session(window=0)


def test_callbacks_that_raise_do_no_harm(client, caplog) -> None:
    def fail(_: Future[Any]) -> None:
        raise RuntimeError("from the callback")

    with client.session() as session:
        futures = [session.submit("slow", X, quantities="value") for _ in range(10)]
        for future in futures:
            future.add_done_callback(fail)
        assert all(f.result(timeout=10).value[0] == 2.0 for f in futures)
        assert session.value("double", X)[0] == 2.0
    assert "from the callback" in caplog.text


def test_a_callback_may_submit_what_follows(client) -> None:
    ends: SimpleQueue[float] = SimpleQueue()
    with client.session(window=2) as session:

        def follow(future: Future[jacserve.Result]) -> None:
            x = future.result().value
            if x[0] < 1000:
                session.submit("double", x, quantities="value").add_done_callback(
                    follow
                )
            else:
                ends.put(x[0])

        session.submit("double", X, quantities="value").add_done_callback(follow)
        assert ends.get(timeout=10) == 1024.0


def test_a_callback_that_finds_the_window_full_does_not_hang(client) -> None:
    finished = SimpleQueue[object]()
    session = client.session(window=1)

    def follow(_: Future[jacserve.Result]) -> None:
        try:
            # The second has to wait for the first one's answer.
            for _turn in range(2):
                session.submit("double", X, quantities="value")
            finished.put("submitted")
        except Exception as error:
            finished.put(error)

    session.submit("slow", X, quantities="value").add_done_callback(follow)
    try:
        assert finished.get(timeout=3)
        session.close()
    finally:
        left_alone(session)


def test_after_close(client) -> None:
    session = client.session()
    future = session.submit("slow", X, quantities="value")
    session.close()
    assert future.result(timeout=0).value[0] == 2.0
    for _ in range(3):
        with pytest.raises(RuntimeError, match="the session is closed"):
            session.submit("double", X)
        with pytest.raises(RuntimeError, match="the session is closed"):
            session.evaluate("double", X)
    session.close()
    unused = client.session()
    unused.close()
    with pytest.raises(RuntimeError, match="the session is closed"):
        unused.evaluate("double", X)


def test_large_queries_after_close(client) -> None:
    session = client.session()
    session.close()
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.submit("double", LARGE)
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.value("double", LARGE)


def test_close_waits_for_what_was_submitted(client) -> None:
    with client.session() as session:
        futures = [session.submit("patient", X, quantities="value") for _ in range(5)]
        threading.Timer(0.2, release.set).start()
    assert all(f.result(timeout=0).value.tolist() == X.tolist() for f in futures)


def left_by_an_exception(
    client: jacserve.Client, x: np.ndarray
) -> tuple[list[Future[jacserve.Result]], float]:
    """Returns five futures of a session that ended so, and how long that took."""
    futures: list[Future[jacserve.Result]] = []
    start = 0.0
    try:
        with client.session() as session:
            futures += [
                session.submit("patient", x, quantities="value") for _ in range(5)
            ]
            begun.get(timeout=30)
            start = time.monotonic()
            raise KeyError
    except KeyError:
        return futures, time.monotonic() - start


def test_an_exception_cancels_what_was_submitted(client) -> None:
    futures, took = left_by_an_exception(client, X)
    assert took < 2
    for future in futures:
        assert isinstance(future.exception(timeout=0), jacserve.CancelledError)


LARGE = np.arange(150_000.0)  # 1.2 MB.


def test_large_arrays_in_either_direction(client) -> None:
    with client.session() as session:
        np.testing.assert_array_equal(session.value("double", LARGE), 2 * LARGE)
        x = np.arange(500.0)
        for _ in range(2):
            jac = session.jacobian("square", x)
            np.testing.assert_array_equal(jac, np.diag(2 * x))
        futures = [
            session.submit("double", LARGE + shift, quantities="value")
            for shift in range(6)
        ] + [session.submit("square", x + shift) for shift in range(6)]
        for shift, future in enumerate(futures[:6]):
            value = future.result(timeout=30).value
            np.testing.assert_array_equal(value, 2 * (LARGE + shift))
        for shift, future in enumerate(futures[6:]):
            jac = future.result(timeout=30).jacobian
            np.testing.assert_array_equal(jac, np.diag(2 * (x + shift)))
            assert jac.flags.writeable


def test_small_inputs_are_copied_before_submit_returns(client) -> None:
    with client.session() as session:
        for _ in range(3):
            x = np.full(3, 5.0)
            future = session.submit("slow", x, quantities="value")
            x[:] = 0.0
            assert future.result(timeout=30).value.tolist() == [6.0] * 3


def test_inputs_are_copied_also_when_the_answer_is_large(client) -> None:
    with client.session() as session:
        for _ in range(3):
            x = np.full(512, 5.0)  # 4 kB, and 2 MiB of Jacobian.
            future = session.submit("square", x, quantities="jacobian")
            x[:] = 0.0
            assert future.result(timeout=30).jacobian[0, 0] == 10.0


def test_a_cancelled_future_can_be_waited_for(client) -> None:
    with client.session() as session:
        future = session.submit("patient", X, quantities="value")
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result(timeout=5)
        assert wait([future], timeout=1).done == {future}
        assert list(as_completed([future], timeout=1)) == [future]


def test_an_exception_ends_large_queries_too(client) -> None:
    timer = threading.Timer(0.5, release.set)
    timer.start()
    futures, _ = left_by_an_exception(client, np.ones(2**18))
    for future in futures:
        # Whatever came of them, they are done.
        with suppress(jacserve.JacobianError, CancelledError):
            future.result(timeout=1.5)
    timer.join()


def test_an_exception_does_not_wait_for_large_queries(client) -> None:
    timer = threading.Timer(2.0, release.set)
    timer.start()
    _, took = left_by_an_exception(client, np.ones(2**18))
    timer.cancel()
    release.set()
    assert took < 1.2


def test_errors_are_those_of_the_client(client) -> None:
    def kinds(evaluator: Any) -> list[tuple[type, str, str, str, str]]:
        calls: list[Callable[[], object]] = [
            lambda: evaluator.value("absent", X),
            lambda: evaluator.value("double", X[None, None]),
            lambda: evaluator.value("double", X.astype("i4")),
            lambda: evaluator.determinant("double", (X, X)),
            lambda: evaluator.value("root", -X, require_finite=True),
            lambda: evaluator.value("double", X, mode="sideways"),
            lambda: evaluator.jacobian("double", X, wrt="y"),
        ]
        found: list[tuple[type, str, str, str, str]] = []
        for call in calls:
            with pytest.raises(jacserve.JacobianError) as caught:
                call()
            error = caught.value
            found.append(
                (type(error), error.code, error.reason, error.field, str(error))
            )
        return found

    with client.session() as session:
        assert kinds(session) == kinds(client)


def test_a_session_has_the_clients_timeouts(target: str) -> None:
    with jacserve.Client(target, timeout_s=0.3) as client, client.session() as session:
        with pytest.raises(jacserve.DeadlineError, match="larger timeout_s"):
            session.value("patient", X)
        with pytest.raises(jacserve.DeadlineError):
            session.submit("patient", X, quantities="value").result(timeout=10)
        with pytest.raises(ValueError, match="NaN"):
            session.value("double", X, timeout_s=float("nan"))
        release.set()
        assert session.value("double", X, timeout_s=float("inf"))[0] == 2.0


def test_an_interrupt_ends_the_waiting(client) -> None:
    with client.session() as session:
        session.value("double", X)
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                session.value("patient", X)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert session.value("double", X)[0] == 2.0
        release.set()


def test_sparse_layouts_and_patterns(client, target: str) -> None:
    x = np.arange(6.0)
    with client.session() as session:
        for _ in range(3):
            jac = session.jacobian("square", x, mode="sparse")
            np.testing.assert_array_equal(jac.toarray(), np.diag(2 * x))
        # A server that has another pattern now: the client knows a wrong one.
        spoil(client)
        jac = session.jacobian("square", x, mode="sparse")
        np.testing.assert_array_equal(jac.toarray(), np.diag(2 * x))
        spoil(client)
        future = session.submit("square", x, quantities="jacobian", mode="sparse")
        jac = future.result(timeout=30).jacobian
        np.testing.assert_array_equal(jac.toarray(), np.diag(2 * x))


def spoil(client: jacserve.Client) -> None:
    """Has the client know patterns that the server does not have."""
    known = client._memory.patterns._known
    for signature, found in list(known.items()):
        [pattern] = found.values()
        known[signature] = {"of old": pattern}


def test_close_waits_for_a_query_that_is_asked_twice(client) -> None:
    x = np.arange(6.0)
    client.jacobian("square", x, mode="sparse")
    spoil(client)
    with client.session() as session:
        future = session.submit("square", x, quantities="jacobian", mode="sparse")
    jac = future.result(timeout=0).jacobian
    np.testing.assert_array_equal(jac.toarray(), np.diag(2 * x))


def test_no_thread_stays_after_close(target: str) -> None:
    with jacserve.Client(target) as client:
        with client.session() as session:
            session.value("double", X)
            session.submit("double", LARGE, quantities="value").result(timeout=30)
        before = len(threads_of_the_client())
        for _ in range(10):
            with client.session() as session:
                session.value("double", X)
                session.submit("double", LARGE, quantities="value").result(timeout=30)
        for _ in range(10):
            with suppress(KeyError), client.session() as session:
                session.submit("double", X)
                raise KeyError
        wait_until(lambda: len(threads_of_the_client()) <= before)


def threads_of_the_client() -> list[str]:
    """All but those of the server, which is in this process."""
    names = [t.name for t in threading.enumerate()]
    return [
        name
        for name in names
        if "jacserve-" in name or ("Thread-" in name and "_poll_wrapper" not in name)
    ]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_many_sessions_of_one_client(client) -> None:
    opened = [client.session() for _ in range(20)]
    for place, session in enumerate(opened):
        assert session.value("double", X + place)[0] == 2.0 + 2 * place
    for session in opened:
        session.close()


# --- Servers that do not keep to the contract -----------------------------------------


class FakeServer(grpc.GenericRpcHandler):
    """Answers every message of a session as it is told to."""

    def __init__(self) -> None:
        self.answer: Callable[[pb.SessionRequest], bytes] = lambda _: b""

    def service(self, handler_call_details: Any) -> Any:
        def session(requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
            for raw in requests:
                if reply := self.answer(pb.SessionRequest.FromString(raw)):
                    yield reply

        return grpc.stream_stream_rpc_method_handler(session)


@pytest.fixture(scope="module")
def fake() -> Generator[tuple[FakeServer, str]]:
    pool = ThreadPoolExecutor(8)
    server = grpc.server(pool)
    handler = FakeServer()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler, f"127.0.0.1:{port}"
    server.stop(0).wait()
    pool.shutdown()


def error_with(detail: Any, code: int = 8) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message="no")
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="jacserve")
    status.details.add().Pack(info)
    status.details.add().Pack(detail)
    return status


def garbled_status() -> status_pb2.Status:
    status = status_pb2.Status(code=3, message="no")
    status.details.add(
        type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff"
    )
    return status


BAD: dict[str, Callable[[pb.SessionRequest], bytes]] = {
    "noise": lambda _: b"\xff" * 20,
    "no answer": lambda r: pb.SessionResponse(id=r.id).SerializeToString(),
    "a garbled result": lambda r: (
        pb.SessionResponse(id=r.id).SerializeToString() + b"\x7a\x03\xff\xff\xff"
    ),
    "an empty result": lambda r: (
        pb.SessionResponse(id=r.id).SerializeToString() + b"\x7a\x03\x12\x01\xff"
    ),
    "a garbled error": lambda r: (
        pb.SessionResponse(id=r.id).SerializeToString() + b"\x12\x03\xff\xff\xff"
    ),
    "a status without a code": lambda r: pb.SessionResponse(
        id=r.id, error=status_pb2.Status(message="?")
    ).SerializeToString(),
    "a status of another world": lambda r: pb.SessionResponse(
        id=r.id, error=status_pb2.Status(code=12345, message="?")
    ).SerializeToString(),
    "an error with garbled details": lambda r: pb.SessionResponse(
        id=r.id, error=garbled_status()
    ).SerializeToString(),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answers_are_errors(fake: tuple[FakeServer, str], name: str) -> None:
    server, target = fake
    server.answer = BAD[name]
    with jacserve.Client(target, timeout_s=10.0) as client:
        session = client.session()
        with pytest.raises(jacserve.JacobianError) as caught:
            session.value("double", X)
        assert not isinstance(caught.value, jacserve.DeadlineError)
        future = session.submit("double", X)
        assert isinstance(future.exception(timeout=5), jacserve.JacobianError)
        session.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_absurd_time_to_come_back(fake: tuple[FakeServer, str]) -> None:
    server, target = fake
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.seconds = 2**62
    server.answer = lambda r: pb.SessionResponse(
        id=r.id, error=error_with(retry)
    ).SerializeToString()
    with jacserve.Client(target) as client:
        session = client.session()
        future = session.submit("double", X)
        try:
            assert isinstance(future.exception(timeout=1.5), jacserve.JacobianError)
        finally:
            left_alone(session)


def test_a_submitted_query_has_its_timeout_also_without_a_server(
    fake: tuple[FakeServer, str],
) -> None:
    server, target = fake
    server.answer = lambda _: b""  # It never says anything.
    with jacserve.Client(target) as client:
        session = client.session()
        with pytest.raises(jacserve.DeadlineError):
            session.value("double", X, timeout_s=0.2)
        future = session.submit("double", X, timeout_s=0.2)
        try:
            assert isinstance(future.exception(timeout=1.5), jacserve.DeadlineError)
        finally:
            left_alone(session)


def test_answers_to_nobody_are_passed_over(fake: tuple[FakeServer, str]) -> None:
    server, target = fake
    result = pb.Result(function="functions/double@1")
    output = result.outputs.add(quantity=pb.QUANTITY_VALUE)
    tensors.encode_into(output.tensor, X)

    def twice(request: pb.SessionRequest) -> bytes:
        # gRPC's messages are whole: two answers in one would be a merged one.
        return pb.SessionResponse(id=request.id, result=result).SerializeToString()

    server.answer = twice
    with jacserve.Client(target, timeout_s=10.0) as client, client.session() as session:
        for _ in range(5):
            assert session.value("double", X).tolist() == X.tolist()
