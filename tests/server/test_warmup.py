"""What is ready before a server says that it is."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jaxtyping import Array, Float

import jacserve
from jacserve_server import RegistrationError, Registry, WarmUp, serving
from jacserve_server.server import WarmUpError

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def health(port: int) -> int | None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            return stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
        except grpc.RpcError:
            return None


def test_a_server_is_healthy_only_once_it_is_warm() -> None:
    registry = Registry()
    gate = threading.Event()

    @registry.function(warm_up=[WarmUp({"n": 42})])
    def slow(x: Float[Array, "n"]) -> Float[Array, "n"]:
        if x.size == 42:
            assert gate.wait(timeout=30)
        return jnp.sin(x)

    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        done = threading.Event()

        def serve() -> float:
            with serving(registry, port=port) as server:
                with jacserve.Client(server.target) as client:
                    assert health(port) == SERVING
                    result = client.evaluate("slow", np.ones(42))
                    done.set()
                    return result.timing.compile_s

        served = pool.submit(serve)
        seen = set()
        end = time.monotonic() + 20
        while NOT_SERVING not in seen and time.monotonic() < end:
            seen.add(health(port))
        assert SERVING not in seen
        assert not done.is_set()
        gate.set()
        assert served.result(timeout=30) == 0.0
    assert NOT_SERVING in seen


def test_the_largest_batch_is_ready_first_and_the_smaller_ones_follow() -> None:
    registry = Registry()
    seen: list[int | None] = []

    @registry.function(
        warm_up=[
            WarmUp({"n": 3}, batch=5, quantities=("jacobian",), mode="reverse",
                   dtype="float32", shared=("y",), wrt=("x",))
        ]
    )  # fmt: skip
    def product(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
        return x * y

    x, y = np.ones((5, 3), "f"), np.ones(3, "f")
    options: Any = {"quantities": "jacobian", "mode": "reverse", "wrt": "x"}
    with serving(registry) as server, jacserve.Client(server.target) as client:
        result = client.evaluate("product", (x, y), **options)
        assert (result.timing.compile_s, result.bucket) == (0.0, 8)
        end = time.monotonic() + 30
        for points in (x[:4], x[:2], x[:1], x[0]):
            while time.monotonic() < end:
                # Whoever asks meanwhile would compile it himself, and so would wait.
                time.sleep(0.5)
                found = client.evaluate("product", (points, y), **options)
                if found.timing.compile_s == 0.0:
                    seen.append(found.bucket)
                    break
    assert seen == [4, 2, 1, None]


@pytest.mark.parametrize(
    ("warm_up", "words"),
    [
        (WarmUp({"m": 3}), "no dimension m"),
        (WarmUp(batch=4, shared=("y",)), "no argument y"),
        (WarmUp(quantities=("determinants",)), "determinants"),  # pyright: ignore[reportArgumentType]
        (WarmUp(wrt=("z",)), "wrt names z"),
        (WarmUp(quantities=("jvp",)), "jvp needs tangents"),
        ({"n": 3}, "Pass a list of WarmUp"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_at_registration(warm_up, words: str) -> None:
    def f(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return x

    def start() -> None:
        registry = Registry()
        registry.function(warm_up=[warm_up])(f)
        with serving(registry):
            pass

    with pytest.raises(RegistrationError, match=words):
        start()


def test_sigterm_ends_a_server_that_is_still_warming_up(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text("""
import time
from jaxtyping import Array, Float
from jacserve_server import Registry, WarmUp

registry = Registry()

@registry.function(warm_up=[WarmUp({"n": 42})])
def slow(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 42:
        print("warming", flush=True)
        time.sleep(60)
    return x
""")
    process = subprocess.Popen(
        [sys.executable, "-m", "jacserve", "serve", file, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any(line == "warming\n" for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "Stopped before it was ready."
    assert "Listening" not in output


def test_what_can_not_be_made_ready_stops_the_server() -> None:
    registry = Registry()

    @registry.function(warm_up=[WarmUp({"n": 4})])
    def picky(x: Float[Array, "n"]) -> Float[Array, "n"]:
        if x.size == 4:
            raise RuntimeError("the moon is full")
        return x

    with pytest.raises(WarmUpError, match=r"picky can't be warmed up.*moon is full"):
        with serving(registry):
            pass
