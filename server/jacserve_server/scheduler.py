"""Admits queries, and gives them the device in turn.

The scheduler knows neither JAX nor gRPC: it is given an executor. What waits is kept
for each client, and a slot that gets free goes to the clients in turn. Whoever is
cancelled, by a client or by a deadline, leaves the queue before any device time is
spent; a slot of the device is free again when its thread is, not before.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from jacserve_server.admission import Admission, Ticket
from jacserve_server.batches import bucket_for
from jacserve_server.errors import ServiceError
from jacserve_server.fair_queue import FairQueue
from jacserve_server.work import Outcome, ProgramKey, Sparsity, SparsityKey, Work

# Of a result; what is beyond counts as in flight, as the bytes of requests do.
_FREE_BYTES = 2**20

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


@dataclass(slots=True, eq=False)
class _Waiting(Generic[P]):
    """Work that waits for a slot, or has one.

    Attributes:
        work: What to run.
        program: The program that does it.
        client: Who asks.
        answer: Where its outcome goes.
        since: When it began to wait, on the monotonic clock in seconds.
        is_queued: Whether it still waits.
    """

    work: Work
    program: P
    client: str
    answer: "asyncio.Future[Outcome]"
    since: float
    is_queued: bool = True


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
            max_bytes: The most bytes in flight, of requests and of large results; one
                query alone always fits.
        """
        self._executor = executor
        self._free_slots = slots
        self._admission = Admission(max_queries=max_queries, max_bytes=max_bytes)
        self._queue = FairQueue[_Waiting[P]]()
        self._running: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()

    def admitted(self, size_bytes: int, client: str = "") -> Ticket:
        """Counts a query as in flight, from its arrival to its answer.

        Args:
            size_bytes: The size of its request.
            client: Who asks; "" counts as one client.

        Returns:
            A context manager. Entering it raises ServiceError if too much is in
            flight, or the server is shutting down.
        """
        return Ticket(self._admission, client, size_bytes)

    async def submit(
        self,
        work: Work,
        *,
        client: str = "",
        max_result_bytes: int | None = None,
        ticket: Ticket | None = None,
    ) -> Outcome:
        """Executes work when its turn comes.

        Args:
            work: What to run.
            client: Who asks.
            max_result_bytes: The most that its caller can take; None for any size.
            ticket: The query's place in flight, which a large result counts for, too.

        Returns:
            What came of it, with the seconds it waited.

        Raises:
            ServiceError: The work can't be compiled or run, or its result has no
                room beside all that is in flight.
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
        if ticket is not None:
            size_bytes = self._executor.result_bytes(program, work)
            if size_bytes > _FREE_BYTES:
                ticket.grow(size_bytes - _FREE_BYTES)
        outcome = await self._in_turn(program, work, client)
        return replace(outcome, compile_s=compile_s) if compile_s else outcome

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
        self._admission.close(self._check_idle)
        self._check_idle()
        await self._idle.wait()

    async def _in_turn(self, program: P, work: Work, client: str) -> Outcome:
        answer = asyncio.get_running_loop().create_future()
        waiting = _Waiting(work, program, client, answer, time.monotonic())
        self._queue.put(client, waiting)
        self._give_slots()
        try:
            return await answer
        finally:
            if waiting.is_queued:
                self._queue.remove(client, waiting)
                self._check_idle()

    def _give_slots(self) -> None:
        """Gives free slots to those whose turn it is."""
        while self._free_slots and self._queue:
            waiting = next(self._queue.heads())
            self._queue.take(waiting.client, waiting)
            waiting.is_queued = False
            self._free_slots -= 1
            running = asyncio.ensure_future(self._run(waiting))
            self._running.add(running)
            running.add_done_callback(self._free)

    async def _run(self, waiting: _Waiting[P]) -> None:
        """Runs work that has a slot; its asker may leave, but the slot is taken."""
        queue_s = time.monotonic() - waiting.since
        answer = waiting.answer
        try:
            outcome = await self._executor.run(waiting.program, waiting.work)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # Its asker may leave now; the loop would complain.
        else:
            if not answer.done():
                answer.set_result(replace(outcome, queue_s=queue_s))

    def _free(self, running: "asyncio.Task[None]") -> None:
        self._running.discard(running)
        self._free_slots += 1
        self._give_slots()
        self._check_idle()

    def _check_idle(self) -> None:
        admission = self._admission
        is_busy = admission.queries or self._queue or self._running
        if admission.is_closed and not is_busy:
            self._idle.set()


def _check_fits(result_bytes: int, max_result_bytes: int) -> None:
    if result_bytes > max_result_bytes:
        raise ServiceError(
            "STREAM_REQUIRED",
            f"the answer would take {result_bytes} bytes, and in one message at most "
            f"{max_result_bytes} are sent. Ask by EvaluateStream.",
            result_bytes=result_bytes,
            max_result_bytes=max_result_bytes,
        )
