"""Many queries on one stream: each is answered when it is done.

A brief query is answered where it is read. For any other a task waits, while the next
ones are read; where as many wait as a session may have, one more is held and nothing
else is read, and gRPC holds the client back.
"""

import asyncio
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from jacserve import framing
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server.admission import shutting_down
from jacserve_server.callers import Call
from jacserve_server.errors import ServiceError
from jacserve_server.streams import idle

_MOST_PENDING = 64
_MOST_FIELDS = 16  # A request has three, and may get some more.

_ID = pb.SessionRequest.ID_FIELD_NUMBER
_TIMEOUT = pb.SessionRequest.TIMEOUT_FIELD_NUMBER
_CANCEL = pb.SessionRequest.CANCEL_FIELD_NUMBER
_QUERY = pb.SessionRequest.QUERY_FIELD_NUMBER
_ERROR = pb.SessionResponse.ERROR_FIELD_NUMBER
_RESULT = pb.SessionResponse.RESULT_FIELD_NUMBER
_encode_id = struct.Struct("<BQ")  # The tag of a fixed64 field, and its value.
_ID_TAG = _ID << 3 | framing.FIXED64
_WIRE_TYPES = {
    _ID: framing.FIXED64,
    _TIMEOUT: framing.BYTES,
    _CANCEL: framing.VARINT,
    _QUERY: framing.BYTES,
}


class Answerer(Protocol):
    """Answers single queries."""

    def begun(self) -> Call:
        """Makes the call that a query counts as, from when it was read."""
        ...

    def answer_now(self, raw: bytes, call: Call) -> bytes | None:
        """Answers a query at once; None where it has to wait.

        Args:
            raw: A serialized Query.
            call: What it counts as.

        Returns:
            A serialized Result.

        Raises:
            Exception: It can't be answered.
        """
        ...

    async def answer(self, raw: bytes, call: Call) -> bytes:
        """Answers a query when it is done."""
        ...

    def answered(self, call: Call) -> None:
        """Hears that a query has its answer."""
        ...

    def failed(self, call: Call, error: BaseException) -> bytes:
        """Hears that a query has none, and returns why, as a google.rpc.Status."""
        ...


@dataclass(frozen=True, slots=True)
class _Request:
    """What a SessionRequest says; the query is serialized, and counts as a call."""

    id: int
    timeout_s: float | None
    is_cancel: bool
    query: bytes
    call: Call


def read_request(raw: bytes, call: Call) -> _Request:
    """Reads a message of a session's stream.

    Args:
        raw: A serialized SessionRequest, from anywhere.
        call: What it is counted as.

    Returns:
        What it says.

    Raises:
        ServiceError: It is no such message.
    """
    found: dict[int, framing.Field] = {}
    timeout_s = None
    try:
        for field in framing.fields(raw, 0, len(raw), most=_MOST_FIELDS):
            if _WIRE_TYPES.get(field.number) == field.wire_type:
                # Protobuf would merge them; no writer sends them twice.
                if field.number in found:
                    raise DecodeError("a field comes twice")
                found[field.number] = field
        id_, query = found.get(_ID), found.get(_QUERY)
        timeout, cancel = found.get(_TIMEOUT), found.get(_CANCEL)
        if query and cancel:
            raise DecodeError("it has a query and cancels one")
        if timeout:
            duration = Duration.FromString(raw[timeout.start : timeout.stop])
            timeout_s = duration.seconds + duration.nanos * 1e-9
        return _Request(
            int.from_bytes(raw[id_.start : id_.stop], "little") if id_ else 0,
            timeout_s,
            bool(cancel and cancel.number_in(raw)),
            raw[query.start : query.stop] if query else b"",
            call,
        )
    except DecodeError as error:
        raise ServiceError(
            "STREAM_BROKEN",
            f"a message of the session can't be read: {error}. Send SessionRequests.",
        ) from error


def _response(id_: int, field: int, value: bytes) -> bytes:
    head = _encode_id.pack(_ID_TAG, id_) + framing.bytes_field(field, len(value))
    return head + value


