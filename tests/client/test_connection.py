"""Where clients connect to, what they show there, and what they send again."""

import asyncio
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2

import jacserve
from between import Between, between, status
from jacserve.connection import (
    Connection,
    ConnectionOptionError,
    ConnectOptions,
    connection,
)
from jacserve_server import RunningServer

TOKEN = "jacs_Zm9vYmFy.0123-456_789~"
X = np.array([2.0, 0.5])
POLAR = np.array([[np.cos(0.5), -2 * np.sin(0.5)], [np.sin(0.5), 2 * np.cos(0.5)]])
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGET", "TOKEN", "TOKEN_FILE", "TLS", "TLS_CA", "CLIENT_KEY"):
        monkeypatch.delenv(f"JACSERVE_{name}", raising=False)


@pytest.fixture
def seen(server: RunningServer) -> Generator[tuple[Between, str]]:
    with between(server.target) as found:
        yield found


def check(jac: np.ndarray) -> None:
    np.testing.assert_allclose(jac, POLAR, rtol=1e-12)


# Targets


@pytest.mark.parametrize(
    ("target", "uri", "is_balanced"),
    [
        (None, "localhost:50051", False),
        ("gpu:1", "gpu:1", False),
        ("[::1]:50051", "[::1]:50051", False),
        ("dns:///gpus:1", "dns:///gpus:1", True),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", True),
        ("unix:/run/jacserve.sock", "unix:/run/jacserve.sock", False),
        ("127.0.0.1:1,127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2", True),
        (["127.0.0.1:1", "127.0.0.1:2"], "ipv4:127.0.0.1:1,127.0.0.1:2", True),
        (["127.0.0.1:1", "127.0.0.1:1"], "127.0.0.1:1", False),
        (["[::1]:1", "[::1]:2"], "ipv6:[::1]:1,[::1]:2", True),
        (["127.0.0.1:1", "[::1]:2"], "ipv6:[::ffff:127.0.0.1]:1,[::1]:2", True),
    ],
)
def test_targets(target, uri: str, is_balanced: bool) -> None:
    found = connection(target, {}, {})
    assert found.uri == uri
    assert ("round_robin" in str(found.options)) == is_balanced


def test_a_target_of_the_environment() -> None:
    found = connection(None, {}, {"JACSERVE_TARGET": "127.0.0.1:1, 127.0.0.1:2"})
    assert found.targets == ("127.0.0.1:1", "127.0.0.1:2")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("", "has no address"),
        ([], "has no address"),
        (["gpu-1", "gpu-2:1"], "gpu-1 has no port"),
        (["::1", "gpu-2:1"], "::1 has no port"),
        (["dns:///gpus:1", "gpu:2"], "can't be one of several"),
    ],
)
def test_targets_that_are_none(target, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        connection(target, {}, {})


def test_names_without_an_address(
    seen: tuple[Between, str], caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = "nowhere.invalid:1"
    with pytest.raises(jacserve.UnavailableError, match=r"none of nowhere\.invalid"):
        jacserve.Client([nowhere, "neither.invalid:2"])
    with jacserve.Client([nowhere, seen[1]]) as client:
        check(client.jacobian("polar", X))
    assert "nowhere.invalid:1 has no address" in caplog.text


# Tokens


def test_every_kind_of_call_has_the_token(seen: tuple[Between, str]) -> None:
    handler, target = seen
    x = np.linspace(0.1, 1.0, 160_000).reshape(80_000, 2)  # It is streamed.
    with jacserve.Client(target, token=TOKEN) as client:
        client.functions()
        check(client.jacobian("polar", X))
        client.jacobian("polar", x)
        check(next(client.map("polar", [X])).jacobian)
        with client.session() as session:
            check(session.jacobian("polar", X))
        assert client.jobs() == []
        client.status()

    async def call() -> None:
        async with jacserve.AsyncClient(target, token=TOKEN) as client:
            check(await client.jacobian("polar", X))
            await client.jacobian("polar", x)
            assert await client.jobs() == []
            await client.status()

    asyncio.run(call())
    assert {"EvaluateStream", "Session", "ListJobs", "GetStatus"} <= {
        *handler.methods()
    }
    for method, metadata in handler.calls:
        assert metadata["authorization"] == f"Bearer {TOKEN}", method


def test_without_a_token_there_is_none(seen: tuple[Between, str]) -> None:
    handler, target = seen
    with jacserve.Client(target) as client:
        client.functions()
    assert "authorization" not in handler.calls[0][1]


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({"token": "a"}, {"JACSERVE_TOKEN": "b"}, "a"),
        ({"token": ""}, {"JACSERVE_TOKEN": "b"}, None),
        ({}, {"JACSERVE_TOKEN": "b", "JACSERVE_TOKEN_FILE": "FILE"}, "b"),
        ({}, {"JACSERVE_TOKEN_FILE": "FILE"}, "of-a-file"),
        ({"token_file": "FILE"}, {"JACSERVE_TOKEN": "b"}, "of-a-file"),
        ({}, {"JACSERVE_TOKEN": ""}, None),
    ],
)
def test_where_a_token_comes_from(
    tmp_path: Path, options, environment: dict[str, str], expected: str | None
) -> None:
    file = tmp_path / "token"
    file.write_text("of-a-file\n")
    for each in (options, environment):
        for name, value in each.items():
            each[name] = str(file) if value == "FILE" else value
    found = connection(None, options, environment)
    bearer = (("authorization", f"Bearer {expected}"),)
    assert found.metadata == (bearer if expected else ())


