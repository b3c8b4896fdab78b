"""Clients that stop, dawdle or vanish: what they held is free again, and others go on."""

import asyncio
import os
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
from jacserve_server import Registry, serving

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
    # Else it would share the connection of other clients in this process.
    options = [("grpc.use_local_subchannel_pool", 1)]
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
        calls: list[Any] = [each.stream_stream(EVALUATE_STREAM) for each in (one, other)]
        uploads = [call(dawdling(messages, stop)) for call in calls]
        for upload in uploads:
            with pytest.raises(jacserve.JacobianError) as caught, translated(target):
                next(upload)
            assert (caught.value.code, caught.value.reason) == ("ABORTED", "STREAM_IDLE")
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
        answer = call(iter([jacobian_of(2500)]))  # 50 MB: alone, it fits.
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
            answers.append(call(iter([jacobian_of(2500)])))
            next(answers[-1])
        wait_until(lambda: has_room(target))
        with pytest.raises(jacserve.JacobianError) as caught, translated(target):
            next(call(iter([jacobian_of(3)])))
        assert caught.value.reason == "TOO_MANY_STREAMS"
        assert caught.value.metadata == {"streams": "3", "max_streams": "3"}
        answers[0].cancel()

        def is_answered() -> bool:
            with suppress(jacserve.JacobianError), translated(target):
                return bool(list(call(iter([jacobian_of(3)]))))
            return False

        wait_until(is_answered)


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
