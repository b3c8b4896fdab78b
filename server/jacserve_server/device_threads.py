"""Threads that wait for devices.

What they do takes some 100 us at least, so that the 50 us of a pool would be felt: here
a call goes to a thread, and its result back to the event loop, in about half of that.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

_Call = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


class DeviceThreads:
    """Runs calls in threads of its own. Used from event loops."""

    def __init__(self, count: int) -> None:
        """Starts no thread yet.

        Args:
            count: The most calls that run at once.
        """
        self._count = count
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads = 0
        self._unfinished = 0

    def start(self, call: Callable[[], Any]) -> "asyncio.Future[Any]":
        """Has a call run when a thread is free for it.

        Args:
            call: Raises nothing but Exceptions.

        Returns:
            A future of this event loop, of the call's result or its exception. To
            cancel it does not stop the call.

        Raises:
            RuntimeError: There is no thread, and none can be started.
        """
        if self._threads < min(self._unfinished + 1, self._count):
            self._start_thread()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._unfinished += 1
        self._calls.put((loop, future, call))
        return future

    def close(self) -> None:
        """Begins no more calls; those that run are not waited for."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _start_thread(self) -> None:
        # What runs at the end can't be stopped, and must not keep the process.
        name = f"device-{self._threads + 1}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # There is no memory for it. The others do its work, if there are others.
            if not self._threads:
                raise
        else:
            self._threads += 1

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            loop, future, call = entry
            result, error = None, None
            try:
                result = call()
            except Exception as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(self._settle, future, result, error)
            except RuntimeError:
                return  # The loop is closed: nobody waits any more.
            # Not kept while it waits: an outcome may be large.
            del entry, loop, future, call, result, error

    def _settle(
        self, future: "asyncio.Future[Any]", result: Any, error: Exception | None
    ) -> None:
        self._unfinished -= 1
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
