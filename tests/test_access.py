"""Who may call: every RPC, with every token there is, over every kind of connection."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from jaxtyping import Array, Float

from guarded import (
    Answer,
    Authority,
    Metadata,
    Tokens,
    ask,
    bearer,
    connected,
)
from jacserve.v1 import admin_pb2, jacobian_pb2 as pb, jobs_pb2
from jacserve_server import Registry, serving
from jacserve_server.access import NEEDS
from jacserve_server.callers import SCOPES, Scope

registry = Registry()


@registry.function
def double(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return 2 * x


_FILES = (pb, jobs_pb2, admin_pb2)
SERVICES = [
    each for file in _FILES for each in file.DESCRIPTOR.services_by_name.values()
]
METHODS = {
    method.name: f"/{service.full_name}/{method.name}"
    for service in SERVICES
    for method in service.methods
}
LIST, EVALUATE = METHODS["ListFunctions"], METHODS["Evaluate"]
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVICE_LIST = reflection_pb2.ServerReflectionRequest(
    list_services=""
).SerializeToString()
SETS: list[frozenset[Scope]] = [frozenset({each}) for each in sorted(SCOPES)]
SETS += [SCOPES, SCOPES - {"read"}, SCOPES - {"admin"}, frozenset()]


@dataclass(frozen=True)
class World:
    """A server that asks who calls, and what there is to call it with."""

    tokens: Tokens
    channel: grpc.Channel
    target: str
    identity: str  # Of the client's certificate; "" where there is none.

    def ask(self, path: str, *requests: bytes, metadata: Metadata = ()) -> Answer:
        return ask(self.channel, path, requests or (b"",), metadata)


TRANSPORTS = ["plaintext", "tls", "mtls"]
# What has nothing to do with the connection is tried on one kind of it.
plaintext = pytest.mark.parametrize("world", ["plaintext"], indirect=True)
first_plaintext = pytest.mark.parametrize(
    "world",
    ["plaintext", *(pytest.param(x, marks=pytest.mark.slow) for x in TRANSPORTS[1:])],
    indirect=True,
)


@pytest.fixture(scope="module", params=TRANSPORTS)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    tokens = Tokens(folder)
    tokens.make("first", "read")
    with ExitStack() as stack:
        settings: dict[str, Any] = {"tokens_file": tokens.path}
        credentials = None
        if request.param != "plaintext":
            authority = Authority(folder)
            certificate, key = authority.write("server")
            settings |= {"tls_certificate": certificate, "tls_key": key}
            is_mutual = request.param == "mtls"
            if is_mutual:
                settings |= {"tls_client_ca": authority.ca_file}
            credentials = authority.credentials("alice" if is_mutual else None)
        server = stack.enter_context(serving(registry, **settings))
        channel = stack.enter_context(connected(server.target, credentials))
        identity = "cert:alice" if request.param == "mtls" else ""
        yield World(tokens, channel, server.target, identity)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_known(world: World, token: str) -> None:
    """Waits until the server has read a token."""
    wait_for(lambda: world.ask(LIST, metadata=bearer(token)).reason != "TOKEN_INVALID")


def test_every_rpc_has_a_scope() -> None:
    named = {method.name for service in SERVICES for method in service.methods}
    assert set(NEEDS) == named | {"Check", "Watch", "ServerReflectionInfo"}
    assert set(NEEDS.values()) == SCOPES


def test_nothing_answers_without_its_scope(world: World) -> None:
    held = {
        scopes: world.tokens.make(f"set-{place}", *sorted(scopes))
        for place, scopes in enumerate(SETS)
    }
    until_known(world, held[frozenset()])
    for scopes, token in held.items():
        for method, path in METHODS.items():
            found = world.ask(path, metadata=bearer(token))
            case = f"{method} with {sorted(scopes)}: {found}"
            if NEEDS[method] in scopes:
                assert found.was_let_in, case
            else:
                assert found.code is grpc.StatusCode.PERMISSION_DENIED, case
                assert found.reason == "SCOPE_MISSING", case
                assert not any(found.parts), case


def tricks(good: str, expired: str, revoked: str) -> dict[str, Metadata]:
    """What must not pass for a token."""
    head, secret = good[:21], good[21:]
    other = "A" if secret[0] != "A" else "B"
    return {
        "none": (),
        "empty": (("authorization", ""),),
        "scheme alone": (("authorization", "Bearer"),),
        "scheme and space": (("authorization", "Bearer "),),
        "expired": bearer(expired),
        "revoked": bearer(revoked),
        "no scheme": (("authorization", good),),
        "basic": (("authorization", f"Basic {good}"),),
        "wrong scheme": (("authorization", f"Token {good}"),),
        "truncated": bearer(good[:-1]),
        "longer": bearer(good + "A"),
        "id alone": bearer(head),
        "another secret": bearer(head + other + secret[1:]),
        "no secret": bearer(head + "A" * 43),
        "another id": bearer(f"jsv_{'0' * 16}_{secret}"),
        "upper case": bearer(good.upper()),
        "two of them": (*bearer(good), *bearer(good)),
        "a good one and a bad one": (*bearer(good), *bearer("x")),
        "a bad one and a good one": (*bearer("x"), *bearer(good)),
        "a list": bearer(f"{good}, {good}"),
        "trailing space": bearer(f"{good} x"),
        "quoted": bearer(f'"{good}"'),
        "null": bearer("null"),
        "overlong": bearer("x" * 3000),
        "overlong but right": bearer("0" * 3000 + good),
        "binary": (("authorization-bin", f"Bearer {good}".encode()),),
        "cookie": (("cookie", f"authorization=Bearer {good}"),),
        "another header": (("x-authorization", f"Bearer {good}"),),
        "proxy header": (("proxy-authorization", f"Bearer {good}"),),
        "forwarded certificate": (
            ("x-forwarded-client-cert", 'Subject="CN=admin"'),
            ("x-forwarded-user", "admin"),
        ),
        "request id": (("x-request-id", good),),
    }


@first_plaintext
def test_nothing_else_passes_for_a_token(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    good = world.tokens.make("good", *SCOPES)
    expired = world.tokens.make("expired", *SCOPES, left_s=-60)
    revoked = world.tokens.make("revoked", *SCOPES)
    until_known(world, revoked)
    world.tokens.revoke("revoked")
    wait_for(lambda: not world.ask(LIST, metadata=bearer(revoked)).was_let_in)
    for trick, metadata in tricks(good, expired, revoked).items():
        for method, path in METHODS.items():
            # Not even what can't be read is said to be so.
            found = world.ask(path, b"\xff\xff\xff", metadata=metadata)
            case = f"{method} with {trick}: {found}"
            assert found.code is grpc.StatusCode.UNAUTHENTICATED, case
            assert found.reason == "TOKEN_INVALID", case
            assert not any(found.parts), case
            assert good[21:] not in found.text, case
    for token in (good, expired, revoked):
        assert token[21:] not in caplog.text
    assert world.ask(LIST, metadata=bearer(good)).code is grpc.StatusCode.OK


@plaintext
def test_only_who_has_the_secret_hears_that_it_has_expired(world: World) -> None:
    expired = world.tokens.make("late", *SCOPES, left_s=-60)
    until_known(world, world.tokens.make("good", "read"))
    told = world.ask(LIST, metadata=bearer(expired))
    assert "the token of late expired" in told.text
    for other in (expired[:-1] + "-", expired[:21] + "A" * 43):
        if other != expired:
            found = world.ask(LIST, metadata=bearer(other))
            assert "is none of this server's" in found.text
            assert "late" not in found.text


@plaintext
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_has_any_case(world: World, scheme: str) -> None:
    token = world.tokens.make("good", "read")
    until_known(world, token)
    found = world.ask(LIST, metadata=(("authorization", f"{scheme} {token}"),))
    assert found.code is grpc.StatusCode.OK


@plaintext
def test_what_cannot_be_read_is_said_to_be_so_to_who_may_ask(world: World) -> None:
    token = world.tokens.make("good", *SCOPES)
    until_known(world, token)
    for method in ("GetFunction", "GetJob", "WatchJob"):
        found = world.ask(METHODS[method], b"\xff\xff", metadata=bearer(token))
        assert found.reason == "MALFORMED_REQUEST"


def test_health_is_open_and_reflection_is_not(world: World) -> None:
    found = world.ask(CHECK)
    assert health_pb2.HealthCheckResponse.FromString(found.parts[0]).status == 1
    watching = world.channel.unary_stream(WATCH)(b"", timeout=30)
    assert next(watching) == b"\x08\x01"
    watching.cancel()
    assert not world.ask(REFLECTION, SERVICE_LIST).was_let_in
    token = world.tokens.make("computes", "compute")
    reader = world.tokens.make("reads", "read")
    until_known(world, reader)
    found = world.ask(REFLECTION, SERVICE_LIST, metadata=bearer(token))
    assert (found.reason, found.parts) == ("SCOPE_MISSING", ())
    found = world.ask(REFLECTION, SERVICE_LIST, metadata=bearer(reader))
    assert b"JacobianService" in found.parts[0]
    assert found.code is grpc.StatusCode.OK


def test_health_is_closed_and_reflection_open_where_it_is_said(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    computes, reads = tokens.make("c", "compute"), tokens.make("r", "read")
    settings = {"open_health": False, "open_reflection": True}
    with (
        serving(registry, tokens_file=tokens.path, **settings) as server,
        connected(server.target) as channel,
    ):
        for path in (CHECK, WATCH):
            assert ask(channel, path).reason == "TOKEN_INVALID"
            assert ask(channel, path, metadata=bearer("x")).reason == "TOKEN_INVALID"
            assert ask(channel, path, metadata=bearer(computes)).reason == (
                "SCOPE_MISSING"
            )
        found = ask(channel, CHECK, metadata=bearer(reads))
        assert found.code is grpc.StatusCode.OK
        watching = channel.unary_stream(WATCH)(b"", timeout=30, metadata=bearer(reads))
        assert next(watching) == b"\x08\x01"
        watching.cancel()
        assert b"JobService" in ask(channel, REFLECTION, [SERVICE_LIST]).parts[0]


def test_a_server_that_asks_nobody_tells_everything() -> None:
    with serving(registry) as server, connected(server.target) as channel:
        assert b"JobService" in ask(channel, REFLECTION, [SERVICE_LIST]).parts[0]
        assert ask(channel, CHECK).code is grpc.StatusCode.OK
        # A token that nobody asks for does no harm.
        assert ask(channel, LIST, metadata=bearer("x")).code is grpc.StatusCode.OK


@pytest.mark.parametrize("scopes", [(), ("read",), ("compute", "jobs"), tuple(SCOPES)])
def test_a_certificate_alone_has_the_scopes_of_the_settings(
    tmp_path: Path, scopes: tuple[Scope, ...]
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path / "..")
    certificate, key = authority.write("server")
    settings = {
        "tls_certificate": certificate,
        "tls_key": key,
        "tls_client_ca": tmp_path / "own.pem",
    }
    authority.ca.cert_pem.write_to_path(str(tmp_path / "own.pem"))
    with serving(registry, **settings, tls_client_scopes=scopes) as server:
        with connected(server.target, authority.credentials("alice")) as channel:
            for method, path in METHODS.items():
                found = ask(channel, path)
                if NEEDS[method] in scopes:
                    assert found.was_let_in
                else:
                    assert found.reason == "SCOPE_MISSING"
                    assert "cert:alice" in found.text
        without = authority.credentials()
        made = stranger.ca.issue_cert("localhost", common_name="alice")
        foreign = grpc.ssl_channel_credentials(
            authority.ca_file.read_bytes(),
            made.private_key_pem.bytes(),
            made.cert_chain_pems[0].bytes(),
        )
        for credentials in (None, without, foreign):
            with connected(server.target, credentials) as channel:
                found = ask(channel, LIST)
                assert found.code is grpc.StatusCode.UNAVAILABLE
                assert found.parts == ()


def session_query(number: int) -> bytes:
    query = pb.Query(function="double", quantities=[pb.QUANTITY_JACOBIAN])
    tensor = query.inputs.add().tensor
    tensor.dtype, tensor.data = pb.DTYPE_FLOAT64, bytes(24)
    tensor.shape.append(3)
    return pb.SessionRequest(id=number, query=query).SerializeToString()


class Talk:
    """A session whose queries are sent one by one."""

    def __init__(self, world: World, token: str) -> None:
        self._requests: list[bytes] = []
        self._is_open = True
        self._number = 0
        call = world.channel.stream_stream(METHODS["Session"])
        self.call = call(self._sent(), metadata=bearer(token), timeout=60)

    def _sent(self) -> Iterator[bytes]:
        while self._is_open:
            if self._requests:
                yield self._requests.pop()
            time.sleep(0.005)

    def ask(self) -> pb.SessionResponse:
        self._number += 1
        self._requests.append(session_query(self._number))
        return pb.SessionResponse.FromString(next(self.call))

    def close(self) -> None:
        self._is_open = False


@plaintext
@pytest.mark.parametrize("end", ["revoked", "expired", "narrowed"])
def test_a_session_ends_with_its_token(world: World, end: str) -> None:
    left_s = 2.5 if end == "expired" else None
    token = world.tokens.make("talks", "compute", left_s=left_s)
    until_known(world, token)
    talk = Talk(world, token)
    try:
        assert talk.ask().HasField("result")
        if end == "revoked":
            world.tokens.revoke("talks")
        if end == "narrowed":
            text = world.tokens.path.read_text()
            before, _, mine = text.rpartition('"talks"')
            changed = before + '"talks"' + mine.replace('"compute"', '"read"', 1)
            world.tokens.path.write_text(changed)
        deadline = time.monotonic() + 30
        with suppress(grpc.RpcError):
            while time.monotonic() < deadline:
                talk.ask()
        assert talk.call.code() is (
            grpc.StatusCode.PERMISSION_DENIED
            if end == "narrowed"
            else grpc.StatusCode.UNAUTHENTICATED
        )
    finally:
        talk.close()
        if end != "revoked":
            world.tokens.revoke("talks")


@contextmanager
def certified(folder: Path, ends: datetime | None, **settings: Any) -> Iterator[World]:
    """Yields a connection of alice to a server that asks for certificates alone."""
    authority = Authority(folder)
    certificate, key = authority.write("server")
    settings |= {
        "tls_certificate": certificate,
        "tls_key": key,
        "tls_client_ca": authority.ca_file,
    }
    credentials = authority.credentials("alice", ends=ends)
    with (
        serving(registry, **settings) as server,
        connected(server.target, credentials) as channel,
    ):
        yield World(Tokens(folder), channel, server.target, "cert:alice")


def test_a_certificate_that_expires_ends_its_open_connection(tmp_path: Path) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=4)
    with certified(tmp_path, ends) as world:
        assert world.ask(LIST).code is grpc.StatusCode.OK
        talk = Talk(world, "")
        try:
            assert talk.ask().HasField("result")
            wait_for(lambda: datetime.now(UTC) > ends)
            with suppress(grpc.RpcError):
                talk.ask()
            assert talk.call.code() is grpc.StatusCode.UNAUTHENTICATED
        finally:
            talk.close()
        found = world.ask(LIST)
        assert found.reason == "TOKEN_INVALID"
        assert "the certificate of cert:alice expired at" in found.text


def test_who_was_let_in_by_a_removed_authority_goes(tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    with certified(tmp_path, None, tls_client_age_s=1) as world:
        talk = Talk(world, "")
        try:
            assert talk.ask().HasField("result")
            following = Authority(tmp_path / "next")
            following.ca_file.replace(tmp_path / "ca.pem")
            wait_for(lambda: world.ask(LIST).code is grpc.StatusCode.UNAVAILABLE)
            with suppress(grpc.RpcError):
                while talk.ask():
                    time.sleep(0.05)
            assert talk.call.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            talk.close()


@plaintext
def test_request_ids_have_no_place_for_tricks(world: World) -> None:
    for given in ("a\tb", "x" * 65, "a b", "\x1b[31mred", "é", "a;b", "<b>"):
        try:
            found = world.ask(LIST, metadata=(("x-request-id", given),))
        except ValueError:
            continue  # gRPC does not send it.
        assert given not in found.text
    for given in ("abc-1.2_3", "x" * 64):
        metadata = (("x-request-id", given),)
        assert given in world.ask(LIST, metadata=metadata).text


@plaintext
def test_headers_that_are_too_large_are_refused(world: World) -> None:
    token = world.tokens.make("good", "read")
    until_known(world, token)
    for size in (20_000, 200_000, 2_000_000):
        metadata = (*bearer(token), ("x-large", "x" * size))
        found = world.ask(LIST, metadata=metadata)
        assert found.code in (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.UNAVAILABLE,
        )
        assert not any(found.parts)
    many = tuple((f"x-{number}", "y") for number in range(50))
    found = world.ask(LIST, metadata=(*bearer(token), *many))
    assert found.code is grpc.StatusCode.OK


@plaintext
def test_paths_lead_nowhere_else(world: World) -> None:
    for path in (
        "/jacserve.v1.JacobianService/listfunctions",
        "/jacserve.v1.JacobianService//ListFunctions",
        "/jacserve.v1.JacobianService/ListFunctions/",
        "/jacserve.v1.JacobianService/../JacobianService/ListFunctions",
        "/JacobianService/ListFunctions",
        "/jacserve.v1.JobService/_create",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ):
        found = world.ask(path)
        assert found.code is grpc.StatusCode.UNIMPLEMENTED
        assert not any(found.parts)


def test_an_http_header_in_capitals_is_no_request(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    tokens.make("good", "read")
    with serving(registry, tokens_file=tokens.path) as server:
        host, _, port = server.target.rpartition(":")
        for sent in (
            b"GET / HTTP/1.1\r\nAuthorization: Bearer x\r\n\r\n",
            os.urandom(999),
        ):
            with socket.create_connection((host, int(port)), timeout=30) as raw:
                raw.sendall(sent)
                received = raw.recv(1 << 16)
            assert b"double" not in received
        with connected(server.target) as channel:
            assert ask(channel, CHECK).code is grpc.StatusCode.OK


def test_a_flood_of_strangers_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = Tokens(tmp_path)
    good = tokens.make("good", "read")
    with (
        caplog.at_level(logging.WARNING, logger="jacserve_server.access"),
        serving(registry, tokens_file=tokens.path) as server,
        connected(server.target) as channel,
    ):
        began = time.monotonic()
        for _ in range(100):
            ask(channel, LIST, metadata=bearer(good[:-1]))
        took_s = time.monotonic() - began
        time.sleep(1.05)
        ask(channel, LIST)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= took_s + 3
    assert "more since the last line" in lines[-1]
    assert all(line.startswith("refused ListFunctions of ipv4:") for line in lines)
    assert good[21:-1] not in caplog.text
