"""What the services have in common: failures become the statuses of their calls.

Of the gRPC context only what cluster proxies also offer is used: set_code,
set_details and set_trailing_metadata.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

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
        method: kind(getattr(service, method), read, write)
        for method, (kind, read, write) in handlers.items()
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(descriptor.full_name, made),)
    )
