"""What the services have in common: failures become the statuses of their calls.

Of the gRPC context only what cluster proxies also offer is used: set_code,
set_details and set_trailing_metadata.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from jacserve_server.errors import ServiceError
from jacserve_server.statuses import explained, status_of

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

M = TypeVar("M", bound=Message | bytes)
# Makes the handler of a call; reads its requests, and writes its responses: None for
# those that are bytes in and out.
Handler = tuple[Any, Any, Any]


async def answer(context: Any, empty: Callable[[], M], answering: Awaitable[M]) -> M:
    """Awaits an answer; turns whatever it raises into the call's status.

    Args:
        context: The call's.
        empty: Makes what is answered then.
        answering: Makes the answer.

    Returns:
        The answer.
    """
    try:
        return await answering
    except Exception as error:
        set_error(context, error)
        return empty()


def set_error(context: Any, error: BaseException) -> None:
    """Sets a call's status to what was raised.

    Args:
        context: The call's.
        error: What was raised.
    """
    failure, request_id = explained(error)
    status = status_of(failure, request_id).SerializeToString()
    context.set_code(_STATUS_CODES[failure.code])
    context.set_details(failure.message)
    context.set_trailing_metadata((("grpc-status-details-bin", status),))


def add_handlers(
    descriptor: ServiceDescriptor,
    service: object,
    server: grpc.aio.Server,
    handlers: Mapping[str, Handler],
) -> None:
    """Has a server answer the calls of a service.

    Args:
        descriptor: The service in the contract.
        service: Has a method for each call, of its name.
        server: Receives the calls.
        handlers: How the messages of each call are read and written.
    """
    made = {
        method: _handler(getattr(service, method), *handler)
        for method, handler in handlers.items()
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(descriptor.full_name, made),)
    )


def _handler(call: Callable[..., Any], kind: Any, read: Any, write: Any) -> Any:
    """Makes the handler of a call, which reads its one request itself.

    What gRPC can't read it answers with a status that says nothing, and logs.
    """
    if read is None:
        return kind(call, None, write)
    if kind is grpc.unary_stream_rpc_method_handler:

        async def stream(raw: bytes, context: Any) -> AsyncIterator[Any]:
            if (request := _read(read, raw, context)) is not None:
                async with aclosing(call(request, context)) as answers:
                    async for each in answers:
                        yield each

        return kind(stream, None, write)

    async def unary(raw: bytes, context: Any) -> Any:
        if (request := _read(read, raw, context)) is None:
            return b""
        found = await call(request, context)
        return found if write is None else write(found)

    return kind(unary, None, None)


def _read(read: Callable[[bytes], M], raw: bytes, context: Any) -> M | None:
    """Returns a request; None, with the call's status set, where it is none."""
    try:
        return read(raw)
    except DecodeError:
        set_error(
            context,
            ServiceError(
                "MALFORMED_REQUEST",
                "the request can't be read. Send messages as the contract has them.",
            ),
        )
        return None
