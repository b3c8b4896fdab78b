"""A server as a process: health, reflection, draining, addresses."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import jacserve
from jacserve.connection import VARIABLES
from server_process import server_process

FUNCTIONS = '''
import time
from pathlib import Path
import jax, jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Squares."""
    if x.size == 42:
        Path(__file__).with_name("tracing").touch()
        time.sleep(2.0)
    return x ** 2
'''


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def wait_until_it_traces(functions: Path) -> None:
    deadline = time.monotonic() + 30
    while not functions.with_name("tracing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def health_of(channel: grpc.Channel, service: str = "") -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(request, timeout=10)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_sigterm_drains(functions: Path) -> None:
    with server_process(functions, JACSERVE_DRAIN_DELAY_S="1") as server:
        answers: list[np.ndarray] = []

        def slow_call() -> None:
            with jacserve.Client(server.target) as client:
                answers.append(client.jacobian("square", np.ones(42)))

        with (
            grpc.insecure_channel(server.target) as channel,
            jacserve.Client(server.target) as client,
        ):
            assert health_of(channel) == "SERVING"
            assert health_of(channel, "jacserve.v1.JacobianService") == "SERVING"
            client.jacobian("square", np.ones(3))
            caller = threading.Thread(target=slow_call)
            caller.start()
            wait_until_it_traces(functions)
            server.process.send_signal(signal.SIGTERM)
            # Not ready, as whoever routes calls has to see first; all are answered.
            while health_of(channel) != "NOT_SERVING":
                assert server.process.poll() is None
            client.jacobian("square", np.ones(3))
            # Then nothing new, but the slow call still runs.
            with pytest.raises(jacserve.JacobianError):  # noqa: PT012
                while server.process.poll() is None:
                    client.jacobian("square", np.ones(3))
        caller.join(timeout=30)
        np.testing.assert_array_equal(answers[0], 2 * np.eye(42))
        assert server.process.wait(timeout=30) == 0


def test_a_second_signal_ends_it_at_once(functions: Path) -> None:
    with server_process(functions) as server:
        with jacserve.Client(server.target) as client:

            def slow_call() -> None:
                with pytest.raises(jacserve.JacobianError):
                    client.jacobian("square", np.ones(42))

            caller = threading.Thread(target=slow_call)
            caller.start()
            wait_until_it_traces(functions)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=10) == 128 + signal.SIGTERM
            caller.join(timeout=30)


def test_ctrl_c_stops_it_quietly(functions: Path) -> None:
    # Nor do the variables of its clients disturb it, which are there, too.
    with server_process(functions, **dict.fromkeys(VARIABLES, "x")) as server:
        server.process.send_signal(signal.SIGINT)
        out, _ = server.process.communicate(timeout=30)
        assert server.process.returncode == 0
        assert out.splitlines()[-1] == "Stopped."
        assert server.errors() == ""


def test_a_client_that_knows_only_reflection(functions: Path) -> None:
    with (
        server_process(functions) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "jacserve.v1.AdminService",
            "jacserve.v1.JacobianService",
            "jacserve.v1.JobService",
        }
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("jacserve.v1.JacobianService")

        def call(method: str, request: dict) -> dict:
            descriptor = service.methods_by_name[method]
            kinds = descriptor.input_type, descriptor.output_type
            sent, received = map(message_factory.GetMessageClass, kinds)
            answer = channel.unary_unary(
                f"/{service.full_name}/{method}",
                request_serializer=sent.SerializeToString,
                response_deserializer=received.FromString,
            )(json_format.ParseDict(request, sent()))
            return json_format.MessageToDict(answer)

        [function] = call("ListFunctions", {})["functions"]
        assert function["name"] == "functions/square@1"
        assert function["documentation"] == "Squares."
        assert function["modes"] == ["MODE_FORWARD", "MODE_REVERSE"]
        assert function["arguments"][0]["shape"] == [{"symbol": "n"}]
        assert function["results"] == [{"shape": [{"symbol": "n"}]}]
        result = call(
            "Evaluate",
            {
                "function": function["name"],
                "inputs": [
                    {
                        "tensor": {
                            "dtype": "DTYPE_FLOAT64",
                            "shape": [1],
                            "data": "AAAAAAAACEA=",  # 3.0
                        }
                    }
                ],
                "quantities": ["QUANTITY_JACOBIAN"],
            },
        )
        assert result["outputs"][0]["tensor"] == {
            "dtype": "DTYPE_FLOAT64",
            "shape": ["1", "1"],
            "data": "AAAAAAAAGEA=",  # 6.0
        }
        assert result["outputs"][0]["mode"] == "MODE_FORWARD"


def serve(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jacserve", "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_taken_port_is_reported(functions: Path) -> None:
    with server_process(functions) as server:
        port = server.target.rpartition(":")[2]
        second = serve(functions, "--port", port)
    assert second.returncode == 2
    assert f"can't listen on 127.0.0.1:{port}" in second.stderr
    assert "Address already in use. Pass another --port" in second.stderr
    assert "Traceback" not in second.stderr


def test_it_listens_on_loopback_only_unless_told(functions: Path) -> None:
    with server_process(functions) as server:
        assert server.target.startswith("127.0.0.1:")
    with server_process(functions, "--host", "0.0.0.0", "--insecure") as server:
        assert server.target.startswith("0.0.0.0:")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--device", "abacus"], {}, "device abacus is not there; JAX found cpu:0"),
        (["--host", "1.2.3.4", "--insecure"], {}, "Cannot assign requested address"),
        (["--host", "nohost.invalid"], {}, "host nohost.invalid has no address"),
        (["--device", "cpu:7"], {}, "device cpu:7 is not there; JAX found cpu:0"),
        (["--port", "70000"], {}, "setting port: Input should be less than"),
        ([], {"JACSERVE_MAX_QUERIES": "0"}, "setting max_queries"),
        (["--config", "nowhere.toml"], {}, "nowhere.toml can't be read"),
    ],
)
def test_a_bad_setting_is_reported(
    functions: Path, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    stopped = serve(functions, *arguments, **environment)
    assert stopped.returncode == 2
    assert words in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_nothing_is_served_half_loaded(functions: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import numpy\nnumpy.no_such_thing\n")
    stopped = serve(functions, broken, "--port", "0")
    assert stopped.returncode == 2
    assert "Listening" not in stopped.stdout
    assert re.search(r"broken\.py:2: AttributeError: .*no_such_thing", stopped.stderr)
    assert "Nothing is served" in stopped.stderr
