"""Health and reflection, for who may ask: for all, or guarded as the RPCs are.

The services that come with gRPC do the same, but for two things: what they can't read
they answer as a fault of the server, and whoever ends watching its health ends it for
all others that watch.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME
from grpc_reflection.v1alpha import reflection, reflection_pb2

from jacserve_server.callers import Call
from jacserve_server.calls import Boundary, Handler, add_handlers, unreadable
from jacserve_server.streams import Streams

# A client of gRPC watches once on a connection, which a proxy may share among some.
# Nobody needs a token for it, and else each could do so max_streams times.
_MOST_WATCHES = 16
# The name of a service, or of what a reflection asks about: gRPC keeps a request for
# as long as its call, and who watches stays.
_REQUEST_BYTES = 2**12

_Status = health_pb2.HealthCheckResponse.ServingStatus


class Health:
    """Tells whether all services are ready. Used from one event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        """Is not ready yet.

        Args:
            services: Their full names; "" stands for the server.
        """
        self._services = frozenset(("", *services))
        self._status: _Status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._is_closed = False

    def set(self, *, is_serving: bool) -> None:
        """Tells who watches whether the services are ready from now on."""
        states = health_pb2.HealthCheckResponse
        self._status = states.SERVING if is_serving else states.NOT_SERVING
        self._tell()

    def close(self) -> None:
        """Ends all calls that watch, which else would hold up the server's end."""
        self._is_closed = True
        self._tell()

    def status_of(self, service: str) -> _Status:
        """Returns how a service is.

        Args:
            service: Its full name, or "".
        """
        if service in self._services:
            return self._status
        return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

    async def watch(self, service: str) -> AsyncGenerator[_Status]:
        """Yields how a service is, now and whenever that changes.

        Args:
            service: Its full name, or "".
        """
        told = None
        while not self._is_closed:
            changed, status = self._changed, self.status_of(service)
            if status != told:
                told = status
                yield status
            await changed.wait()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def add_health(health: Health, server: grpc.aio.Server, boundary: Boundary) -> None:
    """Has a server answer the calls of health.

    Args:
        health: Tells how the services are.
        server: Receives the calls.
        boundary: Lets calls in.
    """
    service = _HealthService(health, boundary)
    add_handlers(SERVICE_NAME, service, server, _HEALTH, boundary)


def add_reflection(
    services: Iterable[str],
    server: grpc.aio.Server,
    boundary: Boundary,
    streams: Streams,
) -> None:
    """Has a server answer the calls of reflection.

    Args:
        services: The full names of the services to tell of.
        server: Receives the calls.
        boundary: Lets calls in.
        streams: Counts the calls among the streams of who asks.
    """
    inner = reflection.aio.ReflectionServicer(services)  # pyright: ignore[reportAttributeAccessIssue]
    service = _ReflectionService(inner, boundary, streams)
    name = reflection.SERVICE_NAME
    add_handlers(name, service, server, _REFLECTION, boundary)


class _HealthService:
    def __init__(self, health: Health, boundary: Boundary) -> None:
        self._health = health
        self._boundary = boundary
        self._watches = Streams(max_per_client=_MOST_WATCHES, idle_s=math.inf)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        if not self._boundary.admits(context, "Check"):
            return health_pb2.HealthCheckResponse()
        status = self._health.status_of(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("there is no such service here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncGenerator[bytes]:
        watching = partial(self._watched, request.service)
        async for each in self._boundary.stream(context, "Watch", watching):
            yield each

    async def _watched(self, service: str, call: Call) -> AsyncGenerator[bytes]:
        with self._watches.place(call.caller.peer):
            async for status in self._health.watch(service):
                answer = health_pb2.HealthCheckResponse(status=status)
                yield answer.SerializeToString()


class _ReflectionService:
    def __init__(self, inner: Any, boundary: Boundary, streams: Streams) -> None:
        self._inner = inner
        self._boundary = boundary
        self._streams = streams

    async def ServerReflectionInfo(  # noqa: N802
        self, raws: AsyncIterator[bytes], context: Any
    ) -> AsyncGenerator[bytes]:
        answering = self._streams.pacing(partial(self._answers, raws, context))
        name = "ServerReflectionInfo"
        async for each in self._boundary.stream(context, name, answering):
            yield each

    async def _answers(
        self, raws: AsyncIterator[bytes], context: Any, call: Call
    ) -> AsyncGenerator[bytes]:
        arriving = self._streams.arriving(self._boundary.requests(raws, call))
        asked = (_reflection_request(raw) async for raw in arriving)
        async for answer in self._inner.ServerReflectionInfo(asked, context):
            yield answer.SerializeToString()


def _reflection_request(raw: bytes) -> reflection_pb2.ServerReflectionRequest:
    try:
        _check_length(raw)
        return reflection_pb2.ServerReflectionRequest.FromString(raw)
    except DecodeError:
        raise unreadable() from None


def _health_request(raw: bytes) -> health_pb2.HealthCheckRequest:
    _check_length(raw)
    return health_pb2.HealthCheckRequest.FromString(raw)


def _check_length(raw: bytes) -> None:
    if len(raw) > _REQUEST_BYTES:
        raise DecodeError("it is larger than any such message has to be")


_HEALTH: Mapping[str, Handler] = {
    "Check": (
        grpc.unary_unary_rpc_method_handler,
        _health_request,
        health_pb2.HealthCheckResponse.SerializeToString,
    ),
    "Watch": (grpc.unary_stream_rpc_method_handler, _health_request, None),
}
_REFLECTION: Mapping[str, Handler] = {
    "ServerReflectionInfo": (grpc.stream_stream_rpc_method_handler, None, None),
}
