"""How long to go on asking a server that is away, and how often."""

import random
import time

from jacserve.errors import JacobianError, UnavailableError

_FIRST_S = 0.2
_LONGEST_S = 5.0

# Before each further attempt to send something whole.
RESEND_AFTER_S = (0.2, 0.5, 1.0)
_RETRY_AFTER_S = 0.1
_LONGEST_RETRY_S = 1.0


def passes(error: JacobianError) -> bool:
    """Tells whether a job can be asked for again later, with another answer.

    Args:
        error: What a call has failed with.

    Returns:
        Whether the server is away, or its storage is.
    """
    is_away = isinstance(error, UnavailableError)
    return is_away or error.reason == "STORAGE_UNAVAILABLE"


def retry_after_s(attempt: int, told_s: float = 0.0) -> float:
    """Tells how long to wait before an evaluation is sent again.

    Args:
        attempt: How often it was sent again before.
        told_s: The least that the server has asked for, in seconds.

    Returns:
        Seconds: longer each time, and not the same for all clients.
    """
    back_off_s = min(_RETRY_AFTER_S * 2**attempt, _LONGEST_RETRY_S)
    return max(told_s, back_off_s) * random.uniform(1.0, 1.5)


class Patience:
    """Waits longer and longer between attempts, and in the end gives up."""

    def __init__(self, patience_s: float) -> None:
        """Starts with all of it.

        Args:
            patience_s: For how long a server or its storage may be away at a time.
        """
        self._patience_s = patience_s
        self.renew()

    def renew(self) -> None:
        """Has it all again: the server has answered."""
        self._away_since: float | None = None
        self._wait_s = _FIRST_S

    def wait_s(self, error: JacobianError) -> float:
        """Tells how long to wait before the next attempt.

        Args:
            error: What the last one failed with.

        Returns:
            Seconds.

        Raises:
            JacobianError: The error, when patience is at its end.
        """
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        left_s = self._away_since + self._patience_s - now
        if left_s <= 0:
            raise error
        # Not all clients of a server that comes back at the same moment.
        wait_s = min(self._wait_s * random.uniform(0.5, 1.0), left_s)
        self._wait_s = min(2 * self._wait_s, _LONGEST_S)
        return wait_s
