"""Where both clients connect to, and what they show there.

What is not passed comes from the environment. Secrets go into the channel and nowhere
else: no text that is made here has any.
"""

import ipaddress
import logging
import os
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import grpc
import grpc.aio

from jacserve.channels import channel_options
from jacserve.errors import UnavailableError

DEFAULT_TARGET = "localhost:50051"
# What is read of the environment.
VARIABLES = frozenset(
    {
        "JACSERVE_TARGET",
        "JACSERVE_TOKEN",
        "JACSERVE_TOKEN_FILE",
        "JACSERVE_TLS",
        "JACSERVE_TLS_CA",
        "JACSERVE_TLS_SERVER_NAME",
        "JACSERVE_CLIENT_CERTIFICATE",
        "JACSERVE_CLIENT_KEY",
        "JACSERVE_PLAINTEXT_TOKEN",
    }
)

_log = logging.getLogger(__name__)
# Targets in gRPC's own notation.
_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


class ConnectionOptionError(ValueError):
    """There can be no such connection; the text says why."""


class ConnectOptions(TypedDict, total=False):
    """How to connect. What is left out comes from the environment.

    Attributes:
        token: The bearer token; "" for none, whatever the environment has. Else from
            JACSERVE_TOKEN, or the file that JACSERVE_TOKEN_FILE names.
        token_file: A file that has it in place of that.
        tls: Whether to use TLS; by default with any of the options below. Else from
            JACSERVE_TLS, "1" or "0".
        ca: Certificates of the authorities to trust, PEM: a path, or the bytes. Else
            from the file that JACSERVE_TLS_CA names; else those of the system.
        certificate: The client's own certificate for mutual TLS, with those between it
            and its authority: likewise, JACSERVE_CLIENT_CERTIFICATE.
        key: Its private key: likewise, JACSERVE_CLIENT_KEY.
        server_name: The name that the server's certificate must have, where it is not
            the target's; else from JACSERVE_TLS_SERVER_NAME.
        plaintext_token: Lets a token go to another machine without TLS, to be read by
            all in between; else from JACSERVE_PLAINTEXT_TOKEN.
        retries: How often an evaluation is sent again that a server had no room for,
            or that it did not answer because it went away; 3 by default, and 10 with
            several targets.
    """

    token: str | None
    token_file: str | Path | None
    tls: bool | None
    ca: str | Path | bytes | None
    certificate: str | Path | bytes | None
    key: str | Path | bytes | None
    server_name: str | None
    plaintext_token: bool | None
    retries: int | None


@dataclass(frozen=True, slots=True)
class Connection:
    """Where to connect to, and how.

    Attributes:
        name: The targets, for messages.
        targets: Each of them.
        uri: The target in gRPC's notation.
        options: Of the channel.
        retries: How often an evaluation may be sent again.
        metadata: What goes with each call.
        credentials: Of TLS; None for plaintext.
    """

    name: str
    targets: tuple[str, ...]
    uri: str
    options: tuple[tuple[str, Any], ...] = field(repr=False)
    retries: int
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    credentials: grpc.ChannelCredentials | None = field(repr=False)

    def channel(self) -> grpc.Channel:
        """Opens a channel; the first call connects it."""
        if self.credentials is None:
            channel = grpc.insecure_channel(self.uri, self.options)
        else:
            channel = grpc.secure_channel(self.uri, self.credentials, self.options)
        return cast("grpc.Channel", self._authorized(channel))

    def async_channel(self) -> grpc.aio.Channel:
        """Opens a channel of asyncio; the first call connects it."""
        if self.credentials is None:
            channel = grpc.aio.insecure_channel(self.uri, self.options)
        else:
            channel = grpc.aio.secure_channel(self.uri, self.credentials, self.options)
        return cast("grpc.aio.Channel", self._authorized(channel))

    def _authorized(self, channel: Any) -> Any:
        return _Authorized(channel, self.metadata) if self.metadata else channel


class _Authorized:
    """A channel, of either kind, whose calls have metadata.

    Interceptors and gRPC's own call credentials do this, too: an interceptor takes
    four times as long, and a credential's plugin runs in a thread of its own.
    """

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return _Call(self._channel.unary_unary(*args, **options), self._metadata)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return _Call(self._channel.unary_stream(*args, **options), self._metadata)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return _Call(self._channel.stream_unary(*args, **options), self._metadata)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return _Call(self._channel.stream_stream(*args, **options), self._metadata)

    def close(self) -> Any:
        return self._channel.close()

    def __enter__(self) -> "_Authorized":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


