"""What the services have in common: who may call, and what becomes of failures.

Of the gRPC context only what cluster proxies also offer is used: invocation_metadata,
peer, auth_context, set_code, set_details and set_trailing_metadata.
"""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
)
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from jacserve_server.access import Gate, request_id_of
from jacserve_server.callers import Call
from jacserve_server.errors import ServiceError
from jacserve_server.statuses import explained, status_of

_REQUEST_BYTES = 2**18
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

_Status = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]

M = TypeVar("M", bound=Message | bytes)
# Makes the handler of a call; reads its requests, and writes its responses: None for
# those that are bytes in and out.
Handler = tuple[Any, Any, Any]


class Observer(Protocol):
    """Hears of calls that have ended."""

    def ended(
        self, call: Call | None, method: str, failure: BaseException | None
    ) -> None:
        """Takes note of a call, or of a query of a session.

        Args:
            call: The call; None where it was not let in.
            method: The RPC's name.
            failure: Why it has no answer: a ServiceError, a TimeoutError, or the
                exception of being cancelled; None where it has one.
        """
        ...


class Boundary:
    """Lets calls in, and turns whatever fails into their statuses.

    Attributes:
        observer: Hears of what became of each call.
        arrivals: How many calls have come.
    """

    def __init__(self, gate: Gate, observer: Observer) -> None:
        """Keeps its collaborators.

        Args:
            gate: Lets callers in.
            observer: Hears of what became of each call.
        """
        self.observer = observer
        self.arrivals = 0
        self._gate = gate

    async def answer(
        self,
        context: Any,
        method: str,
        empty: Callable[[], M],
        answering: Callable[[Call], Awaitable[M]],
    ) -> M:
        """Awaits an answer.

        Args:
            context: The call's.
            method: The RPC's name.
            empty: Makes what is answered where there is no answer.
            answering: Makes the answer.

        Returns:
            The answer.
        """
        call: Call | None = None
        self.arrivals += 1
        try:
            call = self._gate.admit(method, context)
            found = await answering(call)
        except asyncio.CancelledError as error:
            self.observer.ended(call, method, error)
            raise
        except Exception as error:
            status = self._fail(context, call, method, error)
            await _refuse(context, status)
            return empty()
        self.observer.ended(call, method, None)
        return found

    async def stream(
        self,
        context: Any,
        method: str,
        answering: Callable[[Call], AsyncGenerator[M]],
    ) -> AsyncGenerator[M]:
        """Yields answers.

        Args:
            context: The call's.
            method: The RPC's name.
            answering: Makes them.

        Yields:
            The answers.
        """
        call: Call | None = None
        self.arrivals += 1
        try:
            call = self._gate.admit(method, context)
            async with aclosing(answering(call)) as answers:
                async for each in answers:
                    self._gate.readmit(call)
                    yield each
        except (asyncio.CancelledError, GeneratorExit) as error:
            self.observer.ended(call, method, error)
            raise
        except Exception as error:
            await _refuse(context, self._fail(context, call, method, error))
        else:
            self.observer.ended(call, method, None)

    def admits(self, context: Any, method: str) -> bool:
        """Lets a call in that others answer, or fails it.

        Args:
            context: The call's.
            method: The RPC's name.

        Returns:
            Whether it was let in.
        """
        try:
            self._gate.admit(method, context)
        except Exception as error:
            self._fail(context, None, method, error)
            return False
        return True

    async def requests(
        self, raws: AsyncIterator[bytes], call: Call
    ) -> AsyncGenerator[bytes]:
        """Yields what a call sends, as long as it would be let in.

        Args:
            raws: Serialized requests.
            call: The call.

        Yields:
            The requests.

        Raises:
            ServiceError: It would not be let in any more.
        """
        async for raw in raws:
            self._gate.readmit(call)
            yield raw

    def _fail(
        self, context: Any, call: Call | None, method: str, error: Exception
    ) -> _Status:
        """Sets a call's status to what was raised, and returns it."""
        request_id = call.request_id if call is not None else request_id_of(context)
        failure = explained(error, request_id)
        status = status_of(failure, request_id).SerializeToString()
        trailer = (("grpc-status-details-bin", status),)
        code = _STATUS_CODES[failure.code]
        context.set_code(code)
        context.set_details(failure.message)
        context.set_trailing_metadata(trailer)
        self.observer.ended(call, method, failure)
        return code, failure.message, trailer


async def _refuse(context: Any, status: _Status) -> None:
    """Ends a call without a message where a client should try again.

    An answer has headers and a message, even an empty one, and with these gRPC's own
    retries take a call for answered. Behind proxies that offer no `abort` that is so.
    """
    abort = getattr(context, "abort", None)
    if abort is not None and status[0] is grpc.StatusCode.UNAVAILABLE:
        await abort(*status)


def add_handlers(
    name: str,
    service: object,
    server: grpc.aio.Server,
    handlers: Mapping[str, Handler],
    boundary: Boundary,
) -> None:
    """Has a server answer the calls of a service.

    Args:
        name: The service's full name.
        service: Has a method for each call, of its name.
        server: Receives the calls.
        handlers: How the messages of each call are read and written.
        boundary: Answers calls whose requests can't be read.
    """
    made = {
        method: _handler(
            getattr(service, method),
            *handler,
            partial(boundary.answer, method=method, empty=bytes, answering=_unreadable),
        )
        for method, handler in handlers.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, made),))


def _handler(
    call: Callable[..., Any],
    kind: Any,
    read: Any,
    write: Any,
    refuse: Callable[..., Awaitable[bytes]],
) -> Any:
    """Makes the handler of a call, which reads its one request itself.

    What gRPC can't read it answers with a status that says nothing, and logs.
    """
    if read is None:
        return kind(call, None, write)
    if kind is grpc.unary_stream_rpc_method_handler:

        async def stream(raw: bytes, context: Any) -> AsyncIterator[Any]:
            try:
                request = _read(read, raw)
            except DecodeError:
                await refuse(context)
                return
            async with aclosing(call(request, context)) as answers:
                async for each in answers:
                    yield each

        return kind(stream, None, write)

    async def unary(raw: bytes, context: Any) -> Any:
        try:
            request = _read(read, raw)
        except DecodeError:
            return await refuse(context)
        found = await call(request, context)
        return found if write is None else write(found)

    return kind(unary, None, None)


def _read(read: Callable[[bytes], Any], raw: bytes) -> Any:
    # Small messages all, without tensors: a large one is parsed for nothing.
    if len(raw) > _REQUEST_BYTES:
        raise DecodeError("it is larger than any such message has to be")
    return read(raw)


def unreadable() -> ServiceError:
    """Makes the error of a request that can't be read."""
    return ServiceError(
        "MALFORMED_REQUEST",
        "the request can't be read. Send messages as the contract has them.",
    )


async def _unreadable(call: Call) -> bytes:
    raise unreadable()
