"""Who may call what: seen to in the service itself, so that it holds behind proxies.

A call may come with a token, with a client certificate, or with both. A token says what
its bearer may do, and a certificate who calls: who has both is who the certificate says
and may do what the token says.
"""

import logging
import math
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Protocol

from jacserve_server.callers import SCOPES, Call, Caller, Scope
from jacserve_server.errors import ServiceError
from jacserve_server.tls import end_of
from jacserve_server.tokens import Token, TokenFile

_log = logging.getLogger(__name__)

# What each RPC of the contract needs, and those of health and reflection where they are
# not open. No scope has another in it: an administrator computes with "compute" only.
NEEDS: Mapping[str, Scope] = MappingProxyType(
    {
        "ListFunctions": "read",
        "GetFunction": "read",
        "GetSparsity": "compute",
        "Evaluate": "compute",
        "EvaluateStream": "compute",
        "Session": "compute",
        "CreateJob": "jobs",
        "GetJob": "jobs",
        "ListJobs": "jobs",
        "WatchJob": "jobs",
        "CancelJob": "jobs",
        "DeleteJob": "jobs",
        "ReadJobResult": "jobs",
        "GetStatus": "admin",
        "ReleaseFunction": "admin",
        "Check": "read",
        "Watch": "read",
        "ServerReflectionInfo": "read",
    }
)
# It goes into logs, where a token that stands in the wrong header must not.
_REQUEST_ID = re.compile(r"(?!jsv_)[A-Za-z0-9_.-]{1,64}")
_LONGEST_NAME = 128

# A stranger who calls all the time gets a line in so many seconds.
_COMPLAIN_S = 1.0

_Metadata = Iterable[tuple[str, str | bytes]]


class Gate(Protocol):
    """Lets callers in."""

    def admit(self, method: str, context: Any) -> Call:
        """Finds out who calls, and whether they may.

        Args:
            method: The RPC's name.
            context: The call's; of it only what cluster proxies also have is used:
                `invocation_metadata`, `peer` and `auth_context`.

        Returns:
            The call.

        Raises:
            ServiceError: They may not.
        """
        ...

    def readmit(self, call: Call) -> None:
        """Sees whether a call that goes on for long would still be let in.

        Args:
            call: The call.

        Raises:
            ServiceError: Its token was revoked, has expired or lost the scope; or its
                certificate has expired.
        """
        ...


class OpenGate:
    """Lets everybody do everything: for loopback."""

    def admit(self, method: str, context: Any) -> Call:
        """Lets a call in; see `Gate`."""
        caller = Caller("", SCOPES, context.peer())
        return Call(method, caller, request_id_of(context), time.perf_counter())

    def readmit(self, call: Call) -> None:
        """Lets a call go on; see `Gate`."""


class GuardedGate:
    """Lets in who has a token, a client certificate, or both."""

    def __init__(
        self,
        tokens: TokenFile | None,
        *,
        has_certificates: bool,
        scopes: Iterable[Scope] = (),
    ) -> None:
        """Lets nobody in yet.

        Args:
            tokens: The tokens, one of which every call must have; None for none.
            has_certificates: Whether every connection has a client certificate that
                was verified.
            scopes: What a certificate's bearer may do where there are no tokens.
        """
        self._tokens = tokens
        self._has_certificates = has_certificates
        self._scopes = frozenset(scopes)
        self._complain_at = 0.0
        self._unsaid = 0

    def admit(self, method: str, context: Any) -> Call:
        """Lets a call in whose token or certificate allows it; see `Gate`."""
        metadata = context.invocation_metadata() or ()
        peer = context.peer()
        identity, scopes, token_id, until = "", self._scopes, "", math.inf
        try:
            if self._has_certificates:
                found = context.auth_context()
                identity, until = _certified(found), _certified_until(found)
                _check_end(until, identity)
            if self._tokens is not None:
                token = self._token_in(self._tokens, metadata)
                identity = identity or token.identity
                scopes, token_id = token.scopes, token.id
            _check_scope(method, scopes, identity)
        except ServiceError as error:
            self._complain(method, peer, identity, error)
            raise
        caller = Caller(identity, scopes, peer, token_id, until)
        return Call(method, caller, request_id_in(metadata), time.perf_counter())

    def readmit(self, call: Call) -> None:
        """Lets a call go on whose token and certificate still hold; see `Gate`."""
        _check_end(call.caller.until, call.caller.identity)
        if self._tokens is None:
            return
        token = self._tokens.current().get(call.caller.token_id)
        if token is None:
            raise ServiceError(
                "TOKEN_INVALID",
                "the token was revoked meanwhile. Ask whoever runs the server for "
                "another.",
            )
        _check_expiry(token)
        _check_scope(call.method, token.scopes, call.caller.identity)

    def _token_in(self, tokens: TokenFile, metadata: _Metadata) -> Token:
        values = [value for key, value in metadata if key == "authorization"]
        if not values:
            raise ServiceError(
                "TOKEN_INVALID",
                "the call has no token, and this server asks for one. Pass "
                "its file as token_file, --token-file or JACSERVE_TOKEN_FILE; other "
                "clients send the metadata authorization: Bearer TOKEN.",
            )
        if len(values) > 1:
            # One that a proxy looks at must not be another than the one that counts.
            raise ServiceError(
                "TOKEN_INVALID",
                f"the call has {len(values)} authorization headers. Send one.",
            )
        [value] = values
        scheme, _, text = str(value).partition(" ")
        if scheme.lower() != "bearer":
            raise ServiceError(
                "TOKEN_INVALID",
                "the authorization header has another form than this server takes. "
                "Send the metadata authorization: Bearer TOKEN.",
            )
        token = tokens.find(text.lstrip(" "))
        if token is None:
            raise ServiceError(
                "TOKEN_INVALID",
                "the token is none of this server's. See that all of it is there, or "
                "ask whoever runs the server for another.",
            )
        _check_expiry(token)
        return token

    def _complain(
        self, method: str, peer: str, identity: str, error: ServiceError
    ) -> None:
        now = time.monotonic()
        if now < self._complain_at:
            self._unsaid += 1
            return
        others = f" ({self._unsaid} more since the last line)" if self._unsaid else ""
        self._complain_at, self._unsaid = now + _COMPLAIN_S, 0
        who = f"{identity} at {peer}" if identity else peer
        _log.warning("refused %s of %s: %s%s", method, who, error.message, others)


