"""Clients that stop, dawdle or vanish: what they held is free again."""

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve.channels import CREATE_JOB, EVALUATE_STREAM, READ_JOB_RESULT, SESSION
from jacserve.errors import translated
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2
from jacserve_server import Registry, server as server_module, serving
from server_process import server_process

registry = Registry()
LARGE = np.ones(2**18)  # 2 MiB.
PATIENCE_S = 30.0
IDLE_S = 0.5


@registry.function
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2.0 * x


@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.square(x)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A server that waits for nobody, and has room for one large query at a time."""
    with serving(
        registry,
        stream_idle_s=IDLE_S,
        session_idle_s=IDLE_S,
        max_queued_bytes=2**22,
        max_identity_streams=3,
    ) as server:
        yield server.target


@contextmanager
def channel_to(target: str) -> Generator[grpc.Channel]:
    options = [
        # Else it would share the connection of other clients in this process.
        ("grpc.use_local_subchannel_pool", 1),
        # Else it would take tens of MiB before anybody reads them.
        ("grpc.http2.bdp_probe", 0),
    ]
    with grpc.insecure_channel(target, options=options) as channel:
        yield channel


def query_of(array: np.ndarray, function: str = "double", **options: Any) -> pb.Query:
    query = pb.Query(function=function, quantities=[pb.QUANTITY_VALUE], **options)
    tensor = query.inputs.add().tensor
    tensor.dtype, tensor.streamed_bytes = pb.DTYPE_FLOAT64, array.nbytes
    tensor.shape.extend(array.shape)
    return query


def head_of(array: np.ndarray, function: str = "double") -> bytes:
    head = query_of(array, function)
    return pb.EvaluateStreamRequest(head=head).SerializeToString()


def piece_of(offset: int, data: bytes) -> bytes:
    piece = pb.Piece(offset=offset, data=data)
    return pb.EvaluateStreamRequest(piece=piece).SerializeToString()


def jacobian_of(size: int) -> bytes:
    """A small query with a large answer: 8 bytes for each pair of numbers."""
    query = pb.Query(function="square", quantities=[pb.QUANTITY_JACOBIAN])
    tensor = query.inputs.add().tensor
    tensor.dtype, tensor.data = pb.DTYPE_FLOAT64, np.ones(size).tobytes()
    tensor.shape.append(size)
    return pb.EvaluateStreamRequest(head=query).SerializeToString()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_room(target: str) -> bool:
    """Whether a large query of another client finds room."""
    with channel_to(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        data = LARGE.tobytes()
        parts = [piece_of(at, data[at : at + 2**20]) for at in (0, 2**20)]
        try:
            with translated(target):
                list(call(iter([head_of(LARGE), *parts])))
        except jacserve.OverloadedError:
            return False
        return True


def dawdling(first: list[bytes], stop: threading.Event) -> Iterator[bytes]:
    yield from first
    stop.wait(PATIENCE_S)


@pytest.mark.parametrize("come", [0, 1, 2])
def test_a_slow_writer_is_ended_and_its_room_is_free(target: str, come: int) -> None:
    # Two clients declare all the room there is.
    messages = [head_of(LARGE), piece_of(0, b"12345678")][:come]
    stop = threading.Event()
    with channel_to(target) as one, channel_to(target) as other:
        calls: list[Any] = [
            each.stream_stream(EVALUATE_STREAM) for each in (one, other)
        ]
        uploads = [call(dawdling(messages, stop)) for call in calls]
        for upload in uploads:
            with pytest.raises(jacserve.JacobianError) as caught, translated(target):
                next(upload)
            assert (caught.value.code, caught.value.reason) == (
                "ABORTED",
                "STREAM_IDLE",
            )
            assert caught.value.metadata["idle_s"] == str(IDLE_S)
        stop.set()
    assert has_room(target)


def test_drops_do_not_keep_an_upload_alive(target: str) -> None:
    def drops() -> Iterator[bytes]:
        yield head_of(LARGE)
        for offset in range(1000):
            time.sleep(IDLE_S / 20)
            yield piece_of(offset, b"1")

    with channel_to(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        with pytest.raises(jacserve.JacobianError) as caught, translated(target):
            next(call(drops()))
    assert caught.value.reason == "STREAM_IDLE"


def test_a_slow_upload_that_goes_on_is_answered(target: str) -> None:
    data = np.ones(2**15).tobytes()  # 256 KiB.

    def pieces() -> Iterator[bytes]:
        yield head_of(np.ones(2**15))
        for offset in range(0, len(data), 2**16):
            time.sleep(0.6 * IDLE_S)
            yield piece_of(offset, data[offset : offset + 2**16])

    with channel_to(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        with translated(target):
            assert list(call(pieces()))


def test_a_slow_reader_gives_its_room_back(target: str) -> None:
    with channel_to(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        answer = call(iter([jacobian_of(1500)]))  # 18 MB: alone, it fits.
        next(answer)
        wait_until(lambda: has_room(target))
        # It had as much as gRPC had taken from the server before.
        with pytest.raises(jacserve.JacobianError) as caught, translated(target):
            list(answer)
        assert caught.value.reason == "STREAM_IDLE"


def test_slow_readers_are_no_more_than_streams_may_be(target: str) -> None:
    with channel_to(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        answers = []
        for _ in range(3):
            wait_until(lambda: has_room(target))
            answers.append(call(iter([jacobian_of(1500)])))
            next(answers[-1])
        wait_until(lambda: has_room(target))
        with pytest.raises(jacserve.JacobianError) as caught, translated(target):
            next(call(iter([jacobian_of(3)])))
        assert caught.value.reason == "TOO_MANY_STREAMS"
        assert caught.value.metadata == {"streams": "3", "max_streams": "3"}
        answers[0].cancel()
        wait_until(lambda: is_answered(channel))


def test_a_session_that_is_not_used_is_ended(target: str) -> None:
    stop = threading.Event()
    with channel_to(target) as channel:
        call: Any = channel.stream_stream(SESSION)
        asked = pb.SessionRequest(id=1).SerializeToString()
        answers = call(dawdling([asked], stop))
        next(answers)
        with pytest.raises(jacserve.JacobianError) as caught, translated(target):
            next(answers)
        stop.set()
    assert caught.value.reason == "STREAM_IDLE"
    assert "session" in str(caught.value)


def test_a_session_that_is_used_goes_on(target: str) -> None:
    with jacserve.Client(target) as client, client.session() as session:
        for _ in range(6):
            assert session.value("double", np.ones(3))[0] == 2.0
            time.sleep(0.4 * IDLE_S)


# --- Clients that vanish --------------------------------------------------------------


def sessions_of(first: int) -> list[bytes]:
    query = query_of(np.ones(3))
    tensor = query.inputs[0].tensor
    tensor.ClearField("streamed_bytes")
    tensor.data = np.ones(3).tobytes()
    return [
        pb.SessionRequest(id=id_, query=query).SerializeToString()
        for id_ in range(first, first + 20)
    ]


def job_head(array: np.ndarray) -> bytes:
    spec = jobs_pb2.JobSpec(query=query_of(array))
    return jobs_pb2.CreateJobRequest(head=spec).SerializeToString()


def job_piece(offset: int, data: bytes) -> bytes:
    piece = pb.Piece(offset=offset, data=data)
    return jobs_pb2.CreateJobRequest(piece=piece).SerializeToString()


Step = Callable[[grpc.Channel, str, threading.Event], Any]


def upload(
    *messages: bytes, path: str = EVALUATE_STREAM, is_whole: bool = False
) -> Step:
    def begin(channel: grpc.Channel, job: str, stop: threading.Event) -> Any:
        sent = iter(messages) if is_whole else dawdling(list(messages), stop)
        if path == CREATE_JOB:
            create: Any = channel.stream_unary(path)
            return create.future(sent)
        call: Any = channel.stream_stream(path)
        return call(sent)

    return begin


def taken(step: Step, count: int) -> Step:
    """Takes so many answers, and leaves the rest."""

    def begin(channel: grpc.Channel, job: str, stop: threading.Event) -> Any:
        call = step(channel, job, stop)
        for _ in range(count):
            next(call)
        return call

    return begin


def unary_stream(path: str, request: Callable[[str], Any]) -> Step:
    def begin(channel: grpc.Channel, job: str, stop: threading.Event) -> Any:
        call: Any = channel.unary_stream(path)
        return call(request(job).SerializeToString())

    return begin


def evaluate(channel: grpc.Channel, job: str, stop: threading.Event) -> Any:
    call: Any = channel.unary_unary("/jacserve.v1.JacobianService/Evaluate")
    query = query_of(np.ones(3))
    query.inputs[0].tensor.ClearField("streamed_bytes")
    query.inputs[0].tensor.data = np.ones(3).tobytes()
    return call.future(query.SerializeToString())


PIECE = LARGE.tobytes()[: 2**20]
WATCH = "/jacserve.v1.JobService/WatchJob"
STEPS: dict[str, Step] = {
    "before the answer": evaluate,
    "before the head": upload(),
    "after the head": upload(head_of(LARGE)),
    "in the middle of an upload": upload(head_of(LARGE), piece_of(0, PIECE)),
    "after an upload": upload(
        head_of(LARGE), piece_of(0, PIECE), piece_of(2**20, PIECE)
    ),
    "before the answer of a stream": upload(jacobian_of(2000), is_whole=True),
    "in the middle of an answer": taken(upload(jacobian_of(2000), is_whole=True), 3),
    "in an idle session": taken(upload(*sessions_of(0), path=SESSION), 20),
    "in a session with queries pending": upload(*sessions_of(0), path=SESSION),
    "before the head of a job": upload(path=CREATE_JOB),
    "after the head of a job": upload(job_head(LARGE), path=CREATE_JOB),
    "in the middle of a job's upload": upload(
        job_head(LARGE), job_piece(0, PIECE), path=CREATE_JOB
    ),
    "while it watches a job": taken(
        unary_stream(WATCH, lambda job: jobs_pb2.WatchJobRequest(name=job)), 1
    ),
    "in the middle of a job's results": taken(
        unary_stream(
            READ_JOB_RESULT, lambda job: jobs_pb2.ReadJobResultRequest(name=job)
        ),
        2,
    ),
}


def held_by(pid: int) -> dict[str, int]:
    """Threads, files and sockets of a process, and its memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in status)
    return {
        "threads": int(values["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "memory": int(values["VmRSS"].split()[0]) // 1024,
    }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, str]]:
    """A server in a process of its own, with a job that has ended."""
    folder = tmp_path_factory.mktemp("jobs")
    settings = {
        "JACSERVE_JOBS_DIR": str(folder),
        "JACSERVE_MAX_QUERIES": "4",
        "JACSERVE_MAX_IDENTITY_STREAMS": "4",
        "MALLOC_ARENA_MAX": "1",  # Else each thread keeps some memory.
    }
    with server_process(Path(__file__), "--device", "cpu", **settings) as server:
        with jacserve.Client(server.target, timeout_s=60) as client:
            points = np.ones((1000, 100))
            job = client.submit_job("square", points, quantities=["jacobian"])
            job.result(timeout_s=60)
            yield server.target, server.process.pid, job.id


