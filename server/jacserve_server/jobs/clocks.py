"""The time that decides when jobs are tried again and deleted: one that never jumps."""

import logging
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

# Less than that two readings of two clocks may differ by themselves.
_JUMP_S = 60.0


def _uptime_s() -> float:
    # Also counts while the machine sleeps, where the system has such a clock.
    boottime = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(boottime)


class SteadyClock:
    """Tells the time since 1970 as it was at first, and goes on steadily from there.

    When somebody sets the machine's clock, jobs are neither deleted before their time
    nor held up for ever: they go by the new time when the server is started anew.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = _uptime_s,
    ) -> None:
        """Reads both clocks.

        Args:
            wall: The time in seconds since 1970, which may jump.
            steady: Seconds since whenever, which do not.
        """
        self._wall = wall
        self._steady = steady
        self._offset_s = wall() - steady()
        self._jumped_s = 0.0

    def __call__(self) -> float:
        """Returns the time in seconds since 1970."""
        now = self._steady() + self._offset_s
        jumped_s = self._wall() - now
        if abs(jumped_s - self._jumped_s) > _JUMP_S:
            self._jumped_s = jumped_s
            _log.warning(
                "the machine's clock is off by %.0f s from what it was when the server "
                "started; jobs keep to the time from before until it is started anew",
                jumped_s,
            )
        return now
