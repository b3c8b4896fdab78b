"""TLS: the server's certificate, read again when it changes, and clients' if wanted."""

import logging
import os
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

_log = logging.getLogger(__name__)

_SOON = timedelta(days=7)
# To check a key takes long, and who connects again and again must not have it done.
_AGAIN_S = 1.0
_NOTHING: tuple[Sequence[object], str] = ((), "")


class CertificateError(Exception):
    """TLS can't be served with these files; the text has the remedy."""


@lru_cache(maxsize=2**10)
def end_of(certificate: bytes) -> float:
    """Returns when a certificate ends, in seconds since 1970.

    Args:
        certificate: In PEM.

    Raises:
        ValueError: It can't be read.
    """
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp()


class Certificates:
    """The files of a server's TLS, which it follows.

    gRPC asks at every handshake, in threads of its own. Connections that are open keep
    what they began with.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """Reads the files.

        Args:
            certificate: PEM file of the server's certificate, and of those between it
                and a root.
            key: PEM file of its key.
            client_ca: PEM file of the authorities whose certificates clients must
                have; None for none.

        Raises:
            CertificateError: A file can't be read, the key is of another certificate,
                or that does not hold now.
        """
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._lock = threading.Lock()
        self._seen = self._signatures()
        self._failed, self._again_at = _NOTHING, 0.0
        self._first = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """Returns them for a port of gRPC."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._fetch,  # pyright: ignore[reportArgumentType]: it may return None
            require_client_authentication=self._client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns what has changed since the last handshake; never raises."""
        with self._lock:
            signatures, now = self._signatures(), time.monotonic()
            if signatures == self._seen:
                return None
            if signatures == self._failed[0] and now < self._again_at:
                return None
            self._again_at = now + _AGAIN_S
            try:
                loaded = self._load()
            except Exception as error:
                self._complain(signatures, error)
                return None
            # Not before: a certificate may hold later, and what kept this process from
            # reading it may pass, without a change of the files.
            self._seen, self._failed = signatures, _NOTHING
        _log.info("%s was read again", self._certificate)
        return loaded

    def _complain(self, signatures: Sequence[object], error: Exception) -> None:
        failed = signatures, str(error)
        if failed != self._failed:
            is_told = isinstance(error, CertificateError)
            _log.error(
                "%s The certificate read before it is used.",
                error if is_told else "certificates can't be read.",
                exc_info=None if is_told else error,
            )
        self._failed = failed

    def _signatures(self) -> Sequence[object]:
        """Returns what changes whenever a file does."""
        return [
            _signature(path)
            for path in (self._certificate, self._key, self._client_ca)
            if path is not None
        ]

    def _load(self) -> grpc.ServerCertificateConfiguration:
        chain, key = _read(self._certificate), _read(self._key)
        _check_certificate(self._certificate, chain, self._key, key)
        roots = None
        if self._client_ca is not None:
            roots = _read(self._client_ca)
            _certificates(self._client_ca, roots)
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots)


def _signature(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as error:
        return str(error)
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise CertificateError(
            f"{path} can't be read: {cause}. Pass a PEM file that is there, and that "
            "the user of the server may read."
        ) from error


def _certificates(path: Path, raw: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(raw)
    except ValueError as error:
        raise CertificateError(
            f"{path} has no certificate that can be read. Pass a PEM file, which has "
            "BEGIN CERTIFICATE in it."
        ) from error


def _check_certificate(path: Path, chain: bytes, key_path: Path, key: bytes) -> None:
    certificate = _certificates(path, chain)[0]
    try:
        public = serialization.load_pem_private_key(key, None).public_key()
    # The texts of these may quote the file.
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(
            f"{key_path} has no key that can be read. Pass a PEM file, which has BEGIN "
            "PRIVATE KEY in it; one without a passphrase."
        ) from None
    if public != certificate.public_key():
        raise CertificateError(
            f"the key in {key_path} is not that of the first certificate in {path}. "
            "Pass the two that belong together."
        )
    now = datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end:
        raise CertificateError(
            f"the certificate in {path} expired at {end:%Y-%m-%d %H:%M} UTC. Renew it."
        )
    if now < start:
        raise CertificateError(
            f"the certificate in {path} holds from {start:%Y-%m-%d %H:%M} UTC on. See "
            "that this machine's clock is right, or wait."
        )
    if end - now < _SOON:
        _log.warning("the certificate in %s expires at %s", path, end.isoformat())
    if os.name == "posix" and key_path.stat().st_mode & 0o004:
        _log.warning(
            "%s can be read by everybody on this machine. Run: chmod 600 %s",
            key_path,
            key_path,
        )
