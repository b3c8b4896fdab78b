"""Failures as google.rpc.Status, the form in which they leave the server."""

import logging

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from jacserve_server.errors import ServiceError

_log = logging.getLogger(__name__)
# What a resource of a name is, for those that are not there.
_RESOURCES = {
    "FUNCTION_NOT_FOUND": ("jacserve.v1.Function", "function"),
    "JOB_NOT_FOUND": ("jacserve.v1.Job", "job"),
    "JOB_ALREADY_EXISTS": ("jacserve.v1.Job", "job"),
}


def explained(error: BaseException, request_id: str) -> ServiceError:
    """Returns a failure in terms of the contract; logs a fault of the server.

    Args:
        error: The failure.
        request_id: Under which id the log has more.

    Returns:
        The error.
    """
    if isinstance(error, ServiceError):
        return error
    # Python has no other sign that there was no memory, or no number, for a thread.
    is_threadless = str(error) == "can't start new thread"
    if isinstance(error, MemoryError) or is_threadless:
        return ServiceError(
            "DEVICE_OUT_OF_MEMORY",
            "the server has no memory left for this call. Send fewer points at once, "
            "or try again later.",
        )
    extra = {"request_id": request_id}
    _log.error("request %s failed", request_id, exc_info=error, extra=extra)
    text = f"the server failed on this call. Its log has more under {request_id}."
    return ServiceError("UNEXPECTED", text)


def status_of(error: ServiceError, request_id: str = "") -> status_pb2.Status:
    """Returns a failure as a message.

    Args:
        error: The failure.
        request_id: The id of the call that has failed, or "".

    Returns:
        The status.
    """
    details = _details(error)
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    status = status_pb2.Status(code=error.code, message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(error: ServiceError) -> list[Message]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain="jacserve", metadata=error.metadata
        )
    ]
    if error.field:
        # Without a description: it would be the status's message once more.
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason in _RESOURCES:
        kind, name = _RESOURCES[error.reason]
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=kind, resource_name=error.metadata[name]
            )
        )
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details
