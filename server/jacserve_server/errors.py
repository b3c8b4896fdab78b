"""How the layers below the service report a failure.

Domain code raises ServiceError with a reason of the contract; `service.py` alone
turns it into a gRPC status. A message says what was wrong with both values, then
what to do; every value in it also stands in the metadata.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from google.rpc import code_pb2

# The reasons are plain words here, checked against the contract by a test.
CODES: Mapping[str, int] = MappingProxyType(
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
        "BATCH_TOO_LARGE": code_pb2.RESOURCE_EXHAUSTED,
        "QUEUE_FULL": code_pb2.RESOURCE_EXHAUSTED,
        "DEVICE_OUT_OF_MEMORY": code_pb2.RESOURCE_EXHAUSTED,
        "SHUTTING_DOWN": code_pb2.UNAVAILABLE,
        "COMPILATION_FAILED": code_pb2.INTERNAL,
        "EXECUTION_FAILED": code_pb2.INTERNAL,
        "UNEXPECTED": code_pb2.INTERNAL,
    }
)


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
        reason: str,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        **metadata: object,
    ) -> None:
        """Keeps the particulars."""
        super().__init__(message)
        self.reason = reason
        self.code = CODES[reason]
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = {name: str(value) for name, value in metadata.items()}


_DIRECTORIES = re.compile(r"(?<![\w:/.])(?:[A-Za-z]:\\|/)(?:[^\s/\\'\",;:()]+[/\\])+")
_LONGEST = 1000


def describe_exception(error: BaseException) -> str:
    """Returns a user function's exception in words that may leave the server.

    Args:
        error: What the function, or JAX while it traced the function, raised.

    Returns:
        Type and text, with directories taken out of file names.
    """
    text = _DIRECTORIES.sub("", str(error).strip())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
