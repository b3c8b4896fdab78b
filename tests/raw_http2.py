"""HTTP/2 by hand: requests that no library sends."""

import socket
from collections.abc import Sequence
from contextlib import suppress

_HEADERS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"x"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)
_DATA, _HEADERS_FRAME, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4


def send(
    target: str,
    path: bytes,
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    patience_s: float = 5.0,
) -> bytes:
    """Sends an empty message; returns what comes back until the call has ended."""
    host, _, port = target.rpartition(":")
    fields = b"".join(
        b"\0" + _text(name) + _text(value)
        for name, value in (*_HEADERS, (b":path", path), *headers)
    )
    came = b""
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, b"")
            + _frame(_HEADERS_FRAME, _END_HEADERS, 1, fields)
            + _frame(_DATA, _END_STREAM, 1, bytes(5))
        )
        connection.settimeout(patience_s)
        with suppress(TimeoutError, ConnectionError):
            while b"grpc-message" not in came and (data := connection.recv(2**16)):
                came += data
    return came


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    length = len(body).to_bytes(3, "big")
    return length + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def _text(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text
