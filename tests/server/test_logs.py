"""What a server's log says of its calls, to machines and to people."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import jacserve
from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from jacserve_server import logs
from server_process import server_process

FUNCTIONS = """
import jax, jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x ** 2

@registry.function
def broken(x: Float[Array, "n"]) -> Float[Array, "n"]:
    def fail(value):
        raise RuntimeError("it broke")
    return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("jacserve_server")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def test_each_call_is_a_line_of_json_with_the_id_that_its_client_got(
    functions: Path,
) -> None:
    forged = 'no\x1b[2Jsuch\n{"level": "critical"}\u2028thing'
    with server_process(functions, JACSERVE_LOG_LEVEL="debug") as server:
        with jacserve.Client(server.target) as client:
            client.jacobian("square", [1.0, 2.0])
            with pytest.raises(LookupError) as caught:
                client.jacobian(forged, [1.0])
            with pytest.raises(jacserve.JacobianError) as broken:
                client.value("broken", [1.0])
        with grpc.insecure_channel(server.target) as channel:
            pb_grpc.JacobianServiceStub(channel).ListFunctions(
                pb.ListFunctionsRequest(), metadata=(("x-request-id", "my-own_1.2"),)
            )
        server.process.terminate()
        assert server.process.wait(30) == 0
        lines = [json.loads(line) for line in server.errors().splitlines()]
    calls = [line for line in lines if line["message"] == "call"]
    assert all(re.fullmatch(r"[\d:.T-]+Z", line["timestamp"]) for line in lines)
    assert not [line for line in lines if line["level"] == "critical"]
    ok, missing, failed, listed = calls
    assert (ok["level"], ok["method"], ok["code"]) == ("debug", "Evaluate", "OK")
    assert ok["function"] == "square@1"
    assert re.fullmatch("[0-9a-f]{32}", ok["request_id"])
    assert ok["peer"].startswith("ipv4:127.0.0.1:")
    assert 0 < ok["execute_s"] < ok["compile_s"] < ok["seconds"]
    assert isinstance(caught.value, jacserve.JacobianError)
    assert missing["request_id"] == caught.value.request_id
    assert (missing["level"], missing["reason"]) == ("debug", "FUNCTION_NOT_FOUND")
    assert forged in missing["error"]
    assert failed["request_id"] == broken.value.request_id
    assert (failed["level"], failed["reason"]) == ("error", "EXECUTION_FAILED")
    assert "it broke" in failed["error"]
    assert (listed["method"], listed["request_id"]) == ("ListFunctions", "my-own_1.2")


def test_without_debug_only_faults_are_logged(functions: Path) -> None:
    with server_process(functions) as server:
        with jacserve.Client(server.target) as client:
            client.jacobian("square", [1.0, 2.0])
            with pytest.raises(LookupError):
                client.jacobian("nothing", [1.0])
            with pytest.raises(jacserve.JacobianError) as broken:
                client.value("broken", [1.0])
        lines = [json.loads(line) for line in server.errors().splitlines()]
    [line] = [x for x in lines if x["logger"].startswith("jacserve_server")]
    assert line["request_id"] == broken.value.request_id


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("untouched_logging")
def test_a_terminal_gets_text_that_its_words_do_not_steer() -> None:
    out = Terminal()
    logs.configure("auto", "info", out)
    log = logging.getLogger("jacserve_server.anything")
    log.info("hello\x1b[2J %s", "wo\rrld", extra={"peer": "ipv4:1\x9b2J\n2"})
    log.debug("not this")
    logging.getLogger("other").info("nor this")
    try:
        raise ValueError("first\nsecond\x1b[31m")
    except ValueError:
        log.exception("failed")
    text = re.sub(r"\x1b\[\d*m", "", out.getvalue())  # The colours are ours.
    assert "hello\\x1b[2J wo\\rrld" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    first, *traceback = text.splitlines()
    assert "info" in first
    assert "peer=" in first
    assert "Traceback (most recent call last):" in traceback
    assert "second\\x1b[31m" in traceback
    assert "not this" not in text
    assert "nor this" not in text


@pytest.mark.usefixtures("untouched_logging")
@pytest.mark.parametrize("log_format", ["auto", "json"])
def test_elsewhere_a_traceback_is_one_line(log_format: str) -> None:
    out = io.StringIO()
    logs.configure(log_format, "info", out)  # pyright: ignore[reportArgumentType]
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("jacserve_server").exception("failed")
    [line] = out.getvalue().splitlines()
    found = json.loads(line)
    assert found["message"] == "failed"
    assert "ValueError: first\nsecond" in found["exception"]


def test_a_guest_leaves_logging_alone() -> None:
    code = """
import logging
from jacserve_server import Registry, serving
with serving(Registry(), device="cpu"):
    pass
assert not logging.getLogger().handlers
import sys
assert "structlog" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