@pytest.mark.parametrize(
    "token", ["secret word", "secret\n", "s\u00e9cret", "secret" * 999]
)
def test_a_token_that_can_be_no_header(tmp_path: Path, token: str) -> None:
    file = tmp_path / "file"
    file.write_text(f"secret {token}")
    both: list[ConnectOptions] = [{"token": token}, {"token_file": file}]
    for options in both:
        with pytest.raises(ValueError, match="can't go into a header") as caught:
            connection(None, options, {})
        assert "cret" not in str(caught.value)


def test_a_file_without_a_token(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ConnectionOptionError, match="has no token"):
        connection(None, {"token_file": empty}, {})
    with pytest.raises(ConnectionOptionError, match="can't be read"):
        connection(None, {"token_file": tmp_path / "none"}, {})


@pytest.mark.parametrize(
    "target", ["gpu:1", "10.0.0.1:1", ["127.0.0.1:1", "10.0.0.1:2"]]
)
def test_a_token_does_not_go_out_in_the_clear(target) -> None:
    for environment in ({}, {"JACSERVE_TLS": "0"}, {"JACSERVE_PLAINTEXT_TOKEN": "0"}):
        with pytest.raises(ValueError, match="without TLS") as caught:
            connection(target, {"token": TOKEN}, environment)
        assert TOKEN not in str(caught.value)
    options: ConnectOptions = {"token": TOKEN, "plaintext_token": True}
    assert connection(target, options, {}).metadata
    assert connection("gpu:1", {"token": TOKEN, "tls": True}, {}).metadata
    environment = {"JACSERVE_PLAINTEXT_TOKEN": "1"}
    assert connection(target, {"token": TOKEN}, environment).metadata


@pytest.mark.parametrize(
    "target",
    ["localhost:1", "127.8.0.1:1", "[::1]:1", "unix:/run/x", "dns:///localhost:1"],
)
def test_a_token_may_go_to_this_machine(target: str) -> None:
    assert connection(target, {"token": TOKEN}, {}).metadata


def test_a_flag_of_the_environment_that_is_none() -> None:
    with pytest.raises(ValueError, match="JACSERVE_TLS is maybe"):
        connection(None, {}, {"JACSERVE_TLS": "maybe"})


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pem(authority: trustme.CA) -> bytes:
    return authority.cert_pem.bytes()


def credentials(
    authority: trustme.CA, *names: str, clients: trustme.CA | None = None
) -> grpc.ServerCredentials:
    issued = authority.issue_cert(*names)
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    return grpc.ssl_server_credentials(
        [(issued.private_key_pem.bytes(), chain)],
        root_certificates=clients and clients.cert_pem.bytes(),
        require_client_auth=clients is not None,
    )


@pytest.fixture(scope="module")
def secure(server: RunningServer, authority: trustme.CA) -> Generator[str]:
    made = credentials(authority, "127.0.0.1", "jacserve.test")
    with between(server.target, made) as (_, target):
        yield target


