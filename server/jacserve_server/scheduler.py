"""Admits work, and knows how much of it there is.

The scheduler knows neither JAX nor gRPC: it is given a coroutine that executes
work. Awaiting is queueing; whoever is cancelled, by a client or by a deadline,
leaves the queue before any device time is spent.
"""

import asyncio
from collections.abc import Awaitable, Callable

from jacserve_server.errors import ServiceError
from jacserve_server.query import Outcome, Work

_RETRY_AFTER_S = 0.1


class Scheduler:
    """Bounds the work in flight, and drains it. Used from one event loop."""

    def __init__(
        self, execute: Callable[[Work], Awaitable[Outcome]], *, max_queries: int
    ) -> None:
        """Starts idle.

        Args:
            execute: Executes one piece of work.
            max_queries: The most in flight; more are refused at once.
        """
        self._execute = execute
        self._max_queries = max_queries
        self._in_flight = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def submit(self, work: Work) -> Outcome:
        """Executes work when its turn comes.

        Args:
            work: What to run.

        Returns:
            What came of it.

        Raises:
            ServiceError: The queue is full, the server is shutting down, or the
                work failed.
        """
        if self._is_draining:
            raise ServiceError(
                "SHUTTING_DOWN",
                "the server is shutting down. Try again, or another server.",
                retry_after_s=_RETRY_AFTER_S,
            )
        if self._in_flight >= self._max_queries:
            raise ServiceError(
                "QUEUE_FULL",
                f"{self._in_flight} queries are in flight, and this server takes "
                f"{self._max_queries}. Try again in {_RETRY_AFTER_S} s, or send "
                "points in batches.",
                retry_after_s=_RETRY_AFTER_S,
                in_flight=self._in_flight,
                max_queries=self._max_queries,
            )
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._execute(work)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drain(self) -> None:
        """Refuses new work from now on, and waits until what runs has finished."""
        self._is_draining = True
        await self._idle.wait()
