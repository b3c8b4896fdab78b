"""Whether strangers may reach a server that does not ask who they are."""

import ipaddress
import socket
from collections.abc import Sequence

from jacserve_server.config import Config


class ExposureError(Exception):
    """The server would let in everybody on a network; the text has the remedy."""


def warnings_of(config: Config) -> Sequence[str]:
    """Returns what whoever runs a server has to know of who may call.

    Args:
        config: The settings.

    Returns:
        Sentences; none where only this machine reaches the server.

    Raises:
        ExposureError: Everybody may call, and it was not said that they shall.
        OSError: The host has no address.
    """
    if is_loopback(config.host):
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
