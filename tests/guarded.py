"""Servers that ask who calls, their tokens and certificates, and calls with them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import trustme
from google.rpc import error_details_pb2, status_pb2

from jacserve_server import tokens
from jacserve_server.callers import Scope

PATIENCE_S = 30.0
Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Answer:
    """What became of a call.

    Attributes:
        code: Its status.
        reason: Of its ErrorInfo; "" where there is none.
        text: Its details, and all that its status holds: to look for secrets.
        parts: The messages that came back.
    """

    code: grpc.StatusCode
    reason: str
    text: str
    parts: tuple[bytes, ...]

    @property
    def was_let_in(self) -> bool:
        """Whether something other than the gate has answered."""
        return self.reason not in {"TOKEN_INVALID", "SCOPE_MISSING"} and (
            self.code is not grpc.StatusCode.UNAUTHENTICATED
        )


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def ask(
    channel: grpc.Channel,
    path: str,
    requests: Iterable[bytes] = (b"",),
    metadata: Metadata = (),
) -> Answer:
    """Calls a method with serialized messages, whatever its kind."""
    call = channel.stream_stream(path)(
        iter(requests), metadata=metadata, timeout=PATIENCE_S
    )
    parts: list[bytes] = []
    with suppress(grpc.RpcError):
        parts.extend(call)
    return Answer(call.code(), *_error(call), tuple(parts))


def _error(call: Any) -> tuple[str, str]:
    text = call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value)
        info = error_details_pb2.ErrorInfo()
        if status.details[0].Unpack(info):
            return info.reason, f"{text} {status}"
    return "", text


class Tokens:
    """A file of tokens."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokens.json"

    def make(self, name: str, *scopes: Scope, left_s: float | None = None) -> str:
        """Makes a token that holds for some seconds, or for ever."""
        end = None if left_s is None else datetime.now(UTC) + timedelta(seconds=left_s)
        return tokens.create(self.path, name, scopes, end)[1]

    def revoke(self, name_or_id: str) -> None:
        assert tokens.revoke(self.path, name_or_id)


class Authority:
    """An authority, and certificates of it in files."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))

    def write(
        self,
        name: str,
        *,
        begins: datetime | None = None,
        ends: datetime | None = None,
    ) -> tuple[Path, Path]:
        """Issues a certificate for this machine, and a name; returns it and its key."""
        made = self.ca.issue_cert(
            "localhost",
            "127.0.0.1",
            common_name=name,
            not_before=begins,
            not_after=ends,
        )
        certificate = self.folder / f"{name}.pem"
        key = self.folder / f"{name}.key"
        fresh = self.folder / "fresh"
        for path, blobs in (
            (key, [made.private_key_pem]),
            (certificate, made.cert_chain_pems),
        ):
            fresh.write_bytes(b"".join(blob.bytes() for blob in blobs))
            fresh.chmod(0o600)
            fresh.replace(path)
        return certificate, key

    def credentials(
        self, name: str | None = None, *, ends: datetime | None = None
    ) -> grpc.ChannelCredentials:
        """Returns those of a client, with a certificate where a name is given."""
        root = self.ca_file.read_bytes()
        if name is None:
            return grpc.ssl_channel_credentials(root)
        certificate, key = self.write(name, ends=ends)
        return grpc.ssl_channel_credentials(
            root, key.read_bytes(), certificate.read_bytes()
        )


@contextmanager
def connected(
    target: str, credentials: grpc.ChannelCredentials | None = None
) -> Iterator[grpc.Channel]:
    """Yields a connection that nobody else uses."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    if credentials is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, credentials, options=options)
    with channel:
        yield channel
