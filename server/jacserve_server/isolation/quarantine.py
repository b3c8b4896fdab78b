"""Functions that are not run any more, because they ended their process."""

import time
from collections.abc import Mapping

from jacserve_server.errors import ServiceError

_STRIKES = 2


class Quarantine:
    """Counts what functions did to the processes that ran them."""

    def __init__(self) -> None:
        """Starts with all functions free."""
        self._strikes: dict[str, list[str]] = {}

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why functions are not run any more, by qualified name."""
        return {name: r for name in self._strikes if (r := self.reason(name))}

    def reason(self, name: str) -> str:
        """Returns why a function is not run any more; "" where it is.

        Args:
            name: Its qualified name.
        """
        strikes = self._strikes.get(name, [])
        if len(strikes) < _STRIKES:
            return ""
        return f"it ended the process that ran it {len(strikes)} times: " + "; ".join(
            strikes[-_STRIKES:]
        )

    def check(self, name: str) -> None:
        """Raises ServiceError if a function is not run any more."""
        if reason := self.reason(name):
            raise ServiceError(
                "FUNCTION_QUARANTINED",
                f"functions/{name} is not run any more: {reason}. Have an "
                "administrator release it, when it is mended or the server may take "
                "that.",
                function=f"functions/{name}",
                quarantine_reason=reason,
            )

    def strike(self, name: str, deed: str) -> None:
        """Counts against a function that it ended its process.

        Args:
            name: Its qualified name.
            deed: What it did, in words.
        """
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self._strikes.setdefault(name, []).append(f"{deed} at {when} UTC")

    def release(self, name: str) -> None:
        """Has a function run again, as if it had done nothing.

        Args:
            name: Its qualified name.
        """
        self._strikes.pop(name, None)
