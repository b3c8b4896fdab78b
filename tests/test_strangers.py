"""What strangers can do to a server, and what can befall whoever runs it."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from jaxtyping import Array, Float

import jacserve
import nasty_functions
import raw_http2
from guarded import Tokens, ask, bearer, connected
from jacserve_server import Registry, serving
from server_process import server_process

registry = Registry()
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVING = b"\x08\x01"
NOT_SERVING = b"\x08\x02"
FUNCTIONS = """
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2 * x
"""


@registry.function
def double(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return 2 * x


@registry.function
def outer(x: Float[Array, "n"]) -> Float[Array, "n n"]:
    return x[:, None] * x


def large_name() -> bytes:
    return health_pb2.HealthCheckRequest(service="x" * 2**20).SerializeToString()


def test_nobody_watches_health_more_often_than_a_connection_may(
    tmp_path: Path,
) -> None:
    tokens = Tokens(tmp_path)
    tokens.make("reads", "read")
    with ExitStack() as stack:
        server = stack.enter_context(serving(registry, tokens_file=tokens.path))
        one = stack.enter_context(connected(server.target))
        other = stack.enter_context(connected(server.target))
        watching = [one.unary_stream(WATCH)(b"", timeout=60) for _ in range(16)]
        assert [next(each) for each in watching] == [SERVING] * 16
        assert ask(one, WATCH).reason == "TOO_MANY_STREAMS"
        assert ask(one, CHECK).parts == (SERVING,)
        assert next(other.unary_stream(WATCH)(b"", timeout=60)) == SERVING
        watching.pop().cancel()
        deadline = time.monotonic() + 30
        while True:
            again = one.unary_stream(WATCH)(b"", timeout=60)
            try:
                assert next(again) == SERVING
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline
                time.sleep(0.02)


@pytest.mark.parametrize("is_open", [True, False])
def test_probes_that_cannot_be_read_are_refused_and_do_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, is_open: bool
) -> None:
    tokens = Tokens(tmp_path)
    token = tokens.make("reads", "read")
    settings = {"open_health": is_open, "open_reflection": is_open}
    with (
        serving(registry, tokens_file=tokens.path, **settings) as server,
        connected(server.target) as channel,
    ):
        caplog.set_level(logging.WARNING)
        for path in (CHECK, WATCH, REFLECTION):
            for raw in (b"\xff\xff", large_name()):
                found = ask(channel, path, [raw], metadata=bearer(token))
                assert found.code is grpc.StatusCode.INVALID_ARGUMENT
                assert (found.reason, found.parts[1:]) == ("MALFORMED_REQUEST", ())
            if not is_open:
                assert ask(channel, path, [b"\xff"]).reason == "TOKEN_INVALID"
        request = health_pb2.HealthCheckRequest(service="nobody")
        found = ask(
            channel, CHECK, [request.SerializeToString()], metadata=bearer(token)
        )
        assert found.code is grpc.StatusCode.NOT_FOUND
    assert not [each for each in caplog.records if "refused" not in each.message]


def test_who_watches_health_hears_of_the_end_and_does_not_hold_it_up() -> None:
    stack = ExitStack()
    target = stack.enter_context(serving(registry, grace_s=60)).target
    with stack, connected(target) as channel, connected(target) as another:
        watching = channel.unary_stream(WATCH)(b"", timeout=60)
        assert next(watching) == SERVING
        leaving = another.unary_stream(WATCH)(b"", timeout=60)
        assert next(leaving) == SERVING
        # It ends watching for nobody else.
        leaving.cancel()
        while (found := ask(another, CHECK)).parts != (SERVING,):
            assert found.code is grpc.StatusCode.OK
        unknown = health_pb2.HealthCheckRequest(service="nobody")
        strange = another.unary_stream(WATCH)(unknown.SerializeToString(), timeout=60)
        assert next(strange) == b"\x08\x03"
        start = time.monotonic()
        stack.close()
        assert time.monotonic() - start < 20
        assert list(watching) == [NOT_SERVING]


def test_a_path_that_is_no_text_fails_alone() -> None:
    with serving(registry) as server, connected(server.target) as channel:
        for path in (b"/\xff", b"/jacserve.v1.JacobianService/\xff", b"\xc3/\xe2\x28"):
            assert b"grpc-status" in raw_http2.send(server.target, path)
        assert ask(channel, CHECK).parts == (SERVING,)


@pytest.mark.slow
def test_a_pattern_of_too_many_results_is_not_looked_for() -> None:
    with serving(registry) as server, jacserve.Client(server.target) as client:
        assert client.sparsity("outer", sizes={"n": 4}).pattern.shape == (16, 4)
        with pytest.raises(jacserve.InvalidRequestError) as caught:
            client.sparsity("outer", sizes={"n": 2**22}, timeout_s=30)
        assert caught.value.reason == "SHAPE_MISMATCH"
        assert f"has {2**44} results" in str(caught.value)


@pytest.mark.slow
def test_what_peers_do_to_grpc_is_not_in_the_log(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    token = tokens.make("reads", "read")
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    listing = b"/jacserve.v1.JacobianService/ListFunctions"
    with server_process(file, JACSERVE_TOKENS_FILE=str(tokens.path)) as server:
        for value in (f"Bearer {token}".encode() + b"\xff", b"\xff" + token.encode()):
            raw_http2.send(server.target, listing, [(b"authorization", value)])
        raw_http2.send(server.target, b"/\xff")
        with connected(server.target) as channel:
            for path in (CHECK, WATCH):
                channel.unary_stream(path)(b"\xff\xff").cancel()
            assert ask(channel, CHECK).parts == (SERVING,)
        log = server.errors()
    assert "Traceback" not in log
    assert token.rpartition("_")[2] not in log
    assert len(log.splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_server_ends_while_it_compiles_for_nobody_without_end(isolation: str) -> None:
    settings = {
        "JACSERVE_ISOLATION": isolation,
        "JACSERVE_GRACE_S": "3",
        "JACSERVE_DEVICE": "cpu",
    }
    with server_process(nasty_functions.__file__, **settings) as server:
        with jacserve.Client(server.target) as client:
            size = nasty_functions.ENDLESS
            with pytest.raises(jacserve.DeadlineError):
                client.value("untraceable", np.ones(size), timeout_s=2)
            server.process.terminate()
            assert server.process.wait(30) == 0
