"""What can go wrong, as exceptions.

JacobianError                    every failure of a call
├── InvalidRequestError          a bad argument              (also a ValueError)
├── NotFoundError                an unknown function or job  (also a LookupError)
├── PreconditionError            the call can't be answered as it was asked
│   └── NonFiniteError           NaN or Inf was refused      (also an ArithmeticError)
├── CapacityError                too large for the server
├── OverloadedError              too busy now: see retry_after_s
├── AccessError                  who calls may not           (also a PermissionError)
├── UnavailableError             no server, or it is going   (also a ConnectionError)
├── DeadlineError                out of time                 (also a TimeoutError)
├── CancelledError               the call was cancelled
└── ServerError                  a fault of the server
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import (  # pyright: ignore[reportMissingTypeStubs]
    error_details_pb2,
    status_pb2,
)


class JacobianError(Exception):
    """A call failed.

    Attributes:
        code: The gRPC status code's name, such as "INVALID_ARGUMENT".
        reason: The contract's ErrorReason, such as "SHAPE_MISMATCH"; empty when
            the failure did not come from a jacserve server.
        metadata: The values that the message speaks of, by name.
        field: The field of the request that is at fault; empty when none is.
        request_id: Finds the call in the server's log; empty when it has none.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field: str = "",
        request_id: str = "",
    ) -> None:
        """Keeps the message and its particulars."""
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field = field
        self.request_id = request_id
        if request_id:
            self.add_note(f"(request {request_id})")  # Shown below a traceback.


class InvalidRequestError(JacobianError, ValueError):
    """An argument of the call is wrong; the message says which and how to mend it."""


class NotFoundError(JacobianError, LookupError):
    """No function has that name and version, or no job has that id."""


class PreconditionError(JacobianError):
    """The call can't be answered as it was asked."""


class NonFiniteError(PreconditionError, ArithmeticError):
    """The result has NaN or Inf, and the call refused them."""


class CapacityError(JacobianError):
    """The request or its result is too large for the server."""


class OverloadedError(JacobianError):
    """The server has too much to do.

    Attributes:
        retry_after_s: Seconds after which a new attempt makes sense.
    """

    retry_after_s: float = 0.0


class AccessError(JacobianError, PermissionError):
    """Who calls did not say who they are, or may not make this call.

    Its code is "UNAUTHENTICATED" or "PERMISSION_DENIED".
    """


class UnavailableError(JacobianError, ConnectionError):
    """No server answers at the target, or it is shutting down.

    Attributes:
        is_cut_off: Whether the connection broke when the call was on its way: what was
            asked may have ended the server.
    """

    is_cut_off: bool = False


class DeadlineError(JacobianError, TimeoutError):
    """The call's timeout_s passed before the answer came.

    Or the server's own budget for a program did, where its reason is
    "TIME_BUDGET_SPENT": a larger timeout_s is of no use then.
    """


class CancelledError(JacobianError):
    """The call was cancelled."""


class ServerError(JacobianError):
    """The server failed; its log knows more under the request id."""


BY_REASON: Mapping[str, type[JacobianError]] = {
    "RESULT_NOT_FINITE": NonFiniteError,
    "QUEUE_FULL": OverloadedError,
    "TOO_MANY_STREAMS": OverloadedError,
    "COMPILE_BUDGET_SPENT": OverloadedError,
    # The connection was given up, as by a server that goes away.
    "STREAM_IDLE": UnavailableError,
    # Not the one who calls is refused, but the path that was named.
    "SOURCE_FORBIDDEN": InvalidRequestError,
    # The server answers: it is its storage that does not.
    "STORAGE_UNAVAILABLE": PreconditionError,
}

BY_CODE: Mapping[str, type[JacobianError]] = {
    "CANCELLED": CancelledError,
    "UNKNOWN": ServerError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": PreconditionError,
    "PERMISSION_DENIED": AccessError,
    "UNAUTHENTICATED": AccessError,
    "RESOURCE_EXHAUSTED": CapacityError,
    "FAILED_PRECONDITION": PreconditionError,
    "ABORTED": ServerError,
    "OUT_OF_RANGE": InvalidRequestError,
    "UNIMPLEMENTED": ServerError,
    "INTERNAL": ServerError,
    "UNAVAILABLE": UnavailableError,
    "DATA_LOSS": ServerError,
}


@contextmanager
def translated(target: str) -> Generator[None]:
    """Turns the gRPC errors of a block into this module's exceptions.

    Args:
        target: The address called, for messages.

    Raises:
        JacobianError: The block raised a grpc.RpcError.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(cast("grpc.Call", error), target) from error


def unreadable(error: Exception) -> ServerError:
    """Makes the error of an answer that can't be read."""
    return ServerError(f"the server's answer can't be read: {error}", code="DATA_LOSS")


