"""How the layers below the service report a failure.

Domain code raises ServiceError with a reason of the contract; `service.py` alone
turns it into a gRPC status. A message says what was wrong with both values, then
what to do; the values also stand in the metadata.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from google.rpc import code_pb2

# The contract's ErrorReason, each with the code that it always comes with.
Reason = Literal[
    "SHAPE_MISMATCH",
    "DTYPE_MISMATCH",
    "MALFORMED_TENSOR",
    "ARGUMENT_MISMATCH",
    "MALFORMED_REQUEST",
    "MODE_UNSUPPORTED",
    "QUANTITY_UNSUPPORTED",
    "TRACE_FAILED",
    "FUNCTION_NOT_FOUND",
    "RESULT_NOT_FINITE",
    "RESULT_TOO_LARGE",
    "BATCH_TOO_LARGE",
    "QUEUE_FULL",
    "DEVICE_OUT_OF_MEMORY",
    "SHUTTING_DOWN",
    "COMPILATION_FAILED",
    "EXECUTION_FAILED",
    "UNEXPECTED",
    "SPARSITY_UNSUPPORTED",
    "NOT_INSTALLED",
    "PATTERN_UNKNOWN",
    "STREAM_REQUIRED",
    "STREAM_BROKEN",
    "QUERY_TOO_LARGE",
    "JOB_NOT_FOUND",
    "JOB_ALREADY_EXISTS",
    "JOB_NOT_FINISHED",
    "TOO_MANY_JOBS",
    "SOURCE_FORBIDDEN",
    "SOURCE_UNREADABLE",
    "STORAGE_UNAVAILABLE",
    "FUNCTION_CHANGED",
    "TOKEN_INVALID",
    "SCOPE_MISSING",
    "TOO_MANY_STREAMS",
    "COMPILE_BUDGET_SPENT",
    "STREAM_IDLE",
    "TIME_BUDGET_SPENT",
    "WORKER_DIED",
    "FUNCTION_QUARANTINED",
    "WORKER_UNAVAILABLE",
]
CODES: Mapping[Reason, int] = MappingProxyType(
    {
        "SHAPE_MISMATCH": code_pb2.INVALID_ARGUMENT,
        "DTYPE_MISMATCH": code_pb2.INVALID_ARGUMENT,
        "MALFORMED_TENSOR": code_pb2.INVALID_ARGUMENT,
        "ARGUMENT_MISMATCH": code_pb2.INVALID_ARGUMENT,
        "MALFORMED_REQUEST": code_pb2.INVALID_ARGUMENT,
        "MODE_UNSUPPORTED": code_pb2.INVALID_ARGUMENT,
        "QUANTITY_UNSUPPORTED": code_pb2.INVALID_ARGUMENT,
        "TRACE_FAILED": code_pb2.INVALID_ARGUMENT,
        "FUNCTION_NOT_FOUND": code_pb2.NOT_FOUND,
        "RESULT_NOT_FINITE": code_pb2.FAILED_PRECONDITION,
        "RESULT_TOO_LARGE": code_pb2.RESOURCE_EXHAUSTED,
        "BATCH_TOO_LARGE": code_pb2.INVALID_ARGUMENT,
        "QUEUE_FULL": code_pb2.RESOURCE_EXHAUSTED,
        "DEVICE_OUT_OF_MEMORY": code_pb2.RESOURCE_EXHAUSTED,
        "SHUTTING_DOWN": code_pb2.UNAVAILABLE,
        "COMPILATION_FAILED": code_pb2.INTERNAL,
        "EXECUTION_FAILED": code_pb2.INTERNAL,
        "UNEXPECTED": code_pb2.INTERNAL,
        "SPARSITY_UNSUPPORTED": code_pb2.INVALID_ARGUMENT,
        "NOT_INSTALLED": code_pb2.FAILED_PRECONDITION,
        "PATTERN_UNKNOWN": code_pb2.FAILED_PRECONDITION,
        "STREAM_REQUIRED": code_pb2.FAILED_PRECONDITION,
        "STREAM_BROKEN": code_pb2.INVALID_ARGUMENT,
        "QUERY_TOO_LARGE": code_pb2.RESOURCE_EXHAUSTED,
        "JOB_NOT_FOUND": code_pb2.NOT_FOUND,
        "JOB_ALREADY_EXISTS": code_pb2.ALREADY_EXISTS,
        "JOB_NOT_FINISHED": code_pb2.FAILED_PRECONDITION,
        "TOO_MANY_JOBS": code_pb2.RESOURCE_EXHAUSTED,
        "SOURCE_FORBIDDEN": code_pb2.PERMISSION_DENIED,
        "SOURCE_UNREADABLE": code_pb2.INVALID_ARGUMENT,
        "STORAGE_UNAVAILABLE": code_pb2.UNAVAILABLE,
        "FUNCTION_CHANGED": code_pb2.FAILED_PRECONDITION,
        "TOKEN_INVALID": code_pb2.UNAUTHENTICATED,
        "SCOPE_MISSING": code_pb2.PERMISSION_DENIED,
        "TOO_MANY_STREAMS": code_pb2.RESOURCE_EXHAUSTED,
        "COMPILE_BUDGET_SPENT": code_pb2.RESOURCE_EXHAUSTED,
        "STREAM_IDLE": code_pb2.ABORTED,
        "TIME_BUDGET_SPENT": code_pb2.DEADLINE_EXCEEDED,
        "WORKER_DIED": code_pb2.INTERNAL,
        "FUNCTION_QUARANTINED": code_pb2.FAILED_PRECONDITION,
        "WORKER_UNAVAILABLE": code_pb2.UNAVAILABLE,
    }
)

# All of an error travels in HTTP/2 headers, of which 8 KiB are sure to pass; the
# message goes there twice, once with three bytes for each that is not ASCII.
_MESSAGE_BYTES = 1000
_METADATA_BYTES = 200


class ServiceError(Exception):
    """A call can't be answered, for a reason of the contract.

    Attributes:
        reason: The ErrorReason's name.
        code: The google.rpc code that always comes with it.
        message: What was wrong, then what to do.
        field: The path of the request's field at fault, or "".
        retry_after_s: Seconds after which to try again, or None.
        metadata: The values in the message, by name.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        **metadata: object,
    ) -> None:
        """Keeps the particulars; long texts lose their middle."""
        super().__init__(message)
        self.reason: Reason = reason
        self.code = CODES[reason]
        self.message = clipped(message, _MESSAGE_BYTES)
        self.field = clipped(field, _METADATA_BYTES)
        self.retry_after_s = retry_after_s
        self.metadata = {
            name: clipped(str(value), _METADATA_BYTES)
            for name, value in metadata.items()
        }