def vanish(target: str, job: str, step: Step, turns: int) -> None:
    for turn in range(turns):
        stop = threading.Event()
        with channel_to(target) as channel:
            calls = [step(channel, job, stop) for _ in range(2)]
            time.sleep(0.02 * (turn % 3))
            if turn % 2:  # Else it is the connection that goes.
                for call in calls:
                    call.cancel()
        stop.set()


def is_answered(channel: grpc.Channel) -> bool:
    call: Any = channel.stream_stream(EVALUATE_STREAM)
    with suppress(jacserve.JacobianError), translated("the server"):
        return bool(list(call(iter([jacobian_of(3)]))))
    return False


def check_streams(target: str) -> None:
    """Opens as many streams as there may be: none that has gone counts."""
    stop = threading.Event()
    with channel_to(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        idle = [call(dawdling([], stop)) for _ in range(3)]
        wait_until(lambda: is_answered(channel))
        for each in idle:
            each.cancel()
        stop.set()


def check_steps(watched: tuple[str, int, str], turns: int) -> None:
    target, pid, job = watched
    # What is made when it is first needed stays, and so do buffers of as many answers
    # as are ever made at once.
    for step in STEPS.values():
        vanish(target, job, step, 5)
    time.sleep(0.5)
    before = held_by(pid)

    def is_free() -> bool:
        now = held_by(pid)
        return all(now[each] <= before[each] + 2 for each in ("threads", "files"))

    for step in STEPS.values():
        vanish(target, job, step, turns)
        wait_until(is_free)
        check_streams(target)
        wait_until(lambda: has_room(target))
    wait_until(lambda: held_by(pid)["memory"] < before["memory"] + 64)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_clients_that_vanish_at_any_step_leave_nothing_behind(watched) -> None:
    check_steps(watched, 3)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_many_clients_that_vanish_leave_nothing_behind(watched) -> None:
    check_steps(watched, 40)


# --- Connections ----------------------------------------------------------------------


class Proxy:
    """Passes bytes on between clients and a server, until it is told to stand still."""

    def __init__(self, target: str) -> None:
        self._still = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._to = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                self._sockets += near, far
                for one, other in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._pass, args=(one, other))
                    thread.start()
                    self._threads.append(thread)

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(2**16):
                if self._still.is_set():
                    return  # Neither end hears of it.
                other.sendall(data)

    @property
    def ports(self) -> set[int]:
        """Where its connections to the server come from."""
        return {each.getsockname()[1] for each in self._sockets[1::2]}

    def stand_still(self) -> None:
        self._still.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()


