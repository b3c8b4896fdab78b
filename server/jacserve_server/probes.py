"""Health and reflection, for who may ask: for all, or guarded as the RPCs are."""

from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from jacserve_server.calls import Boundary


def add_health(health: Any, server: grpc.aio.Server, boundary: Boundary | None) -> None:
    """Has a server answer the calls of health.

    Args:
        health: The servicer.
        server: Receives the calls.
        boundary: Lets calls in; None to let all in.
    """
    servicer = health if boundary is None else _GuardedHealth(health, boundary)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


def add_reflection(
    services: Iterable[str], server: grpc.aio.Server, boundary: Boundary | None
) -> None:
    """Has a server answer the calls of reflection.

    Args:
        services: The full names of the services to tell of.
        server: Receives the calls.
        boundary: Lets calls in; None to let all in.
    """
    servicer: Any = reflection.aio.ReflectionServicer(services)  # pyright: ignore[reportAttributeAccessIssue]
    if boundary is not None:
        servicer = _GuardedReflection(servicer, boundary)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)


class _GuardedHealth(health_pb2_grpc.HealthServicer):
    def __init__(self, health: Any, boundary: Boundary) -> None:
        self._health = health
        self._boundary = boundary

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._boundary.admits(context, "Check"):
            return await self._health.Check(request, context)
        return health_pb2.HealthCheckResponse()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        if self._boundary.admits(context, "Watch"):
            await self._health.Watch(request, context)


class _GuardedReflection(reflection_pb2_grpc.ServerReflectionServicer):
    def __init__(self, inner: Any, boundary: Boundary) -> None:
        self._inner = inner
        self._boundary = boundary

    async def ServerReflectionInfo(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        if not self._boundary.admits(context, "ServerReflectionInfo"):
            return
        async for each in self._inner.ServerReflectionInfo(request_iterator, context):
            yield each
