"""Health answers quickly, whatever else a server has to do."""

import itertools
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import jacserve
from server_process import server_process

FUNCTIONS = """
import jax, jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def long(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return jax.lax.fori_loop(0, 200, lambda _, y: jnp.tanh(y @ x), x)

@registry.function
def many(x: Float[Array, "n"]) -> Float[Array, "n"]:
    for k in range(200):
        x = jnp.sin(x) * jnp.cos(x + k)
    return x
"""


@pytest.mark.slow
def test_health_answers_while_all_is_busy(tmp_path: Path) -> None:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    stop = threading.Event()
    shapes = itertools.count(1)

    def saturate(client: jacserve.Client) -> None:
        while not stop.is_set():
            with suppress(jacserve.JacobianError):
                client.value("long", np.eye(300))

    def compile_more(client: jacserve.Client) -> None:
        while not stop.is_set():
            with suppress(jacserve.JacobianError):
                client.jacobian("many", np.ones(next(shapes)))

    with server_process(
        file, JACSERVE_DEVICE="cpu", JACSERVE_MAX_QUERIES="16"
    ) as server:
        with jacserve.Client(server.target) as client:
            callers = [
                threading.Thread(target=work, args=(client,))
                for work in [saturate] * 12 + [compile_more] * 4
            ]
            for caller in callers:
                caller.start()
            with grpc.insecure_channel(server.target) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                seconds: list[float] = []
                while len(seconds) < 300:
                    start = time.perf_counter()
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
                    seconds.append(time.perf_counter() - start)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                    time.sleep(0.01)
            stop.set()
            for caller in callers:
                caller.join()
    median, late = np.quantile(seconds, [0.5, 0.99])
    print(f"health: median {median * 1e3:.1f} ms, p99 {late * 1e3:.1f} ms")
    assert late < 1.0  # A probe's usual timeout.
