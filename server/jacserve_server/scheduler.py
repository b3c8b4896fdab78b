"""Admits queries, and gives them the device in turn.

The scheduler knows neither JAX nor gRPC: it is given an executor. What waits is kept
for each client, and a slot that gets free goes to the clients in turn. Points of one
kind that wait run as one batch, where that was measured to win. Whoever is cancelled,
by a client or by a deadline, leaves the queue before any device time is spent; a slot
of the device is free again when its thread is, not before. Work in the background gets
what queries leave.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Generic, Protocol, TypeVar

from jacserve_server.admission import Admission, InFlight, Ticket
from jacserve_server.batches import bucket_for
from jacserve_server.coalescing import Gain, Gains, buckets_to_measure, together
from jacserve_server.errors import ServiceError
from jacserve_server.fair_queue import FairQueue
from jacserve_server.result_sizes import check_message_size, check_result_size
from jacserve_server.sharding import (
    divided,
    in_smaller_parts,
    is_divisible,
    is_out_of_memory,
    joined,
    part_rows,
)
from jacserve_server.tallies import Tallies
from jacserve_server.work import (
    Computation,
    Outcome,
    ProgramKey,
    Sparsity,
    SparsityKey,
    Work,
)

# Of a result; what is beyond counts as in flight, as the bytes of requests do.
_FREE_BYTES = 2**20
# Enough for a median, and no more than a server may spend on it while it has callers.
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 15
_MEASURING_S = 1.0
# How often what has failed for want of memory is tried once others have finished.
_MOST_TRIES = 16
# After a query there may be another, so for this long a slot is kept free of the
# background.
_ATTENTIVE_S = 1.0


class Handle(Protocol):
    """What the scheduler knows of a program."""

    @property
    def lane(self) -> str:
        """The name of the places that can run it."""
        ...

    @property
    def row_bytes(self) -> int:
        """The bytes of one point's result, as far as they are known before."""
        ...

    @property
    def is_brief(self) -> bool:
        """Whether it takes less time than handing it to a thread."""
        ...


P = TypeVar("P", bound=Handle)


class Executor(Protocol[P]):
    """What the scheduler needs of an executor; P is its handle of a program."""

    @property
    def places(self) -> int:
        """How many devices it has."""
        ...

    def on(self, program: P, place: int) -> P | None:
        """Returns a ready program on a device; has it made there, else."""
        ...

    def when_ready(self, call: Callable[[], None]) -> None:
        """Has a function called whenever a program got ready on another device."""
        ...

    def ready(self, key: ProgramKey) -> P | None:
        """Returns a program that can run now, else None."""
        ...

    async def prepare(self, key: ProgramKey, client: str = "") -> P:
        """Returns a program, compiled if need be, in the client's turn."""
        ...

    async def sparsity(self, sought: SparsityKey, client: str = "") -> Sparsity:
        """Finds a sparsity pattern."""
        ...

    def run_now(self, program: P, work: Work) -> Outcome:
        """Runs a brief program in this thread."""
        ...

    def run(self, program: P, works: Sequence[Work]) -> "asyncio.Future[list[Outcome]]":
        """Runs a program once: on a piece of work, or on several points together."""
        ...


@dataclass(slots=True, eq=False)
class _Waiting(Generic[P]):
    """What waits for a slot, or has one.

    Attributes:
        works: A piece of work, or several points that are to run together.
        program: The program that does it.
        client: Who asks.
        kind: The computation of a point that may run together with its like, else
            None.
        queue: Where it waits.
        answer: Where the outcomes go.
        since: When it began to wait, on the monotonic clock in seconds.
        is_queued: Whether it still waits.
    """

    works: Sequence[Work]
    program: P
    client: str
    kind: Computation | None
    queue: "FairQueue[_Waiting[P]]"
    answer: "asyncio.Future[list[Outcome]]"
    since: float
    is_queued: bool = True


@dataclass(frozen=True, slots=True)
class Load:
    """What a scheduler has to do now.

    Attributes:
        in_flight: What is in flight.
        most: What may be in flight.
        shares: What is in flight, by client.
        waiting: Pieces of work that wait for a device.
        background: Pieces of background work that wait for one.
        slots: How many pieces of work each device runs at once.
        running: How many each runs now.
    """

    in_flight: InFlight
    most: InFlight
    shares: dict[str, InFlight]
    waiting: int
    background: int
    slots: int
    running: tuple[int, ...]


