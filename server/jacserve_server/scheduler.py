"""Admits queries, and gives them the device in turn.

The scheduler knows neither JAX nor gRPC: it is given an executor. Whoever is
cancelled, by a client or by a deadline, leaves the queue before any device time is
spent; a slot of the device is free again when its thread is, not before.
"""

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from jacserve_server.batches import bucket_for
from jacserve_server.errors import ServiceError
from jacserve_server.work import Outcome, ProgramKey, Sparsity, SparsityKey, Work

_RETRY_AFTER_S = 0.1

P = TypeVar("P")


class Executor(Protocol[P]):
    """What the scheduler needs of an executor; P is its handle of a program."""

    def ready(self, key: ProgramKey) -> P | None:
        """Returns a program that can run now, else None."""
        ...

    async def prepare(self, key: ProgramKey) -> P:
        """Returns a program, compiled if need be."""
        ...

    async def sparsity(self, sought: SparsityKey) -> Sparsity:
        """Finds a sparsity pattern."""
        ...

    def result_bytes(self, program: P, work: Work) -> int:
        """Returns the bytes of the result, as far as they are known before."""
        ...

    def is_brief(self, program: P) -> bool:
        """Whether a program takes less time than handing it to a thread."""
        ...

    def run_now(self, program: P, work: Work) -> Outcome:
        """Runs a brief program in this thread."""
        ...

    async def run(self, program: P, work: Work) -> Outcome:
        """Runs a program on the inputs of a piece of work."""
        ...


class Scheduler(Generic[P]):
    """Bounds what is in flight, queues it, and drains. Used from one event loop."""

    def __init__(
        self, executor: Executor[P], *, slots: int, max_queries: int, max_bytes: int
    ) -> None:
        """Starts idle.

        Args:
            executor: Runs the work.
            slots: How many pieces of work the executor runs at once.
            max_queries: The most queries in flight; more are refused at once.
            max_bytes: The most bytes of requests in flight; one alone always fits.
        """
        self._executor = executor
        self._slots = asyncio.Semaphore(slots)
        self._max_queries = max_queries
        self._max_bytes = max_bytes
        self._queries = 0
        self._bytes = 0
        self._running: set[asyncio.Future[Outcome]] = set()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def admitted(self, size_bytes: int, client: str = "") -> Generator[None]:
        """Counts a query as in flight, from its arrival to its answer.

        Args:
            size_bytes: The size of its request.
            client: Who asks.

        Raises:
            ServiceError: Too much is in flight, or the server is shutting down.
        """
        self._check_room(size_bytes)
        self._queries += 1
        self._bytes += size_bytes
        self._idle.clear()
        try:
            yield
        finally:
            self._queries -= 1
            self._bytes -= size_bytes
            self._check_idle()

    def now(self, work: Work, *, max_result_bytes: int | None = None) -> Outcome | None:
        """Executes work at once, where that takes less time than to wait for a thread.

        Args:
            work: What to run.
            max_result_bytes: As for `submit`.

        Returns:
            What came of it; None where its program is not compiled, or not brief.

        Raises:
            ServiceError: The work can't be run.
        """
        key = ProgramKey(work.computation, bucket_for(work.batch))
        program = self._executor.ready(key)
        if program is None or not self._executor.is_brief(program):
            return None
        if max_result_bytes is not None:
            _check_fits(self._executor.result_bytes(program, work), max_result_bytes)
        return self._executor.run_now(program, work)

    async def submit(
        self, work: Work, *, client: str = "", max_result_bytes: int | None = None
    ) -> Outcome:
        """Executes work when its turn comes.

        Args:
            work: What to run.
            client: Who asks.
            max_result_bytes: The most that its caller can take; None for any size.

        Returns:
            What came of it, with the seconds it waited.

        Raises:
            ServiceError: The work can't be compiled or run.
        """
        start = time.monotonic()
        key = ProgramKey(work.computation, bucket_for(work.batch))
        program, compile_s = self._executor.ready(key), 0.0
        if program is None:
            program = await self._executor.prepare(key)
            compile_s = time.monotonic() - start
        if max_result_bytes is not None:
            _check_fits(self._executor.result_bytes(program, work), max_result_bytes)
        if self._executor.is_brief(program):
            outcome = self._executor.run_now(program, work)
            return replace(outcome, compile_s=compile_s) if compile_s else outcome
        queued = time.monotonic()
        await self._slots.acquire()
        queue_s = time.monotonic() - queued
        running = asyncio.ensure_future(self._executor.run(program, work))
        self._running.add(running)
        running.add_done_callback(self._free)
        outcome = await asyncio.shield(running)
        return replace(outcome, queue_s=queue_s, compile_s=compile_s)

    async def sparsity(self, sought: SparsityKey) -> Sparsity:
        """Finds a sparsity pattern, which takes no device.

        Args:
            sought: Whose.

        Returns:
            The pattern, and what it costs.

        Raises:
            ServiceError: It can't be found.
        """
        return await self._executor.sparsity(sought)

    async def drain(self) -> None:
        """Refuses new work from now on, and waits until all that runs has finished."""
        self._is_draining = True
        await self._idle.wait()

    def _free(self, running: "asyncio.Future[Outcome]") -> None:
        self._slots.release()
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # Its asker may be gone; the loop would complain.
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._queries and not self._running:
            self._idle.set()

    def _check_room(self, size_bytes: int) -> None:
        if self._is_draining:
            raise shutting_down()
        has_room = self._queries < self._max_queries and (
            not self._queries or self._bytes + size_bytes <= self._max_bytes
        )
        if not has_room:
            raise ServiceError(
                "QUEUE_FULL",
                f"{self._queries} queries of {self._bytes} bytes are in flight, and "
                f"this server takes {self._max_queries} of {self._max_bytes}. Try "
                f"again in {_RETRY_AFTER_S} s, or send points in batches.",
                retry_after_s=_RETRY_AFTER_S,
                queries=self._queries,
                max_queries=self._max_queries,
                bytes=self._bytes,
                max_bytes=self._max_bytes,
            )


def shutting_down() -> ServiceError:
    """Makes the error of those who come, or stay, too late."""
    return ServiceError(
        "SHUTTING_DOWN",
        "the server is shutting down. Try again, or another server.",
        retry_after_s=_RETRY_AFTER_S,
    )


def _check_fits(result_bytes: int, max_result_bytes: int) -> None:
    if result_bytes > max_result_bytes:
        raise ServiceError(
            "STREAM_REQUIRED",
            f"the answer would take {result_bytes} bytes, and in one message at most "
            f"{max_result_bytes} are sent. Ask by EvaluateStream.",
            result_bytes=result_bytes,
            max_result_bytes=max_result_bytes,
        )
