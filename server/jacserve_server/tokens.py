"""Bearer tokens: a file of what they may do, with hashes in place of their secrets.

A token is jsv_ID_SECRET. The file has its ID, and a salted hash of its SECRET: who
reads the file can't call with it. It is read again when it changes.
"""

import hmac
import logging
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
)

from jacserve_server.callers import Scope

_log = logging.getLogger(__name__)

_TOKEN = re.compile(r"jsv_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}", re.ASCII)
_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)
_SECRET_BYTES, _SALT_BYTES = 32, 16
_PATIENCE_S = 10.0
_HEX_32 = r"^[0-9a-f]{32}$"
_HEX_64 = r"^[0-9a-f]{64}$"


# For a token that is not known the file is looked at again, but no more often than so:
# anybody can make one up.
_NEW_S = 0.05


class TokenFileError(Exception):
    """A file of tokens can't be used; the text has the remedy, and no secret."""


def check_name(name: str) -> str:
    """Returns the name of whom a token is for.

    Args:
        name: As somebody gave it.

    Raises:
        ValueError: It has a character that it must not have, or is too long.
    """
    if not _NAME.fullmatch(name) or _ID.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name. Pass 1 to 63 letters, digits, '-', '_', '.' or "
            "'@', the first a letter or a digit; not the 16 digits of an id."
        )
    return name


class Token(BaseModel):
    """A token as the file has it.

    Attributes:
        id: Names it, in the file and to revoke it.
        name: Whom it is for; several may have one name, as when one replaces another.
        scopes: What its bearer may do.
        created: When it was made.
        expires: Until when it holds; None for ever.
        salt: Of the hash; 16 random bytes in hexadecimal digits.
        hash: Of its secret.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    name: Annotated[str, AfterValidator(check_name)]
    scopes: frozenset[Scope]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    salt: str = Field(pattern=_HEX_32, repr=False)
    hash: str = Field(pattern=_HEX_64, repr=False)

    @field_serializer("scopes")
    def _in_order(self, scopes: frozenset[Scope]) -> list[Scope]:
        return sorted(scopes)

    @property
    def identity(self) -> str:
        """Who calls with it."""
        return f"token:{self.name}"

    @property
    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and time.time() >= self.expires.timestamp()

    def is_of(self, secret: str) -> bool:
        """Tells whether a secret is its, in a time that does not depend on it."""
        return hmac.compare_digest(_hashed(self.salt, secret), self.hash)


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    version: Annotated[int, Field(ge=1, le=1)] = 1
    tokens: list[Token] = []


def _hashed(salt: str, secret: str) -> str:
    # One round of a fast hash: slow ones make it dear to guess what people choose,
    # and nobody guesses 256 random bits. The salt keeps equal secrets, and tables made
    # beforehand, from showing.
    return hmac.digest(salt.encode(), secret.encode(), "sha256").hex()


# Unknown ids are compared with it, so that they take as long as known ones.
_NOBODY = Token(
    id="0" * 16,
    name="nobody",
    scopes=frozenset(),
    created=datetime.fromtimestamp(0, UTC),
    salt=secrets.token_hex(_SALT_BYTES),
    hash=secrets.token_hex(32),
)
_NOBODY_SECRET = secrets.token_urlsafe(_SECRET_BYTES)


class TokenFile:
    """The tokens of a server, which follow their file. Used from one thread."""

    def __init__(self, path: Path, *, look_s: float = 1.0) -> None:
        """Reads the file.

        Args:
            path: The file.
            look_s: After so many seconds a change counts at the latest.

        Raises:
            TokenFileError: It can't be read, or others can change it.
        """
        self._path = path
        self._look_s = look_s
        self._looked_at = time.monotonic()
        self._seen = _signature(path)
        self._tokens = _by_id(read(path))
        self._failed: tuple[object, str] | None = None
        self._verified: dict[str, str] = {}

    def current(self) -> Mapping[str, Token]:
        """Returns the tokens by id, as they were in the file a second ago at most.

        While the file can't be read, the last ones that could hold.
        """
        self._look(self._look_s)
        return self._tokens

    def _look(self, after_s: float) -> None:
        now = time.monotonic()
        if now >= self._looked_at + after_s:
            self._looked_at = now
            self._reload()

    def find(self, text: str) -> Token | None:
        """Finds a token; an expired one, too.

        Args:
            text: All of it, as its bearer has it.

        Returns:
            The token; None where there is none of that id, or its secret is another.
        """
        match = _TOKEN.fullmatch(text)
        if match is None:
            return None
        id_, secret = match.groups()
        found = self.current().get(id_)
        if found is None:  # It may be new.
            self._look(_NEW_S)
            found = self._tokens.get(id_)
        # A hash takes 25 us of a call, as often as others use the processor's caches
        # between two calls. What was hashed before is compared as it is.
        verified = self._verified.get(id_, _NOBODY_SECRET)
        is_its = hmac.compare_digest(verified, secret)
        if not is_its:
            is_its = (found or _NOBODY).is_of(secret)
        if found is None or not is_its:
            return None
        self._verified[id_] = secret
        return found

    def _reload(self) -> None:
        signature: object = None
        try:
            signature = _signature(self._path)
            if signature != self._seen:
                self._tokens = _by_id(read(self._path))
                self._verified.clear()
                # Not before: what kept this process from reading, as too many open
                # files do, may pass without a change of the file.
                self._seen = signature
                _log.info("%s: %d tokens", self._path, len(self._tokens))
            self._failed = None
        except TokenFileError as error:
            failed = signature, str(error)
            if failed != self._failed:
                _log.error("%s; the tokens read before it hold.", error)
            self._failed = failed


def _by_id(tokens: Iterable[Token]) -> Mapping[str, Token]:
    return MappingProxyType({token.id: token for token in tokens})


def _signature(path: Path) -> object:
    """Returns what changes whenever the file does."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _unreadable(path: Path, error: OSError) -> TokenFileError:
    cause = error.strerror or type(error).__name__
    return TokenFileError(f"the tokens in {path} can't be read: {cause}")


