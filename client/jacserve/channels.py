"""How both clients connect: addresses, limits and retries of a gRPC channel."""

import json
from typing import Any

DEFAULT_TARGET = "localhost:50051"

_SERVICE = "jacserve.v1.JacobianService"
# The calls whose messages have tensors.
EVALUATE = f"/{_SERVICE}/Evaluate"
EVALUATE_STREAM = f"/{_SERVICE}/EvaluateStream"
SESSION = f"/{_SERVICE}/Session"
GET_SPARSITY = f"/{_SERVICE}/GetSparsity"

_JOB_SERVICE = "jacserve.v1.JobService"
CREATE_JOB = f"/{_JOB_SERVICE}/CreateJob"
READ_JOB_RESULT = f"/{_JOB_SERVICE}/ReadJobResult"

# Beyond this a protobuf message can't be parsed anywhere.
_MAX_MESSAGE_BYTES = 2**31 - 1

# These calls only read, or change nothing when they come twice, so any may be sent
# again; gRPC does so by itself while the server is unreachable or going away. But a
# stream that it might open again would not end with its server.
_REPEATED = {
    _SERVICE: ("ListFunctions", "GetFunction", "GetSparsity", "Evaluate"),
    _JOB_SERVICE: ("GetJob", "ListJobs", "CancelJob", "DeleteJob"),
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": name}
                for service, names in _REPEATED.items()
                for name in names
            ],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def channel_options(target: str) -> list[tuple[str, Any]]:
    """Returns the channel options for a target.

    Args:
        target: The address, such as "localhost:50051".

    Returns:
        Options for grpc.insecure_channel and its asyncio twin.
    """
    host = target.rpartition(":")[0].strip("[]")
    is_loopback = host in {"localhost", "::1"} or host.startswith("127.")
    return [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        # Sooner than gRPC would try again by itself: whoever follows a job waits for a
        # server that is started anew.
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # A proxy of the environment can't reach this machine's own loopback.
        ("grpc.enable_http_proxy", 0 if is_loopback else 1),
    ]
