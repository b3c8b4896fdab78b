"""The way into a server, as its settings have it: who may come in, and how."""

import logging
from typing import NamedTuple

import grpc

from jacserve_server import exposure
from jacserve_server.access import Gate, GuardedGate, OpenGate
from jacserve_server.config import Config
from jacserve_server.telemetry import Telemetry
from jacserve_server.tls import Certificates
from jacserve_server.tokens import TokenFile

_log = logging.getLogger(__name__)


class Entrance(NamedTuple):
    """Who may come in, and how.

    Attributes:
        gate: Lets calls in.
        credentials: Those of TLS; None for none.
        telemetry: Sends spans of calls; None for none.
    """

    gate: Gate
    credentials: grpc.ServerCredentials | None
    telemetry: Telemetry | None


def open_entrance(config: Config) -> Entrance:
    """Opens the files of tokens and certificates, and says what is dangerous.

    Args:
        config: The settings.

    Returns:
        The entrance.

    Raises:
        AddressError: A host has no address.
        ExposureError: Strangers may reach the server, and it would let them in.
        CertificateError: There are no certificates to serve TLS with.
        TokenFileError: The file of tokens is of no use.
        TelemetryError: Spans can't be sent.
    """
    for warning in exposure.warnings_of(config):
        _log.warning("%s", warning)
    credentials = None
    if config.tls_certificate is not None and config.tls_key is not None:
        credentials = Certificates(
            config.tls_certificate, config.tls_key, config.tls_client_ca
        ).credentials()
    gate: Gate = OpenGate()
    if config.tokens_file is not None or config.tls_client_ca is not None:
        gate = GuardedGate(
            TokenFile(config.tokens_file) if config.tokens_file is not None else None,
            has_certificates=config.tls_client_ca is not None,
            scopes=config.tls_client_scopes,
        )
    return Entrance(gate, credentials, Telemetry() if config.open_telemetry else None)