def read(path: Path) -> list[Token]:
    """Reads a file of tokens.

    Args:
        path: The file.

    Returns:
        The tokens.

    Raises:
        TokenFileError: It can't be read, others can change it, or it is no such file.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            _check_access(path, found)
            raw = file.read()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        contents = _Contents.model_validate_json(raw)
    except ValidationError as error:
        [first, *_] = error.errors(include_input=False)
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise TokenFileError(
            f"the tokens in {path} can't be read: {place}: {first['msg']}. Make the "
            "file with `jacserve tokens`"
        ) from None
    # Only of what is used: a file that is at fault is read again and again.
    _warn_of_readers(path, found)
    return contents.tokens


def _check_access(path: Path, found: os.stat_result) -> None:
    if os.name != "posix":
        return
    is_ours = found.st_uid in (0, os.geteuid())
    if not is_ours or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TokenFileError(
            f"the tokens in {path} can be changed by others than this user. Make it "
            f"this user's file, and run: chmod 600 {path}"
        )


def _warn_of_readers(path: Path, found: os.stat_result) -> None:
    if os.name == "posix" and found.st_mode & stat.S_IROTH:
        _log.warning(
            "%s can be read by everybody on this machine. Hashes don't let anyone "
            "call; names and scopes are there to be seen. Run: chmod 600 %s",
            path,
            path,
        )


def create(
    path: Path, name: str, scopes: Iterable[Scope], expires: datetime | None
) -> tuple[Token, str]:
    """Makes a token, and adds it to a file; makes the file if need be.

    Args:
        path: The file.
        name: Whom it is for.
        scopes: What its bearer may do.
        expires: Until when it holds; None for ever.

    Returns:
        The token, and what its bearer has to send. That is kept nowhere.

    Raises:
        TokenFileError: The file can't be read or written.
        ValueError: The name is none.
    """
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    salt = secrets.token_hex(_SALT_BYTES)
    token = Token(
        id=secrets.token_hex(8),
        name=check_name(name),
        scopes=frozenset(scopes),
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
        salt=salt,
        hash=_hashed(salt, secret),
    )
    with _changing(path):
        earlier = read(path) if path.exists() else []
        _write(path, [*earlier, token])
    return token, f"jsv_{token.id}_{secret}"


def revoke(path: Path, name_or_id: str) -> list[Token]:
    """Takes tokens out of a file.

    Args:
        path: The file.
        name_or_id: The id of one, or whom they are for.

    Returns:
        Those that were taken out.

    Raises:
        TokenFileError: The file can't be read or written.
    """
    with _changing(path):
        earlier = read(path)
        revoked = [each for each in earlier if name_or_id in (each.id, each.name)]
        if revoked:
            _write(path, [each for each in earlier if each not in revoked])
    return revoked


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Keeps other commands from changing the file: one of the changes would be lost."""
    try:
        with FileLock(f"{path}.lock", timeout=_PATIENCE_S, mode=0o600):
            yield
    except Timeout as error:
        raise TokenFileError(
            f"{path} is being changed by another process. Try again; if there is none, "
            f"remove {path}.lock"
        ) from error
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise TokenFileError(f"{path} can't be written: {cause}") from error


def _write(path: Path, tokens: list[Token]) -> None:
    """Replaces the file, whole or not at all."""
    text = _Contents(tokens=tokens).model_dump_json(indent=2)
    # Readable by its owner alone from the first byte on.
    descriptor, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
            if path.exists() and hasattr(os, "chown"):
                # Else a file that root changes is not the server's any more, nor that
                # of a group which could read it.
                found = path.stat()
                os.chown(fresh, found.st_uid, found.st_gid)
                os.chmod(fresh, found.st_mode & 0o644)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise
