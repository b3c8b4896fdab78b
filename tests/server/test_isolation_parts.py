"""What keeps a server safe from its worker, part by part."""

import asyncio
import mmap
import os
import socket
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from jacserve_server.errors import ServiceError
from jacserve_server.isolation.channel import Channel, ChannelError, socket_pair
from jacserve_server.isolation.process import WorkerProcess
from jacserve_server.isolation.protocol import (
    FLAG,
    NEWS,
    Failed,
    PatternHead,
    Prepared,
    ProtocolError,
    outline_of,
    pattern_of,
    slots,
)
from jacserve_server.isolation.quarantine import Quarantine
from jacserve_server.isolation.regions import RegionPool, opened
from jacserve_server.work import Computation, InputSpec, ProgramKey, Strategy

POINT = InputSpec((3,), "float64", is_batched=True)
KEY = ProgramKey(
    Computation("f@1", ("value", "jacobian"), ("x",), "auto", "matrix", (POINT,)), 4
)


def prepared(**changes: object) -> Prepared:
    honest = {
        "id": 1,
        "arrays": (("jacobian", ()), ("value", ())),
        "results": (InputSpec((3, 3), "float64", is_batched=True), POINT),
        "modes": (("jacobian", "forward"),),
        "patterns": (),
        "strategy": Strategy(jacobian="forward"),
        "device": "cpu:0",
        "is_lone": False,
    }
    return Prepared(**{**honest, **changes})  # pyright: ignore[reportArgumentType]


def test_an_honest_worker_is_believed() -> None:
    outline = outline_of(prepared(), KEY, b"")
    assert outline.bucket == 4
    assert outline.modes == {"jacobian": "forward"}


@pytest.mark.parametrize(
    "lie",
    [
        {"arrays": (("jacobian", ()),)},
        {"arrays": (("jacobian", ()), ("hessian", ()))},
        {"results": (POINT, InputSpec((-1,), "float64", is_batched=True))},
        {"results": (POINT, InputSpec((2**40,), "float64", is_batched=True))},
        {"results": (POINT, InputSpec((1,) * 99, "float64", is_batched=True))},
        {"results": (POINT, InputSpec((3,), "object", is_batched=True))},
        {"results": (POINT, InputSpec((3,), "float64", is_batched=False))},
        {"modes": (("hvp", "forward"),)},
        {"device": "cpu\n"},
        {"patterns": (("jacobian", PatternHead((3, 3), 2)),)},
    ],
)
def test_what_can_not_be_true_is_refused(lie: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        outline_of(prepared(**lie), KEY, b"")
    with pytest.raises(ProtocolError):
        outline_of(prepared(), KEY, b"x")


@given(
    st.tuples(st.integers(-1, 2**40), st.integers(-1, 2**40)),
    st.integers(-5, 20),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=24),
)
def test_a_pattern_is_one_or_is_refused(
    shape: tuple[int, int], nnz: int, numbers: list[int]
) -> None:
    tail = np.array(numbers, np.int32).tobytes()
    try:
        pattern, left = pattern_of(PatternHead(shape, nnz), tail)
    except ProtocolError:
        return
    assert len(left) + 8 * pattern.nnz == len(tail)
    dense = np.zeros((min(shape[0], 99), min(shape[1], 99)))
    inside = (pattern.rows < 99) & (pattern.columns < 99)
    dense[pattern.rows[inside], pattern.columns[inside]] = 1


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(ValidationError):
        NEWS.validate_json(data)


def test_errors_come_through() -> None:
    error = ServiceError("TRACE_FAILED", "no. Mend it.", field="x", function="f", n=3)
    message = NEWS.validate_json(NEWS.dump_json(Failed.of(7, error)))
    assert isinstance(message, Failed)
    found = message.error
    assert (found.reason, found.message, found.field, found.metadata) == (
        "TRACE_FAILED", "no. Mend it.", "x", {"function": "f", "n": "3"},
    )  # fmt: skip
    forged = Failed(7, "TRACE_FAILED", "no", values=(("self", "x"), ("reason", "y")))
    assert forged.error.metadata == {}


