"""The servicer of AdminService: tells whoever runs the server how it is."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import grpc
import grpc.aio

from jacserve.v1 import admin_pb2, jacobian_pb2
from jacserve_server.callers import Call
from jacserve_server.calls import Boundary, Handler, add_handlers
from jacserve_server.overview import Overview


class AdminService:
    """Answers the calls of the contract that concern the server itself."""

    def __init__(
        self,
        overview: Overview,
        release: Callable[[str], jacobian_pb2.Function],
        boundary: Boundary,
    ) -> None:
        """Keeps its collaborators.

        Args:
            overview: Tells how the server is.
            release: Has a function run again, and describes it; raises ServiceError
                where there is none of the name.
            boundary: Lets calls in, and turns failures into their statuses.
        """
        self._overview = overview
        self._release = release
        self._boundary = boundary

    async def GetStatus(  # noqa: N802, D102
        self, request: admin_pb2.GetStatusRequest, context: Any
    ) -> admin_pb2.ServerStatus:
        return await self._boundary.answer(
            context, "GetStatus", admin_pb2.ServerStatus, self._status
        )

    async def ReleaseFunction(  # noqa: N802, D102
        self, request: admin_pb2.ReleaseFunctionRequest, context: Any
    ) -> jacobian_pb2.Function:
        answering = partial(self._released, request)
        return await self._boundary.answer(
            context, "ReleaseFunction", jacobian_pb2.Function, answering
        )

    async def _status(self, call: Call) -> admin_pb2.ServerStatus:
        return await self._overview.status()

    async def _released(
        self, request: admin_pb2.ReleaseFunctionRequest, call: Call
    ) -> jacobian_pb2.Function:
        return self._release(request.name)


_HANDLERS: Mapping[str, Handler] = {
    "GetStatus": (
        grpc.unary_unary_rpc_method_handler,
        admin_pb2.GetStatusRequest.FromString,
        admin_pb2.ServerStatus.SerializeToString,
    ),
    "ReleaseFunction": (
        grpc.unary_unary_rpc_method_handler,
        admin_pb2.ReleaseFunctionRequest.FromString,
        jacobian_pb2.Function.SerializeToString,
    ),
}


def add_to_server(
    service: AdminService, server: grpc.aio.Server, boundary: Boundary
) -> None:
    """Has a server answer the contract's calls that concern itself.

    Args:
        service: Answers them.
        server: Receives them.
        boundary: Answers calls whose requests can't be read.
    """
    descriptor = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
    add_handlers(descriptor.full_name, service, server, _HANDLERS, boundary)
