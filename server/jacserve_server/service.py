"""The servicer of JacobianService: decode, submit, encode."""

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Mapping,
)
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
from google.rpc import code_pb2, status_pb2

from jacserve.framing import PIECE_BYTES, Frame
from jacserve.streaming import Assembly, StreamError
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import Quantity
from jacserve_server.admission import shutting_down
from jacserve_server.callers import Call
from jacserve_server.calls import Boundary, Handler, Observer, add_handlers
from jacserve_server.catalog import Catalog
from jacserve_server.errors import ServiceError
from jacserve_server.messages import (
    decode_sparsity_query,
    encode_sparsity,
    pattern_bytes,
    result_bytes,
)
from jacserve_server.planning import plan_sparsity
from jacserve_server.query import Query
from jacserve_server.replies import ReplyWriter
from jacserve_server.requests import Request, RequestReader
from jacserve_server.result_sizes import check_message_size, check_patterned_size
from jacserve_server.scheduler import Scheduler
from jacserve_server.sessions import Session
from jacserve_server.signature import FunctionSpec
from jacserve_server.statuses import explained, status_of
from jacserve_server.streams import Streams
from jacserve_server.work import Outcome

T = TypeVar("T")

_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000


class JacobianService:
    """Answers the calls of the contract.

    Messages with tensors come and go serialized: see `add_to_server`.
    """

    def __init__(
        self,
        catalog: Catalog,
        scheduler: Scheduler[Any],
        describe: Callable[[FunctionSpec], pb.Function],
        max_payload_bytes: int,
        boundary: Boundary,
        streams: Streams,
        *,
        max_rank: int,
        session_idle_s: float,
    ) -> None:
        """Keeps its collaborators.

        Args:
            catalog: The functions.
            scheduler: Executes queries.
            describe: Returns what clients are told of a function.
            max_payload_bytes: The most that the arrays of a query may take, and those
                of an answer.
            boundary: Lets calls in, and turns failures into their statuses.
            streams: Counts streams, and ends those that stand still.
            max_rank: The most axes of an array in a query.
            session_idle_s: Seconds after which a session is ended that is not used; 0
                for never.
        """
        self._boundary = boundary
        self._streams = streams
        self._session_idle_s = session_idle_s
        self._max_payload_bytes = max_payload_bytes
        self._catalog = catalog
        self._scheduler = scheduler
        self._describe = describe
        self._found = ""
        self._reader = RequestReader(self._find, max_rank=max_rank)
        self._writer = ReplyWriter()
        self._is_closed = False
        self._sessions: set[Session] = set()

    async def ListFunctions(  # noqa: N802, D102
        self, request: pb.ListFunctionsRequest, context: Any
    ) -> pb.ListFunctionsResponse:
        answering = partial(self._list, request)
        return await self._boundary.answer(
            context, "ListFunctions", pb.ListFunctionsResponse, answering
        )

    async def GetFunction(  # noqa: N802, D102
        self, request: pb.GetFunctionRequest, context: Any
    ) -> pb.Function:
        answering = partial(self._get, request)
        return await self._boundary.answer(
            context, "GetFunction", pb.Function, answering
        )

    async def GetSparsity(  # noqa: N802, D102
        self, request: pb.GetSparsityRequest, context: Any
    ) -> bytes:
        answering = partial(self._sparsity, request)
        return await self._boundary.answer(context, "GetSparsity", bytes, answering)

    async def Evaluate(self, request: bytes, context: Any) -> bytes:  # noqa: N802, D102
        answering = partial(self.evaluate, request)
        return await self._boundary.answer(context, "Evaluate", bytes, answering)

    async def EvaluateStream(  # noqa: N802, D102
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        answering = self._streams.pacing(partial(self._evaluate_stream, requests))
        parts = self._boundary.stream(context, "EvaluateStream", answering)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def Session(  # noqa: N802, D102
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        answering = self._streams.pacing(partial(self._session, requests))
        answers = self._boundary.stream(context, "Session", answering)
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    async def _session(
        self, requests: AsyncIterator[bytes], call: Call
    ) -> AsyncGenerator[bytes]:
        session = Session(
            _Answerer(self, call, self._boundary.observer),
            idle_s=self._session_idle_s,
        )
        if self._is_closed:
            raise shutting_down()
        self._sessions.add(session)
        try:
            raws = self._boundary.requests(requests, call)
            async with aclosing(session.answers(raws)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self._sessions.discard(session)

    def close_sessions(self) -> None:
        """Ends sessions, also new ones, as unavailable, once all is answered."""
        self._is_closed = True
        for session in self._sessions:
            session.close()

    async def _list(
        self, request: pb.ListFunctionsRequest, call: Call
    ) -> pb.ListFunctionsResponse:
        specs = self._catalog.specs
        token, size = request.page_token, request.page_size
        if size < 0:
            raise ServiceError(
                "MALFORMED_REQUEST",
                f"page_size is {size}. Pass 1 to {_LARGEST_PAGE}, or 0 for "
                f"{_DEFAULT_PAGE}.",
                field="page_size",
                page_size=size,
            )
        tokens = {str(place) for place in range(1, len(specs))}
        if token and token not in tokens:
            raise ServiceError(
                "MALFORMED_REQUEST",
                "page_token is not one that this server gave out. Pass the "
                "next_page_token of the page before, or nothing for the first.",
                field="page_token",
            )
        start = int(token or 0)
        end = start + min(size or _DEFAULT_PAGE, _LARGEST_PAGE)
        return pb.ListFunctionsResponse(
            functions=list(map(self._describe, specs[start:end])),
            next_page_token=str(end) if end < len(specs) else "",
        )

    async def _get(self, request: pb.GetFunctionRequest, call: Call) -> pb.Function:
        return self.describe(request.name)

    def describe(self, name: str) -> pb.Function:
        """Describes a function.

        Args:
            name: Its name, perhaps with a version.

        Returns:
            The description.

        Raises:
            ServiceError: There is none.
        """
        return self._describe(self._catalog.find(name).spec)

    async def _sparsity(self, request: pb.GetSparsityRequest, call: Call) -> bytes:
        with self._scheduler.admitted(request.ByteSize(), call.client):
            function = self._catalog.find(request.name).spec
            call.function = function.qualified_name
            sought = plan_sparsity(decode_sparsity_query(request), function)
            found = await self._scheduler.sparsity(sought, call.client)
            size_bytes, most = (
                pattern_bytes(found.pattern, "coo"),
                self._max_payload_bytes,
            )
            check_patterned_size(function.resource, size_bytes, most)
            answer = encode_sparsity(found, sought, function)
            return Frame(answer.message).filled(answer.payloads)

    def evaluate_now(self, raw: bytes, call: Call) -> bytes | None:
        """Evaluates a brief query whose program is compiled; None where it must wait.

        Args:
            raw: A serialized Query.
            call: Who asks.

        Returns:
            A serialized Result.

        Raises:
            ServiceError: It can't be evaluated.
        """
        with self._scheduler.admitted(len(raw), call.client):
            request = self._read(raw, call)
            outcome = self._scheduler.now(request.work, max_result_bytes=PIECE_BYTES)
            if outcome is None:
                return None
            _note_times(call, outcome)
            self._check(outcome, request.query, PIECE_BYTES)
            return self._writer.write(outcome, request.query)

    async def evaluate(self, raw: bytes, call: Call) -> bytes:
        """Evaluates a query.

        Args:
            raw: A serialized Query.
            call: Who asks.

        Returns:
            A serialized Result.

        Raises:
            ServiceError: It can't be evaluated.
        """
        with self._scheduler.admitted(len(raw), call.client) as ticket:
            request = self._read(raw, call)
            outcome = self._scheduler.now(request.work, max_result_bytes=PIECE_BYTES)
            if outcome is None:
                outcome = await self._scheduler.submit(
                    request.work, ticket, max_result_bytes=PIECE_BYTES
                )
            _note_times(call, outcome)
            self._check(outcome, request.query, PIECE_BYTES)
            return self._writer.write(outcome, request.query)

    def _read(self, raw: bytes, call: Call) -> Request:
        request = self._named(call, self._reader.read, raw)
        call.function = request.work.computation.function
        if len(raw) > self._max_payload_bytes:
            self._check_query_size(sum(x.nbytes for x in request.work.arrays))
        return request

    def _named(self, call: Call, read: Callable[..., T], *arguments: Any) -> T:
        """Reads, and notes what function is meant, also where that is all that fits."""
        self._found = ""
        try:
            return read(*arguments)
        finally:
            call.function = self._found

    def _find(self, name: str) -> FunctionSpec:
        spec = self._catalog.find(name).spec
        self._found = spec.qualified_name
        return spec

    async def _evaluate_stream(
        self, requests: AsyncIterator[bytes], call: Call
    ) -> AsyncGenerator[bytes]:
        raws = self._streams.arriving(self._boundary.requests(requests, call))
        raw = await anext(raws, None)
        if raw is None:
            raise _broken("it has no head. Send one, then the pieces.")
        head = self._named(call, self._reader.read_head, raw)
        self._check_query_size(head.size_bytes)
        with self._scheduler.admitted(head.size_bytes, call.client) as ticket:
            assembly = Assembly(head.raw, head.holes)
            try:
                async for raw in raws:
                    assembly.feed(raw)
            except StreamError as error:
                raise _broken(str(error)) from error
            if not assembly.is_complete:
                raise _broken("it ends before its last piece. Send all of them.")
            read = self._reader.read_streamed
            request = self._named(call, read, head, assembly.payloads)
            outcome = await self._scheduler.submit(request.work, ticket)
            _note_times(call, outcome)
            self._check(outcome, request.query)
            for part in self._writer.write_parts(outcome, request.query):
                yield part

    def _check(
        self, outcome: Outcome, query: Query, max_result_bytes: int | None = None
    ) -> None:
        if query.require_finite:
            _check_finite(outcome, query.quantities)
        if outcome.outline.patterns or query.patterns:
            _check_patterns(outcome, query)
            resource = f"functions/{outcome.outline.function}"
            size_bytes = result_bytes(outcome, query)
            check_patterned_size(resource, size_bytes, self._max_payload_bytes)
            check_message_size(size_bytes, max_result_bytes)

    def _check_query_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_payload_bytes:
            raise ServiceError(
                "QUERY_TOO_LARGE",
                f"the arrays of the query take {size_bytes} bytes, but this server "
                f"takes at most {self._max_payload_bytes}. Send fewer points at once, "
                "or raise the server's max_payload_bytes.",
                query_bytes=size_bytes,
                max_query_bytes=self._max_payload_bytes,
            )


def _note_times(call: Call, outcome: Outcome) -> None:
    call.queue_s, call.compile_s = outcome.queue_s, outcome.compile_s
    call.execute_s = outcome.execute_s


def _broken(problem: str) -> ServiceError:
    return ServiceError("STREAM_BROKEN", f"the stream is broken: {problem}")


# How the messages of each call are read and written; those with tensors by jacserve
# itself.
_HANDLERS: Mapping[str, Handler] = {
    "ListFunctions": (
        grpc.unary_unary_rpc_method_handler,
        pb.ListFunctionsRequest.FromString,
        pb.ListFunctionsResponse.SerializeToString,
    ),
    "GetFunction": (
        grpc.unary_unary_rpc_method_handler,
        pb.GetFunctionRequest.FromString,
        pb.Function.SerializeToString,
    ),
    "GetSparsity": (
        grpc.unary_unary_rpc_method_handler,
        pb.GetSparsityRequest.FromString,
        None,
    ),
    "Evaluate": (grpc.unary_unary_rpc_method_handler, None, None),
    "EvaluateStream": (grpc.stream_stream_rpc_method_handler, None, None),
    "Session": (grpc.stream_stream_rpc_method_handler, None, None),
}


def add_to_server(
    service: JacobianService, server: grpc.aio.Server, boundary: Boundary
) -> None:
    """Has a server answer the contract's calls.

    Args:
        service: Answers them.
        server: Receives them.
        boundary: Answers calls whose requests can't be read.
    """
    descriptor = pb.DESCRIPTOR.services_by_name["JacobianService"]
    add_handlers(descriptor.full_name, service, server, _HANDLERS, boundary)


def _check_patterns(outcome: Outcome, query: Query) -> None:
    outline = outcome.outline
    found = {pattern.hash for pattern in outline.patterns.values()}
    for place, pattern in enumerate(query.patterns):
        if pattern not in found:
            raise ServiceError(
                "PATTERN_UNKNOWN",
                f"functions/{outline.function} does not have the sparsity pattern "
                f"{pattern} now. Ask again without naming it.",
                field=f"patterns[{place}]",
                function=f"functions/{outline.function}",
                pattern=pattern,
            )


def _check_finite(outcome: Outcome, quantities: tuple[Quantity, ...]) -> None:
    finite, resource = outcome.finite, f"functions/{outcome.outline.function}"
    if finite.all():
        return
    where = ""
    if finite.ndim:
        count, first = np.count_nonzero(~finite), np.argmin(finite)
        where = f" at {count} of {len(finite)} points, the first at row {first}"
    raise ServiceError(
        "RESULT_NOT_FINITE",
        f"{', '.join(quantities)} of {resource} has NaN or Inf"
        f"{where}. Pass other points, or leave require_finite out to have it "
        "delivered.",
        field="require_finite",
        function=resource,
        points=finite.size,
        non_finite=np.count_nonzero(~finite),
    )


class _Answerer:
    """Answers the queries of one client's session, each a call of its own."""

    def __init__(
        self, service: JacobianService, stream: Call, observer: Observer
    ) -> None:
        self._service = service
        self._stream = stream
        self._observer = observer

    def begun(self) -> Call:
        stream = self._stream
        start = time.perf_counter()
        return Call("Session", stream.caller, stream.request_id, start, True)

    def answer_now(self, raw: bytes, call: Call) -> bytes | None:
        return self._service.evaluate_now(raw, call)

    async def answer(self, raw: bytes, call: Call) -> bytes:
        return await self._service.evaluate(raw, call)

    def answered(self, call: Call) -> None:
        self._observer.ended(call, "Session", None)

    def failed(self, call: Call, error: BaseException) -> bytes:
        if isinstance(error, asyncio.CancelledError):
            status = status_pb2.Status(code=code_pb2.CANCELLED, message="cancelled")
        elif isinstance(error, TimeoutError):
            status = status_pb2.Status(
                code=code_pb2.DEADLINE_EXCEEDED, message="Deadline Exceeded"
            )
        else:
            error = explained(error, call.request_id)
            status = status_of(error, call.request_id)
        self._observer.ended(call, "Session", error)
        return status.SerializeToString()