def _check_expiry(token: Token) -> None:
    if token.has_expired:
        assert token.expires is not None
        expired = token.expires.astimezone(UTC)
        raise ServiceError(
            "TOKEN_INVALID",
            f"the token of {token.name} expired at {expired:%Y-%m-%d %H:%M} UTC. Ask "
            "whoever runs the server for another.",
            expired=expired.isoformat(),
        )


def _check_scope(method: str, scopes: frozenset[Scope], identity: str) -> None:
    if NEEDS[method] not in scopes:
        raise _scope_missing(method, NEEDS[method], scopes, identity)


def _scope_missing(
    what: str, needed: Scope, scopes: Iterable[Scope], identity: str
) -> ServiceError:
    has = ", ".join(sorted(scopes)) or "none"
    return ServiceError(
        "SCOPE_MISSING",
        f"{what} needs the scope {needed}, and {identity} has {has}. Ask whoever runs "
        "the server for it.",
        scope=needed,
    )


def _certified(found: Mapping[str, Iterable[bytes]]) -> str:
    """Returns who a verified client certificate is of: its common name, or its SAN."""
    fields = ("x509_common_name", "x509_subject_alternative_name")
    for raw in (each for field in fields for each in found.get(field, ())):
        name = raw.decode(errors="replace")
        # It goes into logs and messages as it is.
        if 0 < len(name) <= _LONGEST_NAME and name.isprintable():
            return f"cert:{name}"
    raise ServiceError(
        "TOKEN_INVALID",
        "the client certificate has no name. Use one with a common name, or with a "
        f"subject alternative name, of at most {_LONGEST_NAME} printable characters.",
    )


def _certified_until(found: Mapping[str, Iterable[bytes]]) -> float:
    try:
        [certificate] = found["x509_pem_cert"]
        return end_of(certificate)
    except (KeyError, ValueError):
        raise ServiceError(
            "TOKEN_INVALID",
            "it can't be told until when the client certificate holds. Use one that "
            "`openssl x509 -noout -enddate` can read.",
        ) from None


def _check_end(until: float, identity: str) -> None:
    # TLS looks at a certificate once, when a connection is opened.
    if time.time() < until:
        return
    expired = datetime.fromtimestamp(until, UTC)
    raise ServiceError(
        "TOKEN_INVALID",
        f"the certificate of {identity} expired at {expired:%Y-%m-%d %H:%M} UTC. Renew "
        "it, and connect again.",
        expired=expired.isoformat(),
    )


# Names the owner of jobs that were made while nobody was asked; no identity
# is called so.
NOBODY = "nobody"


def owner_of(named: str, caller: Caller) -> str:
    """Returns whose jobs a request is about.

    Args:
        named: The owner that it names; "" for the caller.
        caller: Who calls.

    Returns:
        An identity, or what the request names in place of one.

    Raises:
        ServiceError: They are another's, and the caller is no administrator.
    """
    if named in ("", caller.identity):
        return caller.identity
    if "admin" not in caller.scopes:
        raise _scope_missing(
            "to name another owner of jobs", "admin", caller.scopes, caller.identity
        )
    return "" if named == NOBODY else named


def request_id_of(context: Any) -> str:
    """Returns the id that a proxy or a client gave a call, or else makes one.

    Args:
        context: The call's.

    Returns:
        Up to 64 letters, digits, "_", "." and "-".
    """
    return request_id_in(context.invocation_metadata() or ())


def request_id_in(metadata: _Metadata) -> str:
    """Returns the id in a call's metadata, or else makes one; see `request_id_of`."""
    for key, value in metadata:
        if key != "x-request-id" or not isinstance(value, str):
            continue
        if _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