def established(target: str) -> set[int]:
    """The ports from which there are connections to a server, as the kernel knows."""
    port = int(target.rpartition(":")[2])
    found: set[int] = set()
    lines = [
        line
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    for line in lines:
        _, local, remote, state, *_ = line.split()
        if int(local.rpartition(":")[2], 16) == port and state == "01":
            found.add(int(remote.rpartition(":")[2], 16))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")
def test_a_half_open_connection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [(name, min(value, 1000)) for name, value in server_module.KEEPALIVE]
    monkeypatch.setattr(server_module, "KEEPALIVE", options)
    stop = threading.Event()
    with serving(registry, max_queued_bytes=2**22) as server, ExitStack() as stack:
        proxy = Proxy(server.target)
        stack.callback(proxy.close)
        with channel_to(proxy.target) as channel:
            call: Any = channel.stream_stream(EVALUATE_STREAM)
            upload = call(dawdling([head_of(LARGE)], stop))
            wait_until(lambda: bool(proxy.ports & established(server.target)))
            ports = proxy.ports
            proxy.stand_still()
            wait_until(lambda: not ports & established(server.target))
            assert has_room(server.target)
            upload.cancel()
            stop.set()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")
def test_a_connection_without_calls_is_closed_and_its_client_comes_again() -> None:
    with serving(registry, connection_idle_s=0.5) as server, ExitStack() as stack:
        idle, busy = (
            stack.enter_context(jacserve.Client(server.target)) for _ in range(2)
        )
        for _ in range(3):
            assert idle.value("double", np.ones(3))[0] == 2.0
            wait_until(lambda: not established(server.target))
        with busy.session() as session:
            for _ in range(3):
                assert session.value("double", np.ones(3))[0] == 2.0
                before = established(server.target)
                time.sleep(1.0)
                assert before & established(server.target)


def refused(port: int) -> bool:
    """Whether a server closes a new connection at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            return not connection.recv(1)
        except ConnectionError:
            return True


def check_connections(most: int, count: int) -> None:
    settings = {"JACSERVE_MAX_CONNECTIONS": str(most)}
    with server_process(Path(__file__), "--device", "cpu", **settings) as server:
        port = int(server.target.rpartition(":")[2])
        with (
            jacserve.Client(server.target, timeout_s=60) as client,
            ExitStack() as stack,
        ):
            assert client.value("double", np.ones(3))[0] == 2.0
            pid = server.process.pid
            before = held_by(pid)
            for place in range(count):
                each = socket.create_connection(("127.0.0.1", port), timeout=30)
                stack.enter_context(each)
                if place % 1000 == 999:
                    assert client.value("double", np.ones(3))[0] == 2.0
            wait_until(lambda: refused(port))
            wait_until(
                lambda: (
                    held_by(server.process.pid)["files"] < before["files"] + most + 50
                )
            )
            # Who was there before is still served, and the server says how it is.
            assert client.value("double", np.ones(3))[0] == 2.0
            with channel_to(server.target) as channel:
                check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
                with pytest.raises(grpc.RpcError) as caught:
                    check(b"", timeout=10)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            stack.close()

            def is_let_in() -> bool:
                with channel_to(server.target) as channel:
                    check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
                    with suppress(grpc.RpcError):
                        return check(b"", timeout=5) == b"\x08\x01"
                return False

            wait_until(is_let_in)
            wait_until(
                lambda: held_by(server.process.pid)["files"] < before["files"] + 20
            )
        assert not server.errors()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_connections_beyond_the_limit_are_refused() -> None:
    check_connections(20, 200)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_ten_thousand_connections_are_refused() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(20_000, hard) if hard != resource.RLIM_INFINITY else 20_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        check_connections(500, min(10_000, max(soft, wanted) - 500))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