class _Call:
    """A call of a channel, with metadata."""

    def __init__(self, call: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._call = call
        self._metadata = metadata

    def __call__(self, request: Any, timeout: float | None = None) -> Any:
        return self._call(request, timeout=timeout, metadata=self._metadata)

    def future(self, request: Any, timeout: float | None = None) -> Any:
        return self._call.future(request, timeout=timeout, metadata=self._metadata)


def connection(
    target: str | Sequence[str] | None,
    options: ConnectOptions,
    environment: Mapping[str, str] = os.environ,
) -> Connection:
    """Finds out where to connect to, and how.

    Args:
        target: An address, or several with commas between, or in a sequence; or a
            target in gRPC's notation. None for JACSERVE_TARGET, and without that for
            this machine.
        options: How; see `ConnectOptions`.
        environment: Has what is left out.

    Returns:
        The connection, which is not made yet.

    Raises:
        ConnectionOptionError: There can be none.
        UnavailableError: None of several targets has an address.
    """
    targets = _targets(target, environment.get("JACSERVE_TARGET"))
    hosts = [host for each in targets for host in _hosts(each)]
    is_loopback = all(map(_is_loopback, hosts))
    is_balanced = len(targets) > 1 or targets[0].startswith(("dns:", "ipv4:", "ipv6:"))
    credentials = _credentials(options, environment)
    authority = _text(options, "server_name", "JACSERVE_TLS_SERVER_NAME", environment)
    if len(targets) > 1 and authority is None and credentials is not None:
        if len(set(hosts)) > 1:
            raise ConnectionOptionError(
                f"{', '.join(targets)} have several names, and certificates are "
                "checked for one. Pass server_name, or set JACSERVE_TLS_SERVER_NAME: "
                "a name that the certificates of all of them have."
            )
        authority = hosts[0]
    token = _token(options, environment)
    may_be_read = credentials is None and not is_loopback
    if token and may_be_read and not _flag(options, "plaintext_token", environment):
        raise ConnectionOptionError(
            f"a token would go to {', '.join(targets)} without TLS, to be read by all "
            "in between. Pass ca, or tls=True for the system's authorities; or set "
            'JACSERVE_TLS_CA or JACSERVE_TLS=1. To send none, pass token="". Where '
            "the network can be trusted, pass plaintext_token=True or set "
            "JACSERVE_PLAINTEXT_TOKEN=1."
        )
    retries = options.get("retries")
    return Connection(
        name=", ".join(targets),
        targets=tuple(targets),
        uri=targets[0] if len(targets) == 1 else _addresses(targets),
        options=tuple(
            channel_options(
                is_balanced=is_balanced, is_loopback=is_loopback, authority=authority
            )
        ),
        retries=(10 if is_balanced else 3) if retries is None else retries,
        metadata=(("authorization", f"Bearer {token}"),) if token else (),
        credentials=credentials,
    )


def split_targets(text: str) -> list[str]:
    """Splits addresses with commas between them; a target of gRPC's stays whole."""
    if _SCHEME.match(text):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def _targets(target: str | Sequence[str] | None, default: str | None) -> list[str]:
    if target is None:
        target = default or DEFAULT_TARGET
    given = [target] if isinstance(target, str) else target
    found = list(dict.fromkeys(part for text in given for part in split_targets(text)))
    if not found:
        raise ConnectionOptionError(
            f"{target!r} has no address. Pass HOST:PORT, or several."
        )
    if len(found) > 1:
        for each in found:
            if _SCHEME.match(each):
                raise ConnectionOptionError(
                    f"{each} can't be one of several targets. Pass HOST:PORT for each."
                )
            if _host_and_port(each)[1] is None:
                raise ConnectionOptionError(
                    f"{each} has no port. Pass HOST:PORT, such as {each}:50051."
                )
    return found


def _host_and_port(address: str) -> tuple[str, int | None]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or (":" in host and not host.startswith("[")):
        return address.strip("[]"), None
    return host.strip("[]"), int(port)


def _hosts(target: str) -> list[str]:
    scheme = _SCHEME.match(target)
    if scheme is None:
        return [_host_and_port(target)[0]]
    rest = target[scheme.end() :]
    if scheme[1].startswith("unix"):
        return ["localhost"]
    if scheme[1] == "dns":
        rest = rest.rpartition("/")[2]
    return [_host_and_port(address)[0] for address in rest.split(",")]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _addresses(targets: Sequence[str]) -> str:
    """Resolves several addresses, which gRPC takes as numbers only."""
    found: list[tuple[str, int]] = []
    for target in targets:
        host, port = _host_and_port(target)
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            _log.warning("%s has no address: %s", target, error.strerror)
            continue
        # One family, lest a server that has both gets twice its share.
        families = {info[0] for info in infos}
        family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        found += [cast("Any", x[4])[:2] for x in infos if x[0] == family]
    if not found:
        raise UnavailableError(
            f"none of {', '.join(targets)} has an address. Check the names.",
            code="UNAVAILABLE",
        )
    found = list(dict.fromkeys(found))
    if all(":" not in host for host, _ in found):
        return "ipv4:" + ",".join(f"{host}:{port}" for host, port in found)
    # Of one family again: an IPv4 address also has a name in IPv6.
    return "ipv6:" + ",".join(
        f"[{host if ':' in host else f'::ffff:{host}'}]:{port}" for host, port in found
    )


def _credentials(
    options: ConnectOptions, environment: Mapping[str, str]
) -> grpc.ChannelCredentials | None:
    ca = _pem(options, "ca", "JACSERVE_TLS_CA", environment)
    chain = _pem(options, "certificate", "JACSERVE_CLIENT_CERTIFICATE", environment)
    key = _pem(options, "key", "JACSERVE_CLIENT_KEY", environment)
    name = _text(options, "server_name", "JACSERVE_TLS_SERVER_NAME", environment)
    is_on = _flag(options, "tls", environment)
    if is_on is None:
        is_on = any(each is not None for each in (ca, chain, key, name))
    if not is_on:
        return None
    if (chain is None) != (key is None):
        missing = "key" if key is None else "certificate"
        raise ConnectionOptionError(
            f"a client's certificate and its key come together; there is no {missing}. "
            f"Pass {missing}, or set JACSERVE_CLIENT_{missing.upper()}."
        )
    return grpc.ssl_channel_credentials(ca or _system_authorities(), key, chain)


def _system_authorities() -> bytes | None:
    """Reads where OpenSSL finds them; None for those that come with gRPC."""
    file = ssl.get_default_verify_paths().cafile
    return Path(file).read_bytes() if file else None


def _pem(
    options: ConnectOptions,
    name: str,
    variable: str,
    environment: Mapping[str, str],
) -> bytes | None:
    given = cast("str | Path | bytes | None", options.get(name))
    source = name if given else variable
    given = given or environment.get(variable)
    if not given:
        return None
    data = given if isinstance(given, bytes) else _read(Path(given), source)
    if b"-----BEGIN " not in data:
        raise ConnectionOptionError(
            f"{source} is no PEM file: it has no line -----BEGIN. Convert it, for "
            "example by `openssl x509 -inform der`."
        )
    return data


def _token(options: ConnectOptions, environment: Mapping[str, str]) -> str | None:
    """Returns the token; None where there is none."""
    token, file = options.get("token"), options.get("token_file")
    source = "token"
    if token is None and file is None:
        source, token = "JACSERVE_TOKEN", environment.get("JACSERVE_TOKEN") or None
    if token is None and file is None:
        source, file = "JACSERVE_TOKEN_FILE", environment.get("JACSERVE_TOKEN_FILE")
    if token is None and file:
        source = f"the token in {file}"
        token = _read(Path(file), "the file of the token").decode("latin-1").strip()
        if not token:
            raise ConnectionOptionError(f"{file} has no token. Write it there.")
    if not token:
        return None
    if not _TOKEN.fullmatch(token):
        raise ConnectionOptionError(
            f"{source} can't go into a header: a token has at most 4096 printable "
            "ASCII characters, and no spaces. Copy it again, as `jacserve tokens "
            "create` printed it."
        )
    return token


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConnectionOptionError(
            f"{what} can't be read: {path}: {error.strerror}."
        ) from error


def _text(
    options: ConnectOptions,
    name: str,
    variable: str,
    environment: Mapping[str, str],
) -> str | None:
    return cast("str | None", options.get(name)) or environment.get(variable) or None


def _flag(
    options: ConnectOptions, name: str, environment: Mapping[str, str]
) -> bool | None:
    given = cast("bool | None", options.get(name))
    if given is not None:
        return given
    variable = f"JACSERVE_{name.upper()}"
    text = environment.get(variable, "").lower()
    if text not in _TRUE | _FALSE:
        raise ConnectionOptionError(f"{variable} is {text}. Set it to 1 or 0.")
    return (text in _TRUE) if text else None
