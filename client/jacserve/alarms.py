"""Calls functions when their time has come, in one thread for all."""

import heapq
import threading
import time
from collections.abc import Callable
from itertools import count


class Alarms:
    """Functions that are to be called later. Thread-safe."""

    def __init__(self) -> None:
        """Starts no thread yet."""
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()  # Of two at the same time, the first goes first.
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def set(self, delay_s: float, call: Callable[[], object]) -> None:
        """Has a function called.

        Args:
            delay_s: After how many seconds.
            call: The function; it returns soon.
        """
        with self._changed:
            entry = (time.monotonic() + delay_s, next(self._numbers), call)
            heapq.heappush(self._due, entry)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="jacserve-alarms", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Calls nothing any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (wait_s := self._wait_s()) != 0.0:
                    self._changed.wait(wait_s)
                if self._is_closed:
                    return
                _, _, call = heapq.heappop(self._due)
            call()

    def _wait_s(self) -> float | None:
        """Seconds until the next is due; None where there is none."""
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
