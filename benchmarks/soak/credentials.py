"""Who may call the server of the soak: certificates and tokens, in files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import trustme

from jacserve_server import tokens
from jacserve_server.callers import Scope

CLIENT_SCOPES: tuple[Scope, ...] = ("read", "compute", "jobs")


class Credentials:
    """A certificate of the server's, and the file of its tokens."""

    def __init__(self, folder: Path) -> None:
        """Makes the certificate, and no token yet.

        Args:
            folder: For the files.
        """
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.tokens = folder / "tokens.json"
        self._certificate, self._key = folder / "server.pem", folder / "server.key"
        authority.cert_pem.write_to_path(str(self.ca))
        made = authority.issue_cert("127.0.0.1", "localhost")
        made.private_key_pem.write_to_path(str(self._key))
        self._key.chmod(0o600)
        for blob in made.cert_chain_pems:
            blob.write_to_path(str(self._certificate), append=True)

    def create(
        self, name: str, scopes: Sequence[Scope] = CLIENT_SCOPES
    ) -> tuple[str, str]:
        """Makes a token; returns its id and its text."""
        token, text = tokens.create(self.tokens, name, scopes, None)
        return token.id, text

    def revoke(self, token_id: str) -> None:
        """Takes a token back."""
        tokens.revoke(self.tokens, token_id)

    @property
    def settings(self) -> Mapping[str, str]:
        """Settings of the server."""
        return {
            "tokens_file": str(self.tokens),
            "tls_certificate": str(self._certificate),
            "tls_key": str(self._key),
        }

    def environment(self, token: str) -> Mapping[str, str]:
        """Returns what has a client in another process call with a token."""
        return {"JACSERVE_TOKEN": token, "JACSERVE_TLS_CA": str(self.ca)}
