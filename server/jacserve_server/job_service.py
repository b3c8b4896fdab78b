"""The servicer of JobService: decodes what clients ask of jobs, and asks the desk."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from jacserve.v1 import jobs_pb2
from jacserve_server.access import owner_of
from jacserve_server.admission import shutting_down
from jacserve_server.callers import Call
from jacserve_server.calls import Boundary, Handler, add_handlers
from jacserve_server.streams import Streams

if TYPE_CHECKING:
    from jacserve_server.jobs.desk import JobDesk


class JobService:
    """Answers the calls of the contract that concern jobs.

    Messages with tensors come and go serialized: see `add_to_server`.
    """

    def __init__(
        self,
        open_desk: "Callable[[], JobDesk]",
        boundary: Boundary,
        streams: Streams,
    ) -> None:
        """Opens nothing yet.

        Args:
            open_desk: Opens the desk; it may block, and raise ServiceError. It is
                called in a thread, when it is first needed.
            boundary: Lets calls in, and turns failures into their statuses.
            streams: Counts streams, and ends those that stand still.
        """
        self._streams = streams
        self._boundary = boundary
        self._open_desk = open_desk
        self._opening: asyncio.Task[JobDesk] | None = None
        self._desk: JobDesk | None = None
        self._is_stopped = False

    async def desk(self) -> "JobDesk":
        """Returns the desk, opened and running jobs.

        Raises:
            ServiceError: It can't be opened, or the server is shutting down.
        """
        if self._is_stopped:
            raise shutting_down()
        if self._desk is not None:
            return self._desk
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
            # All who ask may leave: the loop would complain that it has failed.
            self._opening.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )
        # Whoever has asked first may leave: the desk is everybody's.
        return await asyncio.shield(self._opening)

    async def _open(self) -> "JobDesk":
        try:
            self._desk = await asyncio.to_thread(self._open_desk)
            if not self._is_stopped:
                self._desk.start()
            return self._desk
        finally:
            self._opening = None

    async def counts(self) -> Mapping[str, int]:
        """Returns how many jobs are in each state; none before jobs were asked for.

        Raises:
            ServiceError: The table can't be read.
        """
        return {} if self._desk is None else await self._desk.counts()

    async def stop(self) -> None:
        """Stops all jobs; they go on when a server starts again."""
        self._is_stopped = True
        if self._opening is not None:
            await asyncio.wait([self._opening])
        if self._desk is not None:
            await self._desk.stop()

    async def close(self) -> None:
        """Lets go of all files, when no call is answered any more."""
        if self._desk is not None:
            await asyncio.to_thread(self._desk.close)

    async def CreateJob(  # noqa: N802, D102
        self, requests: AsyncIterator[bytes], context: Any
    ) -> jobs_pb2.Job:
        answering = partial(self._create, requests)
        return await self._boundary.answer(
            context, "CreateJob", jobs_pb2.Job, answering
        )

    async def GetJob(  # noqa: N802, D102
        self, request: jobs_pb2.GetJobRequest, context: Any
    ) -> jobs_pb2.Job:
        answering = partial(self._get, request)
        return await self._boundary.answer(context, "GetJob", jobs_pb2.Job, answering)

    async def ListJobs(  # noqa: N802, D102
        self, request: jobs_pb2.ListJobsRequest, context: Any
    ) -> jobs_pb2.ListJobsResponse:
        answering = partial(self._list, request)
        return await self._boundary.answer(
            context, "ListJobs", jobs_pb2.ListJobsResponse, answering
        )

    async def WatchJob(  # noqa: N802, D102
        self, request: jobs_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        answering = self._streams.pacing(partial(self._watch, request))
        parts = self._boundary.stream(context, "WatchJob", answering)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def CancelJob(  # noqa: N802, D102
        self, request: jobs_pb2.CancelJobRequest, context: Any
    ) -> jobs_pb2.Job:
        answering = partial(self._cancel, request)
        return await self._boundary.answer(
            context, "CancelJob", jobs_pb2.Job, answering
        )

    async def DeleteJob(  # noqa: N802, D102
        self, request: jobs_pb2.DeleteJobRequest, context: Any
    ) -> jobs_pb2.DeleteJobResponse:
        answering = partial(self._delete, request)
        return await self._boundary.answer(
            context, "DeleteJob", jobs_pb2.DeleteJobResponse, answering
        )

    async def ReadJobResult(  # noqa: N802, D102
        self, request: jobs_pb2.ReadJobResultRequest, context: Any
    ) -> AsyncIterator[bytes]:
        answering = self._streams.pacing(partial(self._read, request))
        parts = self._boundary.stream(context, "ReadJobResult", answering)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def _create(self, requests: AsyncIterator[bytes], call: Call) -> jobs_pb2.Job:
        raws = self._boundary.requests(requests, call)
        with self._streams.place(call.client):
            desk = await self.desk()
            arriving = self._streams.arriving(raws)
            return await desk.create(arriving, call.caller.identity)

    async def _get(self, request: jobs_pb2.GetJobRequest, call: Call) -> jobs_pb2.Job:
        owner = owner_of(request.owner, call.caller)
        return await (await self.desk()).get(request.name, owner)

    async def _list(
        self, request: jobs_pb2.ListJobsRequest, call: Call
    ) -> jobs_pb2.ListJobsResponse:
        owner = owner_of(request.owner, call.caller)
        return await (await self.desk()).list(request, owner)

    async def _watch(
        self, request: jobs_pb2.WatchJobRequest, call: Call
    ) -> AsyncGenerator[jobs_pb2.WatchJobResponse]:
        owner = owner_of(request.owner, call.caller)
        desk = await self.desk()
        async with aclosing(desk.watch(request.name, owner)) as news:
            async for job in news:
                yield jobs_pb2.WatchJobResponse(job=job)

    async def _cancel(
        self, request: jobs_pb2.CancelJobRequest, call: Call
    ) -> jobs_pb2.Job:
        owner = owner_of(request.owner, call.caller)
        return await (await self.desk()).cancel(request.name, owner)

    async def _delete(
        self, request: jobs_pb2.DeleteJobRequest, call: Call
    ) -> jobs_pb2.DeleteJobResponse:
        owner = owner_of(request.owner, call.caller)
        await (await self.desk()).delete(request.name, owner)
        return jobs_pb2.DeleteJobResponse()

    async def _read(
        self, request: jobs_pb2.ReadJobResultRequest, call: Call
    ) -> AsyncGenerator[bytes]:
        owner = owner_of(request.owner, call.caller)
        desk = await self.desk()
        async with aclosing(desk.read(request, owner)) as parts:
            async for part in parts:
                yield part


# How the messages of each call are read and written; those with tensors by jacserve
# itself.
_HANDLERS: Mapping[str, Handler] = {
    "CreateJob": (
        grpc.stream_unary_rpc_method_handler,
        None,
        jobs_pb2.Job.SerializeToString,
    ),
    "GetJob": (
        grpc.unary_unary_rpc_method_handler,
        jobs_pb2.GetJobRequest.FromString,
        jobs_pb2.Job.SerializeToString,
    ),
    "ListJobs": (
        grpc.unary_unary_rpc_method_handler,
        jobs_pb2.ListJobsRequest.FromString,
        jobs_pb2.ListJobsResponse.SerializeToString,
    ),
    "WatchJob": (
        grpc.unary_stream_rpc_method_handler,
        jobs_pb2.WatchJobRequest.FromString,
        jobs_pb2.WatchJobResponse.SerializeToString,
    ),
    "CancelJob": (
        grpc.unary_unary_rpc_method_handler,
        jobs_pb2.CancelJobRequest.FromString,
        jobs_pb2.Job.SerializeToString,
    ),
    "DeleteJob": (
        grpc.unary_unary_rpc_method_handler,
        jobs_pb2.DeleteJobRequest.FromString,
        jobs_pb2.DeleteJobResponse.SerializeToString,
    ),
    "ReadJobResult": (
        grpc.unary_stream_rpc_method_handler,
        jobs_pb2.ReadJobResultRequest.FromString,
        None,
    ),
}


def add_to_server(
    service: JobService, server: grpc.aio.Server, boundary: Boundary
) -> None:
    """Has a server answer the contract's calls that concern jobs.

    Args:
        service: Answers them.
        server: Receives them.
        boundary: Answers calls whose requests can't be read.
    """
    descriptor = jobs_pb2.DESCRIPTOR.services_by_name["JobService"]
    add_handlers(descriptor.full_name, service, server, _HANDLERS, boundary)
