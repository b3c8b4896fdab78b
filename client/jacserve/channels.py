"""What a gRPC channel is told: the calls, limits, retries and balancing."""

import json
from typing import Any

_SERVICE = "jacserve.v1.JacobianService"
# The calls whose messages have tensors.
EVALUATE = f"/{_SERVICE}/Evaluate"
EVALUATE_STREAM = f"/{_SERVICE}/EvaluateStream"
SESSION = f"/{_SERVICE}/Session"
GET_SPARSITY = f"/{_SERVICE}/GetSparsity"

_JOB_SERVICE = "jacserve.v1.JobService"
CREATE_JOB = f"/{_JOB_SERVICE}/CreateJob"
READ_JOB_RESULT = f"/{_JOB_SERVICE}/ReadJobResult"

_ADMIN_SERVICE = "jacserve.v1.AdminService"

# Beyond this a protobuf message can't be parsed anywhere.
_MAX_MESSAGE_BYTES = 2**31 - 1

# These calls only read, or change nothing when they come twice, so any may be sent
# again; gRPC does so by itself while the server is unreachable or going away. Of
# evaluations it would repeat only those that are small and have no answer yet, so
# `evaluation` sees to all of them. And a stream that gRPC might open again would not
# end with its server.
_REPEATED = {
    _SERVICE: ("ListFunctions", "GetFunction", "GetSparsity"),
    _JOB_SERVICE: ("GetJob", "ListJobs", "CancelJob", "DeleteJob"),
    _ADMIN_SERVICE: ("GetStatus", "ReleaseFunction"),
}


def _service_config(*, is_balanced: bool) -> str:
    repeated = [
        {"service": service, "method": name}
        for service, names in _REPEATED.items()
        for name in names
    ]
    retries = {
        "maxAttempts": 5 if is_balanced else 3,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        # A server that goes away also cancels calls that it has not begun with.
        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
    }
    config: dict[str, Any] = {
        "methodConfig": [{"name": repeated, "retryPolicy": retries}]
    }
    if is_balanced:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        # A server that is not ready, or going away, gets no calls.
        config["healthCheckConfig"] = {"serviceName": ""}
    return json.dumps(config)


def channel_options(
    *, is_balanced: bool, is_loopback: bool, authority: str | None
) -> list[tuple[str, Any]]:
    """Returns the channel options for a target.

    Args:
        is_balanced: Whether servers share the calls; else there is one.
        is_loopback: Whether they all are on this machine.
        authority: The name that certificates must have; None for the target's own.

    Returns:
        Options for gRPC's channels and their asyncio twins.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.service_config", _service_config(is_balanced=is_balanced)),
        # Sooner than gRPC would try again by itself: whoever follows a job waits for a
        # server that is started anew, and of several servers the next may go away as
        # soon as the last one is back.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # A proxy of the environment can't reach this machine's own loopback.
        ("grpc.enable_http_proxy", 0 if is_loopback else 1),
    ]
    if authority is not None:
        options.append(("grpc.default_authority", authority))
    return options