@contextmanager
def readable() -> Generator[None]:
    """Has what can't be read in an answer be one error, whatever is wrong with it.

    Raises:
        ServerError: The block raised what reading raises.
    """
    try:
        yield
    except (DecodeError, LookupError, ValueError, OverflowError, MemoryError) as error:
        raise unreadable(error) from error


def from_rpc_error(error: grpc.Call, target: str) -> JacobianError:
    """Makes an exception of a failed call: by its reason, else by its code.

    Args:
        error: The error that grpc raised, of either of its two clients.
        target: The address called, for messages.

    Returns:
        The exception to raise.
    """
    status = status_pb2.Status()
    for key, value in cast("Any", error.trailing_metadata()) or ():
        if key == "grpc-status-details-bin":
            try:
                status.ParseFromString(value)
            except DecodeError:
                status.Clear()
    status.message = error.details() or ""
    code = error.code().name
    if code == "CANCELLED" and not status.details and not _is_local(status.message):
        return UnavailableError(
            f"{target} dropped the call ({status.message or code}), as a server does "
            "that goes away. Try again.",
            code=code,
        )
    exception = _from_status(code, status, target)
    if isinstance(exception, UnavailableError) and not exception.reason:
        exception.is_cut_off = not _is_unsent(status.message)
    return exception


# What gRPC says where it has no connection to send a call by.
_UNSENT = (
    "failed to connect",
    "all backends failing",
    "dns resolution failed",
    "empty address list",
)


def _is_unsent(message: str) -> bool:
    """Whether a call found no server, by the words that gRPC has for it."""
    return any(sign in message.lower() for sign in _UNSENT)


def _is_local(message: str) -> bool:
    """Whether a call was cancelled on this side, by the words that gRPC has for it."""
    return message.startswith(("Locally cancelled", "Channel closed"))


def from_status(status: status_pb2.Status, target: str) -> JacobianError:
    """Makes an exception of a failure that came as a message.

    Args:
        status: The failure.
        target: The address called, for messages.

    Returns:
        The exception to raise.
    """
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    return _from_status(names.get(status.code, "UNKNOWN"), status, target)


def _from_status(code: str, status: status_pb2.Status, target: str) -> JacobianError:
    info = _detail(status, error_details_pb2.ErrorInfo)
    request = _detail(status, error_details_pb2.RequestInfo)
    violations = _detail(status, error_details_pb2.BadRequest).field_violations
    message = status.message or code
    exception = BY_REASON.get(info.reason, BY_CODE.get(code, JacobianError))(
        message if info.reason else _without_reason(code, message, target),
        code=code,
        reason=info.reason,
        metadata=info.metadata,
        field=violations[0].field if violations else "",
        request_id=request.request_id,
    )
    if isinstance(exception, OverloadedError):
        retry = _detail(status, error_details_pb2.RetryInfo)
        exception.retry_after_s = retry.retry_delay.seconds + (
            retry.retry_delay.nanos * 1e-9
        )
    return exception


def _without_reason(code: str, message: str, target: str) -> str:
    """Says what a failure below the contract means to the caller."""
    hints: Mapping[str, Callable[[], str]] = {
        "RESOURCE_EXHAUSTED": lambda: (
            f"{message}. Send fewer points at once, or ask by EvaluateStream."
        ),
        "UNAVAILABLE": lambda: _unreachable(message, target),
        "DEADLINE_EXCEEDED": lambda: (
            f"{target} did not answer in time. Pass a larger timeout_s: the first "
            "call of a function for new shapes also compiles it."
        ),
        "UNIMPLEMENTED": lambda: (
            f"The server at {target} does not know this call ({message}). Check that "
            "it is a jacserve server of this version."
        ),
    }
    return hints.get(code, lambda: message)()


# What gRPC says of TLS, and what it comes from.
_TLS_FAILURES = {
    "WRONG_VERSION_NUMBER": "The server speaks no TLS: connect without, or start it "
    "with a certificate.",
    "Hostname Verification": "The server's certificate has another name: pass "
    "server_name, or connect to a name that it has.",
    "CERTIFICATE_VERIFY_FAILED": "No authority that is trusted here has signed the "
    "server's certificate, or it has expired: pass ca.",
    "handshake": "Check ca and server_name; and certificate and key, which a server "
    "may ask for.",
}


def _unreachable(message: str, target: str) -> str:
    for sign, advice in _TLS_FAILURES.items():
        if sign.lower() in message.lower():
            return f"No connection to {target} by TLS ({message}). {advice}"
    return (
        f"No server answers at {target} ({message}). Start one with "
        "`jacserve serve FILE`, or check the address, and whether it takes TLS."
    )


_M = TypeVar("_M", bound=Message)


def _detail(status: status_pb2.Status, kind: type[_M]) -> _M:
    """Returns the first detail of a kind; an empty one when none can be read."""
    found = kind()
    for detail in status.details:
        try:
            if detail.Unpack(found):
                break
        except DecodeError:
            found.Clear()
    return found