def test_tls(secure: str, pem: bytes, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(pem)
    for ca in (pem, file, str(file)):
        with jacserve.Client(secure, ca=ca, token=TOKEN) as client:
            check(client.jacobian("polar", X))
    with jacserve.Client(secure, ca=pem, server_name="jacserve.test") as client:
        check(client.jacobian("polar", X))
    monkeypatch.setenv("JACSERVE_TLS_CA", str(file))

    async def call() -> None:
        async with jacserve.AsyncClient(secure) as client:
            check(await client.jacobian("polar", X))

    asyncio.run(call())


@pytest.mark.slow
def test_what_tls_fails_of_is_said(
    server: RunningServer, secure: str, pem: bytes
) -> None:
    other = trustme.CA().cert_pem.bytes()
    failing: list[tuple[str, ConnectOptions, str]] = [
        (secure, {"ca": other}, "has signed the server's certificate"),
        (secure, {"tls": True}, "has signed the server's certificate"),
        (secure, {"ca": pem, "server_name": "x.test"}, "certificate has another name"),
        (server.target, {"ca": pem}, "The server speaks no TLS"),
        (secure, {}, "whether it takes TLS"),
    ]
    for target, options, says in failing:
        with jacserve.Client(target, **options) as client:
            with pytest.raises(jacserve.UnavailableError, match=says):
                client.jacobian("polar", X)


def test_mutual_tls(server: RunningServer, authority: trustme.CA, pem: bytes) -> None:
    clients = trustme.CA()
    issued = clients.issue_cert("alice@example.org")
    own: ConnectOptions = {
        "ca": pem,
        "certificate": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "key": issued.private_key_pem.bytes(),
    }
    made = credentials(authority, "127.0.0.1", clients=clients)
    with between(server.target, made) as (_, target):
        with jacserve.Client(target, **own) as client:
            check(client.jacobian("polar", X))
            assert "PRIVATE" not in repr(vars(client))
        with jacserve.Client(target, ca=pem, retries=0) as client:
            with pytest.raises(jacserve.UnavailableError):
                client.jacobian("polar", X)


def test_certificates_that_are_none(tmp_path: Path, pem: bytes) -> None:
    with pytest.raises(ValueError, match="there is no key"):
        connection(None, {"certificate": pem}, {})
    with pytest.raises(ValueError, match="there is no certificate"):
        connection(None, {"key": b"-----BEGIN PRIVATE KEY-----"}, {})
    with pytest.raises(ValueError, match="ca is no PEM file"):
        connection(None, {"ca": b"\x30\x82"}, {})
    with pytest.raises(ValueError, match="JACSERVE_TLS_CA can't be read"):
        connection(None, {}, {"JACSERVE_TLS_CA": str(tmp_path / "none")})


def test_several_targets_need_one_name(
    server: RunningServer, authority: trustme.CA, pem: bytes
) -> None:
    with pytest.raises(ValueError, match="Pass server_name"):
        connection(["127.0.0.1:1", "127.0.0.2:1"], {"ca": pem}, {})
    made = credentials(authority, "jacserve.test")
    with (
        between(server.target, made) as (first, one),
        between(server.target, made) as (second, another),
        jacserve.Client([one, another], ca=pem, server_name="jacserve.test") as client,
    ):
        call_until(client, lambda: bool(first.calls and second.calls))


def test_secrets_are_not_shown() -> None:
    found = connection(None, {"token": TOKEN, "tls": True}, {})
    assert isinstance(found, Connection)
    with jacserve.Client("localhost:1", token=TOKEN, retries=0) as client:
        with pytest.raises(jacserve.UnavailableError) as caught:
            client.functions()
        texts = [repr(found), repr(client), repr(vars(client)), str(caught.value)]
    assert all(TOKEN not in text for text in texts)


# Several servers


def call_until(client: jacserve.Client, is_enough: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_enough():
        assert time.monotonic() < deadline
        check(client.jacobian("polar", X))


def test_servers_share_the_calls_that_are_ready(server: RunningServer) -> None:
    with (
        between(server.target) as (first, one),
        between(server.target) as (second, another),
        jacserve.Client([one, another]) as client,
    ):
        call_until(client, lambda: min(len(first.calls), len(second.calls)) > 5)
        first.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        before = -1
        while len(first.calls) != before:  # Until it has heard of that.
            before = len(first.calls)
            for _ in range(20):
                check(client.jacobian("polar", X))
        first.health.set("", health_pb2.HealthCheckResponse.SERVING)
        call_until(client, lambda: len(first.calls) > before + 5)


# Sending again


def client_calls(target: str, **options: Any) -> Iterator[Callable[[], object]]:
    """The ways in which a query goes, with one call each."""
    x = np.linspace(0.1, 1.0, 160_000).reshape(80_000, 2)

    def unary() -> None:
        with jacserve.Client(target, **options) as client:
            check(client.jacobian("polar", X))

    def streamed() -> None:
        with jacserve.Client(target, **options) as client:
            assert client.jacobian("polar", x).shape == (80_000, 2, 2)

    def mapped() -> None:
        with jacserve.Client(target, **options) as client:
            check(next(client.map("polar", [X])).jacobian)

    def session() -> None:
        with jacserve.Client(target, **options) as client, client.session() as session:
            check(session.jacobian("polar", X))

    def submitted() -> None:
        with jacserve.Client(target, **options) as client, client.session() as session:
            check(session.submit("polar", X).result(timeout=30).jacobian)

    def aio() -> None:
        async def call() -> None:
            async with jacserve.AsyncClient(target, **options) as client:
                check(await client.jacobian("polar", X))

        asyncio.run(call())

    yield from (unary, streamed, mapped, session, submitted, aio)


AGAIN = [
    status(UNAVAILABLE, "SHUTTING_DOWN", 0.1),
    status(grpc.StatusCode.CANCELLED),
    status(EXHAUSTED, "QUEUE_FULL", 0.01),
]


def test_a_query_is_sent_again_whichever_way_it_goes(seen: tuple[Between, str]) -> None:
    handler, target = seen
    for call in client_calls(target):
        for spoiled in AGAIN[:1]:
            handler.spoiled.extend([spoiled, spoiled])
            call()
            assert not handler.spoiled


@pytest.mark.parametrize("spoiled", AGAIN, ids=range(len(AGAIN)))
def test_what_is_sent_again(seen: tuple[Between, str], spoiled) -> None:
    handler, target = seen
    with jacserve.Client(target) as client:
        handler.spoiled.extend([spoiled] * 3)
        check(client.jacobian("polar", X))
        handler.spoiled.extend([spoiled] * 4)
        with pytest.raises((jacserve.UnavailableError, jacserve.OverloadedError)):
            client.jacobian("polar", X)
    with jacserve.Client(target, retries=0) as client:
        handler.spoiled.append(spoiled)
        with pytest.raises((jacserve.UnavailableError, jacserve.OverloadedError)):
            client.jacobian("polar", X)


MORTAL = """
import os
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

def die(request, context):
    os._exit(1)

server = grpc.server(ThreadPoolExecutor(4))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
handlers = {
    "Evaluate": grpc.unary_unary_rpc_method_handler(die),
    "Session": grpc.stream_stream_rpc_method_handler(lambda requests, context: (
        die(request, context) for request in requests
    )),
}
server.add_registered_method_handlers("jacserve.v1.JacobianService", handlers)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""


@contextmanager
def mortals(count: int) -> Iterator[tuple[list[str], Callable[[], int]]]:
    """Servers that any query ends: their targets, and how many are left."""
    command = [sys.executable, "-c", MORTAL]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        ports = [int(each.stdout.readline()) for each in started if each.stdout]
        yield (
            [f"127.0.0.1:{port}" for port in ports],
            lambda: [each.poll() for each in started].count(None),
        )
    finally:
        for each in started:
            each.kill()
            each.communicate()


def test_a_query_that_ends_servers_is_kept_from_most_of_them() -> None:
    for is_session in (False, True):
        with mortals(4) as (targets, left), jacserve.Client(targets) as client:
            with client.session() as session:
                asked = session if is_session else client
                with pytest.raises(jacserve.UnavailableError) as caught:
                    asked.jacobian("polar", X, timeout_s=60)
            assert caught.value.is_cut_off
            assert left()


def test_a_query_that_was_cut_off_is_sent_again_twice(
    seen: tuple[Between, str],
) -> None:
    handler, target = seen
    with jacserve.Client(target, retries=10) as client:
        handler.spoiled.extend([status(UNAVAILABLE)] * 2)
        check(client.jacobian("polar", X))
        handler.spoiled.extend([status(UNAVAILABLE)] * 3)
        with pytest.raises(jacserve.UnavailableError):
            client.jacobian("polar", X)
        assert not handler.spoiled
    with jacserve.Client("127.0.0.1:1", retries=4) as client:
        start = time.monotonic()
        with pytest.raises(jacserve.UnavailableError) as caught:
            client.jacobian("polar", X)
        assert not caught.value.is_cut_off
        assert time.monotonic() - start >= 0.1 + 0.2 + 0.4 + 0.8


@pytest.mark.parametrize(
    "spoiled",
    [
        status(EXHAUSTED, "RESULT_TOO_LARGE"),
        status(EXHAUSTED),
        status(EXHAUSTED, "COMPILE_BUDGET_SPENT", 60.0),
        status(grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_BUDGET_SPENT"),
        status(grpc.StatusCode.INTERNAL, "WORKER_DIED"),
        status(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"),
        status(grpc.StatusCode.ABORTED),
    ],
    ids=lambda x: str(x.code),
)
def test_what_is_not_sent_again(seen: tuple[Between, str], spoiled) -> None:
    handler, target = seen
    for call in client_calls(target):
        handler.spoiled.append(spoiled)
        before = handler.methods().count("Evaluate")
        with pytest.raises(jacserve.JacobianError):
            call()
        assert not handler.spoiled
        assert handler.methods().count("Evaluate") <= before + 1


def test_it_waits_as_the_server_says_and_no_longer_than_it_has(
    seen: tuple[Between, str],
) -> None:
    handler, target = seen
    for call in client_calls(target):
        handler.spoiled.append(status(EXHAUSTED, "QUEUE_FULL", 0.2))
        start = time.monotonic()
        call()
        assert time.monotonic() - start >= 0.2
    for call in client_calls(target, timeout_s=5.0):
        handler.spoiled.append(status(EXHAUSTED, "QUEUE_FULL", 6.0))
        start = time.monotonic()
        with pytest.raises(jacserve.OverloadedError) as caught:
            call()
        assert time.monotonic() - start < 4.0
        assert math.isclose(caught.value.retry_after_s, 6.0)


def test_a_session_leaves_a_server_that_goes_away(seen: tuple[Between, str]) -> None:
    handler, target = seen
    with jacserve.Client(target) as client, client.session() as session:
        check(session.jacobian("polar", X))
        check(session.jacobian("polar", X))
        assert handler.methods().count("Session") == 1
        handler.spoiled.append(status(UNAVAILABLE, "SHUTTING_DOWN", 0.1))
        check(session.jacobian("polar", X))
        assert handler.methods().count("Session") == 2


def test_a_query_that_waits_to_be_sent_again_ends_with_its_session(
    seen: tuple[Between, str],
) -> None:
    handler, target = seen
    with jacserve.Client(target) as client:
        handler.spoiled.append(status(EXHAUSTED, "QUEUE_FULL", 5.0))
        session = client.session()
        future = session.submit("polar", X)
        start = time.monotonic()
        with suppress(ZeroDivisionError), session:
            while handler.spoiled:
                time.sleep(0.01)
            raise ZeroDivisionError
        assert future.cancelled()
        assert time.monotonic() - start < 4.0


def test_what_a_caller_cancels_is_not_sent_again(seen: tuple[Between, str]) -> None:
    handler, target = seen
    client = jacserve.Client(target)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            while True:
                client.jacobian("polar", X)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while "Evaluate" not in handler.methods():
        time.sleep(0.01)
    client.close()
    thread.join(timeout=30)
    # Whichever comes first: a call is cancelled, or a new one can't be made.
    assert isinstance(failures[0], jacserve.CancelledError | ValueError)


# How a server is


def test_the_status_of_a_server(server: RunningServer, client: jacserve.Client) -> None:
    client.jacobian("polar", X)
    with pytest.raises(jacserve.InvalidRequestError):
        client.jacobian("polar", np.ones(3))
    found = client.status()
    assert found.is_serving
    assert [device.name for device in found.devices] == ["cpu:0"]
    [polar] = [each for each in found.functions if each.name == "polar@1"]
    assert polar.query_count >= 2
    assert polar.error_count >= 1
    assert found.error_count >= 1
    assert found.call_count >= polar.query_count
    assert polar.p50_s is not None
    assert polar.p99_s is not None
    assert polar.p99_s >= polar.p50_s > 0

    async def ask() -> jacserve.ServerStatus:
        async with jacserve.AsyncClient(server.target) as connected:
            await connected.release("polar")
            return await connected.status()

    assert asyncio.run(ask()).start_time == found.start_time


def test_release(client: jacserve.Client) -> None:
    found = client.release("polar")
    assert (found.name, found.quarantine_reason, found.isolation) == (
        "polar",
        "",
        "none",
    )
    with pytest.raises(jacserve.NotFoundError):
        client.release("nothing")