class Scheduler(Generic[P]):
    """Bounds what is in flight, queues it, and drains. Used from one event loop.

    Attributes:
        gains: What was measured of computing points together.
        tallies: Counts what is computed.
    """

    def __init__(
        self,
        executor: Executor[P],
        *,
        slots: int,
        max_queries: int,
        max_bytes: int,
        max_payload_bytes: int = 2**62,
        shard_rows: int = 2**62,
        max_client_queries: int | None = None,
        max_client_bytes: int | None = None,
        devices: int | None = None,
    ) -> None:
        """Starts idle.

        Args:
            executor: Runs the work.
            slots: How many pieces of work each device runs at once.
            max_queries: The most queries in flight; more are refused at once.
            max_bytes: The most bytes in flight, of requests and of large results; one
                query alone always fits.
            max_payload_bytes: The most bytes of one result.
            shard_rows: Batches of at least so many rows are divided among devices.
            max_client_queries: The most queries in flight of one client; None for its
                part of them alone.
            max_client_bytes: The most bytes in flight of one client, likewise.
            devices: How many of the executor's places can run one program; None for
                all.
        """
        self.gains = Gains()
        self.tallies = Tallies()
        self._executor = executor
        self._slots = slots
        self._max_payload_bytes = max_payload_bytes
        self._free_slots = [slots] * executor.places
        self._devices = devices or executor.places
        self._shard_rows = shard_rows if self._devices > 1 else 2**62
        executor.when_ready(self._give_slots)
        self._admission = Admission(
            max_queries=max_queries,
            max_bytes=max_bytes,
            max_client_queries=max_client_queries,
            max_client_bytes=max_client_bytes,
        )
        self._queue = FairQueue[_Waiting[P]]()
        self._background = FairQueue[_Waiting[P]]()
        self._last_query = -math.inf
        # The same once more, of those that may run together: each kind by itself.
        self._alike: dict[Computation, FairQueue[_Waiting[P]]] = {}
        self._running: set[asyncio.Future[list[Outcome]]] = set()
        self._idle = asyncio.Event()

    @property
    def load(self) -> Load:
        """What it has to do now."""
        return Load(
            self._admission.in_flight,
            self._admission.most,
            self._admission.shares,
            len(self._queue),
            len(self._background),
            self._slots,
            tuple(self._slots - free for free in self._free_slots),
        )

    def admitted(self, size_bytes: int, client: str = "") -> Ticket:
        """Counts a query as in flight, from its arrival to its answer.

        Args:
            size_bytes: The size of its request.
            client: Who asks; "" counts as one client.

        Returns:
            A context manager. Entering it raises ServiceError if too much is in
            flight, or the server is shutting down.
        """
        self._last_query = time.monotonic()
        return Ticket(self._admission, client, size_bytes)

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
        if program is None or not program.is_brief:
            return None
        self._check_size(program, work, max_result_bytes)
        outcome = self._executor.run_now(program, work)
        self.tallies.program_hits += 1
        return self._counted(work, outcome)

    async def submit(
        self,
        work: Work,
        ticket: Ticket | None = None,
        *,
        max_result_bytes: int | None = None,
    ) -> Outcome:
        """Executes work when its turn comes.

        Args:
            work: What to run.
            ticket: The query's place in flight: says who asks, and counts for a large
                result, too. None for the server's own work.
            max_result_bytes: The most that its caller can take; None for any size.

        Returns:
            What came of it, with the seconds it waited.

        Raises:
            ServiceError: The work can't be compiled or run, or its result has no
                room beside all that is in flight.
        """
        # Its parts are joined into a whole, and so are counted beside it.
        attempt = self._submit if is_divisible(work) else self._attempt
        try:
            return await attempt(work, ticket, max_result_bytes)
        except ServiceError as error:
            if not is_out_of_memory(error):
                raise
            failure = error

        async def run(part: Work) -> Outcome:
            return await self._attempt(part, ticket, None)

        return await self._run_again(work, run, failure)

    async def _attempt(
        self, work: Work, ticket: Ticket | None, max_result_bytes: int | None
    ) -> Outcome:
        """Executes work that may be tried again: where it fails, it counts no more."""
        before = 0 if ticket is None else ticket.size_bytes
        try:
            return await self._submit(work, ticket, max_result_bytes)
        except ServiceError:
            if ticket is not None:
                ticket.shrink(ticket.size_bytes - before)
            raise

    async def _submit(
        self, work: Work, ticket: Ticket | None, max_result_bytes: int | None
    ) -> Outcome:
        start = time.monotonic()
        client = ticket.client if ticket is not None else ""
        rows = work.batch
        if rows is not None and rows >= self._shard_rows:
            rows = part_rows(rows, self._devices)
        key = ProgramKey(work.computation, bucket_for(rows))
        program, compile_s = self._executor.ready(key), 0.0
        if ticket is not None:
            self._count_program(is_ready=program is not None)
        if program is None:
            program = await self._executor.prepare(key, client)
            compile_s = time.monotonic() - start
        self._check_size(program, work, max_result_bytes)
        if rows == work.batch and program.is_brief:
            outcome = self._executor.run_now(program, work)
            if compile_s:
                outcome = replace(outcome, compile_s=compile_s)
            return outcome if ticket is None else self._counted(work, outcome)
        if ticket is not None:
            size_bytes = self._held_bytes(program, work, rows)
            if size_bytes > _FREE_BYTES:
                ticket.grow(size_bytes - _FREE_BYTES)
        if rows is not None and rows != work.batch:
            outcome = await self._divided(program, work, rows, client)
        else:
            is_point = rows is None and not work.is_exact
            kind = work.computation if is_point else None
            [outcome] = await self._in_turn(program, [work], client, kind)
        if compile_s:
            outcome = replace(outcome, compile_s=compile_s)
        return outcome if ticket is None else self._counted(work, outcome)

    async def submit_background(
        self, work: Work, client: str, *, is_whole: bool = False
    ) -> Outcome:
        """Executes work when no query needs the device.

        While there are queries, it never takes the last free slot of a device.

        Args:
            work: What to run.
            client: Whose it is; they take turns.
            is_whole: Whether it must not be divided where the memory does not suffice.

        Returns:
            What came of it, with the seconds it waited.

        Raises:
            ServiceError: The work can't be compiled or run.
        """
        try:
            return await self._submit_background(work, client)
        except ServiceError as error:
            if is_whole or not is_out_of_memory(error):
                raise
            failure = error

        async def run(part: Work) -> Outcome:
            return await self._submit_background(part, client)

        return await self._run_again(work, run, failure)

    async def _run_again(
        self, work: Work, run: Callable[[Work], Awaitable[Outcome]], failure: Exception
    ) -> Outcome:
        """Runs work for which the memory did not suffice, in parts if it has any."""
        if not is_divisible(work):
            return await self._run_beside_fewer(work, run, failure)

        async def insist(part: Work) -> Outcome:
            try:
                return await run(part)
            except ServiceError as error:
                if not is_out_of_memory(error) or is_divisible(part):
                    raise
                return await self._run_beside_fewer(part, run, error)

        return await in_smaller_parts(work, insist)

    async def _run_beside_fewer(
        self, work: Work, run: Callable[[Work], Awaitable[Outcome]], failure: Exception
    ) -> Outcome:
        """Runs work again as others finish, which may have had the memory."""
        for _ in range(_MOST_TRIES):
            if not self._running:
                break
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            try:
                return await run(work)
            except ServiceError as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
        raise failure

    async def _submit_background(self, work: Work, client: str) -> Outcome:
        start = time.monotonic()
        key = ProgramKey(work.computation, bucket_for(work.batch))
        program = self._executor.ready(key)
        self._count_program(is_ready=program is not None)
        if program is None:
            program = await self._executor.prepare(key, client)
        compile_s = time.monotonic() - start
        self._check_size(program, work, None)
        waiting = self._enter_queue(program, [work], client, None, self._background)
        [outcome] = await self._answer(waiting)
        outcome = replace(outcome, compile_s=compile_s)
        return self._counted(work, outcome, is_job=True)

    def _count_program(self, *, is_ready: bool) -> None:
        if is_ready:
            self.tallies.program_hits += 1
        else:
            self.tallies.program_misses += 1

    def _counted(
        self, work: Work, outcome: Outcome, *, is_job: bool = False
    ) -> Outcome:
        function = work.computation.function
        self.tallies.count_outcome(function, work.batch, outcome, is_job=is_job)
        return outcome

    def _held_bytes(self, program: P, work: Work, rows: int | None) -> int:
        """Returns the bytes that work takes beside its request, at its worst."""
        result_bytes = _result_bytes(program, work)
        if rows is None or not work.batch:
            return result_bytes
        if rows != work.batch:
            return 2 * result_bytes  # The parts, and what they are joined into.
        bucket = bucket_for(rows) or 0
        return result_bytes * bucket // rows  # Padding goes with it to the end.

    def _check_size(self, program: P, work: Work, max_result_bytes: int | None) -> None:
        function, most = work.computation.function, self._max_payload_bytes
        check_result_size(function, program.row_bytes, work.batch, most)
        check_message_size(_result_bytes(program, work), max_result_bytes)

    async def measure_gain(self, work: Work, most: int) -> Gain | None:
        """Measures whether points of one kind are better computed together.

        The programs are compiled first, and each run waits for its turn, as any other
        work does.

        Args:
            work: One point.
            most: The most points that may be computed at once.

        Returns:
            What it found, and will go by; None where there is nothing to find out:
            the program of one point is brief, or no batch can be compiled.

        Raises:
            ServiceError: The work can't be compiled or run.
        """
        single = await self._executor.prepare(ProgramKey(work.computation, None))
        programs = {1: single}
        if not single.is_brief:
            batch = together(work.computation)
            for bucket in buckets_to_measure(most):
                key = ProgramKey(batch, bucket)
                try:
                    programs[bucket] = await self._executor.prepare(key)
                except ServiceError:
                    break  # Larger ones would not fit, either.
        if len(programs) == 1:
            return None
        seconds: dict[int, list[float]] = {rows: [] for rows in programs}
        end = time.monotonic() + _MEASURING_S
        for turn in range(-1, _MOST_ROUNDS):
            for rows, program in programs.items():
                outcomes = await self._in_turn(program, [work] * rows, "", None)
                if turn >= 0:  # The first runs are slow.
                    seconds[rows].append(outcomes[0].execute_s)
            if turn + 1 >= _FEWEST_ROUNDS and time.monotonic() > end:
                break
        return self.gains.record(work.computation, seconds)

    async def sparsity(self, sought: SparsityKey, client: str = "") -> Sparsity:
        """Finds a sparsity pattern, which takes no device.

        Args:
            sought: Whose.
            client: Who asks.

        Returns:
            The pattern, and what it costs.

        Raises:
            ServiceError: It can't be found.
        """
        return await self._executor.sparsity(sought, client)

    async def drain(self) -> None:
        """Refuses new work from now on, and waits until all that runs has finished."""
        self._admission.close(self._check_idle)
        self._check_idle()
        await self._idle.wait()

    async def _divided(self, program: P, work: Work, rows: int, client: str) -> Outcome:
        """Runs the parts of a large batch on whatever devices are free for them."""
        parts = [
            self._enter_queue(program, [part], client, None)
            for part in divided(work, rows)
        ]
        try:
            outcomes = await asyncio.gather(*(part.answer for part in parts))
        finally:
            for part in parts:
                self._give_up(part)
        # It copies all of the results, which other calls need not wait for.
        return await asyncio.to_thread(joined, [outcome for [outcome] in outcomes])

    async def _in_turn(
        self,
        program: P,
        works: Sequence[Work],
        client: str,
        kind: Computation | None,
    ) -> list[Outcome]:
        return await self._answer(self._enter_queue(program, works, client, kind))

    async def _answer(self, waiting: _Waiting[P]) -> list[Outcome]:
        try:
            return await waiting.answer
        finally:
            self._give_up(waiting)

    def _enter_queue(
        self,
        program: P,
        works: Sequence[Work],
        client: str,
        kind: Computation | None,
        queue: FairQueue[_Waiting[P]] | None = None,
    ) -> _Waiting[P]:
        if kind is not None and not self.gains.wins(kind):
            kind = None
        # Each client has a queue for each lane, so that only their order in it counts,
        # and what waits for some places never holds up what waits for others.
        client = program.lane + client
        answer = asyncio.get_running_loop().create_future()
        queue = self._queue if queue is None else queue
        since = time.monotonic()
        waiting = _Waiting(works, program, client, kind, queue, answer, since)
        queue.put(client, waiting)
        if kind is not None:
            self._alike.setdefault(kind, FairQueue()).put(client, waiting)
        self._give_slots()
        return waiting

    def _give_up(self, waiting: _Waiting[P]) -> None:
        """Takes out of the queue what nobody waits for any more."""
        if waiting.is_queued:
            self._leave_queue(waiting)
            self._check_idle()

    def _leave_queue(self, waiting: _Waiting[P], *, is_its_turn: bool = False) -> None:
        queue = waiting.queue
        leave = queue.take if is_its_turn else queue.remove
        leave(waiting.client, waiting)
        waiting.is_queued = False
        if waiting.kind is not None:
            alike = self._alike[waiting.kind]
            alike.take(waiting.client, waiting)
            if not alike:
                del self._alike[waiting.kind]

    def _give_slots(self) -> None:
        """Gives free slots to those whose turn it is."""
        while (found := self._next()) is not None:
            place, first = found
            program, mates = self._mates(first, place)
            self._leave_queue(first, is_its_turn=True)
            for mate in mates:
                self._leave_queue(mate)
            self._free_slots[place] -= 1
            members = [first, *mates]
            works = [work for member in members for work in member.works]
            running = self._started(program, works)
            self._running.add(running)
            finish = partial(self._finish, place, members, time.monotonic())
            running.add_done_callback(finish)

    def _started(
        self, program: P, works: Sequence[Work]
    ) -> "asyncio.Future[list[Outcome]]":
        """Runs a program; what can't even begin fails as what has begun does."""
        try:
            return self._executor.run(program, works)
        except Exception as error:
            failed = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def _next(self) -> tuple[int, _Waiting[P]] | None:
        """Returns a device with a free slot, and who is the next that it can serve."""
        if self._queue and (found := self._next_of(self._queue, 0)) is not None:
            return found
        if not self._background:
            return None
        is_quiet = time.monotonic() - self._last_query > _ATTENTIVE_S
        return self._next_of(self._background, int(not is_quiet and self._slots > 1))

    def _next_of(
        self, queue: FairQueue[_Waiting[P]], reserved: int
    ) -> tuple[int, _Waiting[P]] | None:
        free = [place for place, slots in enumerate(self._free_slots) if slots]
        for place in sorted(free, key=lambda place: -self._free_slots[place]):
            if self._free_slots[place] <= reserved:
                break
            for first in queue.heads():
                if self._executor.on(first.program, place) is not None:
                    return place, first
        return None

    def _mates(self, first: _Waiting[P], place: int) -> tuple[P, list[_Waiting[P]]]:
        """Returns the program to run, and those that wait and run with the first."""
        if first.kind is not None:
            alike = self._alike[first.kind]
            for key in self.gains.programs(first.kind, len(alike)):
                ready = self._executor.ready(key)
                program = None if ready is None else self._executor.on(ready, place)
                if program is not None and key.bucket is not None:
                    others = (each for each in alike.rounds() if each is not first)
                    return program, list(islice(others, key.bucket - 1))
        alone = self._executor.on(first.program, place)
        assert alone is not None  # Else the device would not have been chosen.
        return alone, []

    def _finish(
        self,
        place: int,
        members: list[_Waiting[P]],
        start: float,
        running: "asyncio.Future[list[Outcome]]",
    ) -> None:
        """Gives each its outcome; its asker may have left, but the slot was taken."""
        self._running.discard(running)
        self._free_slots[place] += 1
        error = running.exception()
        if error is None:
            outcomes = iter(running.result())
            for member in members:
                queue_s = start - member.since
                own = [replace(next(outcomes), queue_s=queue_s) for _ in member.works]
                if not member.answer.done():
                    member.answer.set_result(own)
        elif len(members) > 1:
            self._queue_again(members)
        elif not members[0].answer.done():
            members[0].answer.set_exception(error)
            # Its asker may leave just now, and the loop would complain.
            members[0].answer.exception()
        self._give_slots()
        self._check_idle()

    def _queue_again(self, members: list[_Waiting[P]]) -> None:
        """Has each run by itself, next in its turn: one of them is at fault."""
        for member in reversed(members):
            if not member.answer.done():
                member.kind, member.is_queued = None, True
                member.queue.put(member.client, member, is_first=True)

    def _check_idle(self) -> None:
        admission = self._admission
        is_busy = admission.queries or self._queue or self._background or self._running
        if admission.is_closed and not is_busy:
            self._idle.set()


def _result_bytes(program: Handle, work: Work) -> int:
    return program.row_bytes * (1 if work.batch is None else work.batch)