def test_arrays_lie_side_by_side() -> None:
    specs = (POINT, InputSpec((2, 2), "complex128", is_batched=False), FLAG)
    places = slots(specs, 5)
    views = places.views(memoryview(bytearray(places.size_bytes)))
    assert [view.shape for view in views] == [(5, 3), (2, 2), (5,)]
    for number, view in enumerate(views):
        view[...] = number
    assert [np.unique(view).tolist() for view in views] == [[0], [1], [True]]
    assert slots((), None).size_bytes == 0


def test_a_worker_can_not_make_a_region_smaller() -> None:
    pool = RegionPool(2**30)
    region, is_new = pool.take(100_000)
    assert is_new
    theirs = os.dup(region.descriptor)
    with pytest.raises(PermissionError):
        os.ftruncate(theirs, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(theirs, 2**30)
    seen = opened(theirs, region.size_bytes)
    region.memory[7] = 42
    assert seen[7] == 42
    pool.give(region)
    again, is_new = pool.take(90_000)
    assert again is region
    assert not is_new
    larger, is_new = pool.take(2**24)
    assert is_new
    pool.close()
    for each in (again, larger):
        pool.give(each)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(each.descriptor)
    assert isinstance(seen.obj, mmap.mmap)


def test_what_is_idle_is_bounded() -> None:
    pool = RegionPool(2**20)
    regions = [pool.take(2**19)[0] for _ in range(4)]
    for region in regions:
        pool.give(region)
    assert pool.dropped() == (regions[0].id, regions[1].id)
    assert pool.dropped() == ()
    pool.close()


def talking(
    call: Callable[[Channel, socket.socket, list[object]], object],
) -> list[object]:
    """What a channel hears while a call does something with its other end."""
    heard: list[object] = []

    async def talk() -> None:
        ours, theirs = socket_pair()
        channel = Channel(
            ours,
            on_message=lambda head, tail: heard.append((head, tail)),
            on_closed=heard.append,
            max_tail_bytes=100,
        )
        call(channel, theirs, heard)
        await asyncio.sleep(0.05)
        channel.close()
        theirs.close()

    asyncio.run(talk())
    return heard


def test_a_message_that_is_too_long_is_refused_before_it_is_kept() -> None:
    def send(_: Channel, theirs: socket.socket, __: list[object]) -> None:
        theirs.send(struct.pack("<IQ", 3, 2) + b"abc" + b"de")
        theirs.send(struct.pack("<IQ", 3, 101) + b"abc")

    message, error = talking(send)
    assert message == (b"abc", b"de")
    assert isinstance(error, ChannelError)


def test_descriptors_are_not_taken_from_a_worker() -> None:
    before = len(os.listdir("/proc/self/fd"))

    def send(_: Channel, theirs: socket.socket, __: list[object]) -> None:
        data = struct.pack("<IQ", 1, 0) + b"a"
        socket.send_fds(theirs, [data], [0, 1, 2])

    assert talking(send) == [(b"a", b"")]
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_strikes_put_a_function_into_quarantine() -> None:
    quarantine = Quarantine()
    quarantine.strike("f@1", "it ran for more than 2 s")
    quarantine.check("f@1")
    quarantine.strike("f@1", "its process was killed by SIGSEGV")
    reason = quarantine.reason("f@1")
    assert reason.startswith("it ended the process that ran it 2 times: it ran for")
    assert quarantine.reasons == {"f@1": reason}
    with pytest.raises(ServiceError, match="f@1 is not run any more: it ended") as e:
        quarantine.check("f@1")
    assert e.value.reason == "FUNCTION_QUARANTINED"
    quarantine.release("f@1")
    quarantine.check("f@1")
    quarantine.strike("f@1", "its process was killed by SIGSEGV")
    assert quarantine.reason("f@1") == ""


def test_a_process_that_has_ended_is_not_killed_by_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    killpg = os.killpg

    def note(group: int, number: int) -> None:
        killed.append(group)
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", note)

    async def main() -> None:
        ended = asyncio.Event()
        ours, theirs = socket_pair()
        process = WorkerProcess(theirs, lambda _: ended.set())
        process.kill()
        await asyncio.wait_for(ended.wait(), 20)
        count = len(killed)
        assert count >= 1
        process.kill()
        process.close()
        assert len(killed) == count
        ours.close()

    asyncio.run(main())
