"""Who may call what: seen to in the service itself, so that it holds behind proxies."""

import re
import time
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from jacserve_server.callers import SCOPES, Call, Caller, Scope

# What each RPC of the contract needs.
NEEDS: Mapping[str, Scope] = MappingProxyType(
    {
        "ListFunctions": "read",
        "GetFunction": "read",
        "GetSparsity": "compute",
        "Evaluate": "compute",
        "EvaluateStream": "compute",
        "Session": "compute",
        "CreateJob": "jobs",
        "GetJob": "jobs",
        "ListJobs": "jobs",
        "WatchJob": "jobs",
        "CancelJob": "jobs",
        "DeleteJob": "jobs",
        "ReadJobResult": "jobs",
        "GetStatus": "admin",
        "ReleaseFunction": "admin",
    }
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Gate(Protocol):
    """Lets callers in."""

    def admit(self, method: str, context: Any) -> Call:
        """Finds out who calls, and whether they may.

        Args:
            method: The RPC's name.
            context: The call's; of it only what cluster proxies also have is used:
                `invocation_metadata`, `peer` and `auth_context`.

        Returns:
            The call.

        Raises:
            ServiceError: They may not.
        """
        ...


class OpenGate:
    """Lets everybody do everything: for loopback."""

    def admit(self, method: str, context: Any) -> Call:
        """Lets a call in; see `Gate`."""
        caller = Caller("", SCOPES, context.peer())
        return Call(method, caller, request_id_of(context), time.perf_counter())


def request_id_of(context: Any) -> str:
    """Returns the id that a proxy or a client gave a call, or else makes one.

    Args:
        context: The call's.

    Returns:
        Up to 64 letters, digits, "_", "." and "-".
    """
    for key, value in context.invocation_metadata() or ():
        is_id = key == "x-request-id" and isinstance(value, str)
        if is_id and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