def clipped(text: str, size: int) -> str:
    """Returns a text that takes at most so many bytes, without its middle if need be.

    Args:
        text: Any text.
        size: The most bytes of UTF-8.

    Returns:
        The text, or its beginning and end.
    """
    data = text.encode(errors="replace")
    if len(data) <= size:
        return data.decode()
    half = (size - 5) // 2
    start, end = data[:half], data[-half:]
    return f"{start.decode(errors='ignore')} ... {end.decode(errors='ignore')}"


# Web addresses stay as they are; of a path, only the last part does.
_PATHS = re.compile(
    r"(?P<address>\bhttps?://\S+)"
    r"|(?<![\w.])(?:[A-Za-z]:\\|/+)(?:[^\s/\\'\",;:()]+[/\\])+",
    re.ASCII,
)
_CALLBACK = "CpuCallback error calling callback: Traceback (most recent call last):\n"


def describe_exception(error: BaseException) -> str:
    """Returns a user function's exception in words that may leave the server.

    Args:
        error: What the function, or JAX while it traced or ran it, raised.

    Returns:
        Type and text, with directories taken out of file names.
    """
    try:
        text = str(error).strip()
    # The text is made by the exception's own code, which may raise anything.
    except BaseException:
        text = ""
    text = _PATHS.sub(lambda match: match["address"] or "", text)
    if _CALLBACK in text:
        # What a callback raised follows its frames, which are indented.
        lines = text.partition(_CALLBACK)[2].splitlines()
        frames = next((n for n, line in enumerate(lines) if line[:1] != " "), 0)
        text = "\n".join(lines[frames:])
    elif text:
        text = f"{type(error).__name__}: {text}"
    return clipped(text or type(error).__name__, _MESSAGE_BYTES - 300).rstrip(".")