class Session:
    """One session."""

    def __init__(self, answerer: Answerer, *, idle_s: float = 0.0) -> None:
        """Has nothing to do yet.

        Args:
            answerer: Answers its queries.
            idle_s: Seconds after which it is ended if nothing is pending; 0 for never.
        """
        self._idle_s = idle_s
        self._rested_at = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._answerer = answerer
        self._pending: dict[int, asyncio.Task[bytes]] = {}
        self._finished: list[bytes] = []
        # A query that was read when as many were pending as may be.
        self._held: _Request | None = None
        self._stirred = asyncio.Event()
        self._resting: asyncio.Task[Any] | None = None
        self._ending: ServiceError | None = None

    def close(self) -> None:
        """Has it end as soon as nothing is pending and all answers are sent."""
        self._end(shutting_down())

    def _end(self, reason: ServiceError) -> None:
        self._ending = reason
        self._stirred.set()
        if self._resting is not None:
            self._resting.cancel()

    async def answers(self, raws: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """Answers queries until there are no more.

        Args:
            raws: Serialized SessionRequests.

        Yields:
            Serialized SessionResponses, as queries are done.

        Raises:
            ServiceError: A message can't be read, an id is in use, or it was closed
                or not used for too long.
        """
        if self._idle_s:
            self._set_alarm(self._idle_s)
        iterator = aiter(raws)
        reading: asyncio.Task[bytes | None] | None = None
        has_ended = False
        try:
            while not has_ended or self._pending or self._finished or self._held:
                raw: bytes | None = None
                if self._finished:
                    finished, self._finished = self._finished, []
                    for response in finished:
                        yield response
                elif self._held and len(self._pending) < _MOST_PENDING:
                    held, self._held = self._held, None
                    if response := self._take(held):
                        yield response
                elif not self._pending:
                    # The usual case, and the fast one: nothing else to wait for.
                    raw = await self._rest(reading or anext(iterator, None))
                    reading, has_ended = None, raw is None
                else:
                    if reading is None and self._held is None and not has_ended:
                        reading = asyncio.create_task(_next(iterator))
                        reading.add_done_callback(lambda _: self._stirred.set())
                    await self._stirred.wait()
                    self._stirred.clear()
                    if reading is not None and reading.done():
                        raw = reading.result()
                        reading, has_ended = None, raw is None
                if raw is not None:
                    request = read_request(raw, self._answerer.begun())
                    if response := self._take(request):
                        yield response
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            for task in [*self._pending.values(), *([reading] if reading else [])]:
                task.cancel()

    async def _rest(self, read: Awaitable[bytes | None]) -> bytes | None:
        """Waits for the next message while nothing is pending."""
        if self._ending is not None:
            raise self._ending
        self._resting = asyncio.current_task()
        self._rested_at = time.monotonic()
        try:
            return await read
        except asyncio.CancelledError:
            if self._ending is not None:
                raise self._ending from None
            raise
        finally:
            self._resting = None

    def _set_alarm(self, in_s: float) -> None:
        self._alarm = asyncio.get_running_loop().call_later(in_s, self._look)

    def _look(self) -> None:
        """Ends it if it has rested for too long; else looks again later."""
        now = time.monotonic()
        since = now if self._resting is None else self._rested_at
        if (left_s := since + self._idle_s - now) > 0:
            self._set_alarm(left_s)
            return
        remedy = "Open another one when it is needed."
        self._end(idle("the session has not been used", self._idle_s, remedy))

    def _take(self, request: _Request) -> bytes | None:
        """Answers a query, or begins to."""
        if request.is_cancel:
            self._cancel(request.id)
            return None
        is_held = self._held is not None and self._held.id == request.id
        if request.id in self._pending or is_held:
            raise ServiceError(
                "STREAM_BROKEN",
                f"id {request.id} is that of a query that has no answer yet. Use "
                "another.",
            )
        if len(self._pending) >= _MOST_PENDING:
            self._held = request
            return None
        try:
            result = self._answerer.answer_now(request.query, request.call)
        except Exception as error:
            return self._failure(request, error)
        if result is not None:
            self._answerer.answered(request.call)
            return _response(request.id, _RESULT, result)
        task = asyncio.create_task(self._answer(request))
        self._pending[request.id] = task
        task.add_done_callback(lambda done: self._finish(request, done))
        return None

    def _cancel(self, id_: int) -> None:
        if task := self._pending.get(id_):
            task.cancel()
        elif self._held is not None and self._held.id == id_:
            held, self._held = self._held, None
            self._finished.append(self._failure(held, asyncio.CancelledError()))

    async def _answer(self, request: _Request) -> bytes:
        async with asyncio.timeout(request.timeout_s):
            return await self._answerer.answer(request.query, request.call)

    def _finish(self, request: _Request, done: "asyncio.Task[bytes]") -> None:
        del self._pending[request.id]
        if done.cancelled():
            response = self._failure(request, asyncio.CancelledError())
        elif error := done.exception():
            response = self._failure(request, error)
        else:
            self._answerer.answered(request.call)
            response = _response(request.id, _RESULT, done.result())
        self._finished.append(response)
        self._stirred.set()

    def _failure(self, request: _Request, error: BaseException) -> bytes:
        why = self._answerer.failed(request.call, error)
        return _response(request.id, _ERROR, why)


async def _next(iterator: AsyncIterator[bytes]) -> bytes | None:
    return await anext(iterator, None)
