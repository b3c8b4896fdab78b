"""A server that stops fails no call of clients that try elsewhere."""

import json
import signal
import threading
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from server_process import server_process

FUNCTIONS = """
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x ** 2
"""
# What gRPC itself does for any client, in any language, that asks it to.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


def query() -> pb.Query:
    tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT64, shape=[3], data=np.ones(3).tobytes())
    return pb.Query(
        function="square",
        inputs=[pb.Input(tensor=tensor)],
        quantities=[pb.QUANTITY_JACOBIAN],
    )


def test_no_call_fails_when_one_of_two_servers_stops_under_load(tmp_path: Path) -> None:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    ends: Counter[str] = Counter()
    stop = threading.Event()

    def call(target: str) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ]
        with grpc.insecure_channel(target, options=options) as channel:
            stub = pb_grpc.JacobianServiceStub(channel)
            while not stop.is_set():
                sent = [stub.Evaluate.future(query(), timeout=60) for _ in range(20)]
                for each in sent:
                    error = each.exception()
                    ends["" if error is None else str(error)] += 1

    with server_process(file) as first, server_process(file) as second:
        target = f"ipv4:{first.target},{second.target}"
        callers = [threading.Thread(target=call, args=(target,)) for _ in range(4)]
        for caller in callers:
            caller.start()
        while ends[""] < 200:
            assert first.process.poll() is None
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
        before = ends[""]
        while ends[""] < before + 100:
            assert second.process.poll() is None
        stop.set()
        for caller in callers:
            caller.join()
    assert set(ends) == {""}
