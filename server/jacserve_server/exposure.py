"""Whether strangers may reach a server that does not ask who they are."""

import ipaddress
import socket
from collections.abc import Sequence

from jacserve_server.config import Config


class AddressError(Exception):
    """The server can't listen where it was told to; the text has the remedy."""


class ExposureError(Exception):
    """The server would let in everybody on a network; the text has the remedy."""


def warnings_of(config: Config) -> Sequence[str]:
    """Returns what whoever runs a server has to know of who may call.

    Args:
        config: The settings.

    Returns:
        Sentences; none where only this machine reaches the server.

    Raises:
        AddressError: A host has no address.
        ExposureError: Everybody may call, and it was not said that they shall.
    """
    found: list[str] = []
    host = config.metrics_host
    if config.metrics_port is not None and not _is_ours("metrics_host", host):
        found.append(
            f"whoever reaches {host}:{config.metrics_port} may read the metrics. Let "
            "nobody but Prometheus reach that port, or set metrics_host to 127.0.0.1."
        )
    return [*found, *_warnings_of_calls(config)]


def _warnings_of_calls(config: Config) -> Sequence[str]:
    if _is_ours("host", config.host):
        return ()
    address = f"{config.host}:{config.port}"
    has_tls = config.tls_certificate is not None
    asks = config.tokens_file is not None or config.tls_client_ca is not None
    if not has_tls and not asks:
        if not config.insecure:
            raise ExposureError(
                f"{address} can be reached from other machines, and all who reach it "
                "could call: there is neither TLS nor a file of tokens. Pass --tokens, "
                "or --tls-certificate, --tls-key and --tls-client-ca; or --insecure, "
                "if everybody there may call."
            )
        return (
            f"INSECURE: whoever reaches {address} may call everything and read along.",
        )
    found: list[str] = []
    if not has_tls:
        found.append(
            f"tokens come to {address} unencrypted, and whoever reads along has them. "
            "Let something in front of the server do TLS, or pass --tls-certificate "
            "and --tls-key."
        )
    if not asks:
        found.append(
            f"whoever reaches {address} may call everything: TLS keeps calls secret, "
            "but asks nobody who they are. Pass --tokens or --tls-client-ca."
        )
    return found


def _is_ours(setting: str, host: str) -> bool:
    try:
        return is_loopback(host)
    # A name that has no address now may soon have one, which others reach.
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AddressError(
            f"{setting} {host} has no address: {reason}. Set it to an address of this "
            "machine, or to a name that has one."
        ) from error


def is_loopback(host: str) -> bool:
    """Tells whether an address can be reached from this machine alone.

    Args:
        host: An address or a name; of a name, all its addresses count.

    Raises:
        OSError: It has no address.
    """
    found = socket.getaddrinfo(host.strip("[]") or "::", None, type=socket.SOCK_STREAM)
    return all(_is_local(str(address[0])) for *_, address in found)


def _is_local(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.is_loopback
    return parsed.is_loopback
