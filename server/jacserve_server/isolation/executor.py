"""Runs programs in a worker process, as an executor of this process would.

Programs here are what the worker has said of them. Arguments are copied into memory
that both share, and results out of it, large ones by other threads than the event
loop's. Where they are is computed here; nothing that the worker says can lead
elsewhere.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np

from jacserve.tensors import Array
from jacserve_server.coalescing import gathered, separated
from jacserve_server.compile_turns import (
    CompileBudgets,
    CompileTurns,
    is_owners_alone,
    owner_of,
)
from jacserve_server.errors import ServiceError
from jacserve_server.executor import DeviceState, ProgramsState
from jacserve_server.isolation.connection import Budget, Connection, Undertaking
from jacserve_server.isolation.protocol import (
    FLAG,
    FindSparsity,
    Fingerprint,
    Fingerprinted,
    Found,
    Prepare,
    Prepared,
    ProtocolError,
    Ran,
    Run,
    Slots,
    Unavailable,
    outline_of,
    pattern_of,
    row_bytes,
    slots,
)
from jacserve_server.isolation.quarantine import Quarantine
from jacserve_server.isolation.regions import Region
from jacserve_server.isolation.supervisor import Supervisor
from jacserve_server.replicas import Replicas
from jacserve_server.single_flight import SingleFlight
from jacserve_server.work import (
    InputSpec,
    Outcome,
    Outline,
    ProgramKey,
    Sparsity,
    SparsityKey,
    Work,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)

# To copy so much takes longer than to hand it to a thread.
_COPIED_HERE_BYTES = 2**18
# A worker that has made a program may have dropped it before it is run.
_MOST_TRIES = 3


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class IsolatedProgram:
    """What is known here of a program in the worker.

    Attributes:
        key: What it computes.
        place: On which device.
        outline: What its results are.
        results: Shape and dtype of each.
        row_bytes: Bytes of one point's results.
        is_lone: Whether it must not run beside its like.
        lane: Names the places that can run it.
        is_brief: Whether it may run in the event loop: it may not end.
    """

    key: ProgramKey
    place: int
    outline: Outline
    results: tuple[InputSpec, ...]
    row_bytes: int
    is_lone: bool
    lane: ClassVar[str] = "isolated "
    is_brief: ClassVar[bool] = False

    def slots(self, batch: int | None) -> Slots:
        """Returns where its arguments, its results and their flags are."""
        arguments = self.key.computation.arrays
        return slots((*arguments, *self.results, FLAG), batch)


class IsolatedExecutor:
    """Runs programs in a worker process. Used from one event loop.

    Attributes:
        places: How many devices the worker has.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        quarantine: Quarantine,
        *,
        devices: Sequence[DeviceState],
        compile_threads: int,
        max_programs: int,
        max_compile_s: float,
        max_execute_s: Callable[[str], float],
        max_owned_programs: int | None,
        compile_budgets: CompileBudgets,
    ) -> None:
        """Asks for nothing yet.

        Args:
            supervisor: Has a worker, which is open.
            quarantine: Says which functions are not run.
            devices: Those that the worker has.
            compile_threads: How many programs may be made at once.
            max_programs: How many are known at once, for each device.
            max_compile_s: Seconds that it may take to make one.
            max_execute_s: Returns the seconds that an execution of a function may
                take, by its qualified name.
            max_owned_programs: How many are known that one client has first asked
                for; None for any.
            compile_budgets: The seconds of compiling that each client may have.
        """
        self.places = len(devices)
        self._devices = devices
        self._max_programs = max_programs
        self._compile_s = 0.0
        self._supervisor = supervisor
        self._quarantine = quarantine
        self._compiling = Budget(max_compile_s, "max_compile_s", "was compiled")
        self._max_execute_s = max_execute_s
        self._loop = asyncio.get_running_loop()
        # Each waits for the worker, so that no more is asked of it than it does at
        # once, and no budget is spent on waiting.
        self._turns = CompileTurns(compile_threads, compile_budgets)
        self._programs = SingleFlight[ProgramKey, IsolatedProgram](
            self._turns.submit,
            capacity=max_programs,
            share=max_owned_programs,
            is_owners_alone=is_owners_alone,
        )
        self._replicas = Replicas[IsolatedProgram](
            self._replica,
            self.places - 1,
            max_programs=max_programs,
            max_owned_programs=max_owned_programs,
        )
        self._lone = asyncio.Lock()

    def devices(self) -> list[DeviceState]:
        """Returns how the devices are; what the worker has in use is not known here."""
        return list(self._devices)

    @property
    def programs(self) -> ProgramsState:
        """How many programs there are."""
        count = len(self._programs) + len(self._replicas)
        return ProgramsState(count, self._max_programs * self.places, self._compile_s)

    def ready(self, key: ProgramKey) -> IsolatedProgram | None:
        """Returns a program that the worker has made, else None."""
        if self._quarantine.reason(key.computation.function):
            return None
        return self._programs.ready(key)

    async def prepare(self, key: ProgramKey, client: str = "") -> IsolatedProgram:
        """Returns a program, made by the worker if need be.

        Args:
            key: Which program.
            client: Who asks; "" for the server itself.

        Returns:
            The program.

        Raises:
            ServiceError: It can't be made, or not for this client now.
        """
        self._quarantine.check(key.computation.function)
        owner = owner_of(client)
        making = partial(self._first, key, owner)
        return await self._programs.get(key, making, owner)

    async def fingerprint(self, key: ProgramKey, client: str = "") -> str:
        """Identifies what a program computes; see the other `Executor`."""

        async def ask(connection: Connection) -> str:
            question = Fingerprint(connection.next_id(), key)
            reply, _ = await connection.ask(question, undertaking, self._compiling)
            if not isinstance(reply, Fingerprinted):
                raise _unasked(reply)
            return reply.text

        undertaking = Undertaking(key.computation.function)
        return await self._in_turn(undertaking, ask, client)

    async def sparsity(self, sought: SparsityKey, client: str = "") -> Sparsity:
        """Finds a sparsity pattern.

        Args:
            sought: Whose.
            client: Who asks; "" for the server itself.

        Returns:
            The pattern.

        Raises:
            ServiceError: It can't be found.
        """

        async def ask(connection: Connection) -> Sparsity:
            question = FindSparsity(connection.next_id(), sought)
            reply, tail = await connection.ask(question, undertaking, self._compiling)
            if not isinstance(reply, Found):
                raise _unasked(reply)
            pattern, left = pattern_of(reply.pattern, tail)
            if left:
                raise ProtocolError("more bytes came than belong to a message")
            return Sparsity(pattern, reply.color_count, reply.mode)

        undertaking = Undertaking(sought.function)
        return await self._in_turn(undertaking, ask, client)

    def on(self, program: IsolatedProgram, place: int) -> IsolatedProgram | None:
        """Returns a program on one of the devices, if it is ready there.

        Where it is not, it is made in the background.

        Args:
            program: The one on the first device.
            place: The device's place among all.
        """
        return program if place == 0 else self._replicas.find(program, place - 1)

    def when_ready(self, call: Callable[[], None]) -> None:
        """Has a function called whenever a program got ready on another device."""
        self._replicas.when_ready(call)

    def run_now(self, program: IsolatedProgram, work: Work) -> NoReturn:
        """Is not called: none is brief, because none may run in the event loop."""
        raise AssertionError(f"{program.key.computation.function} is never brief")

    def run(
        self, program: IsolatedProgram, works: Sequence[Work]
    ) -> "asyncio.Future[list[Outcome]]":
        """Runs a program once, in the worker.

        Args:
            program: The program: for the work's computation and batch, or for a batch
                of at least as many points as there are.
            works: A piece of work, or several points of one computation.

        Returns:
            What comes of each, or a ServiceError.
        """
        return asyncio.ensure_future(self._run(program, works))

    def close(self) -> None:
        """Ends the worker; what it still does is lost."""
        self._replicas.close()
        self._turns.close()
        self._supervisor.close()

    async def _in_turn(
        self,
        undertaking: Undertaking,
        ask: Callable[[Connection], Awaitable[T]],
        client: str,
    ) -> T:
        performing = partial(self._supervisor.perform, undertaking, ask)
        waiting = partial(self._in_loop, performing)
        return await asyncio.wrap_future(self._turns.submit(owner_of(client), waiting))

    def _in_loop(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Waits, in a thread, for what is done in the event loop."""
        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _first(self, key: ProgramKey, owner: str) -> IsolatedProgram:
        program = self._in_loop(partial(self._prepare, key, 0))
        assert program is not None  # The first device has all.
        self._replicas.note_owner(program, owner)
        return program

    def _replica(self, program: IsolatedProgram, place: int) -> IsolatedProgram | None:
        try:
            return self._in_loop(partial(self._prepare, program.key, place + 1))
        except ServiceError as error:
            _log.warning("device %d is not used for this: %s", place + 1, error.message)
            return None

    async def _prepare(self, key: ProgramKey, place: int) -> IsolatedProgram | None:
        undertaking = Undertaking(key.computation.function)
        making = partial(self._made, undertaking, key, place)
        start = time.monotonic()
        try:
            return await self._supervisor.perform(undertaking, making)
        finally:
            self._compile_s += time.monotonic() - start

    async def _made(
        self,
        undertaking: Undertaking,
        key: ProgramKey,
        place: int,
        connection: Connection,
    ) -> IsolatedProgram | None:
        """Has a worker make a program; None where it can't have it on that device."""
        question = Prepare(connection.next_id(), key, place)
        reply, tail = await connection.ask(question, undertaking, self._compiling)
        if isinstance(reply, Unavailable) and place:
            return None
        if not isinstance(reply, Prepared):
            raise _unasked(reply)
        outline = outline_of(reply, key, tail)
        connection.programs[key, place] = question.id
        return IsolatedProgram(
            key, place, outline, reply.results, row_bytes(reply.results), reply.is_lone
        )

    async def _run(
        self, program: IsolatedProgram, works: Sequence[Work]
    ) -> list[Outcome]:
        function = program.key.computation.function
        self._quarantine.check(function)
        # Of several, each will run by itself, and what is at fault be found then.
        undertaking = Undertaking(function, counts=len(works) == 1)
        work = works[0] if len(works) == 1 else gathered(works, program.key)
        running = partial(self._executed, undertaking, program, work)
        async with self._lone if program.is_lone else nullcontext():
            outcome = await self._supervisor.perform(undertaking, running)
        return [outcome] if len(works) == 1 else separated(outcome, len(works))

    async def _executed(
        self,
        undertaking: Undertaking,
        program: IsolatedProgram,
        work: Work,
        connection: Connection,
    ) -> Outcome:
        """Runs a program in a worker, which makes it again if it has it no more."""
        key, place = program.key, program.place
        for _ in range(_MOST_TRIES):
            name = connection.programs.get((key, place))
            if name is None:
                made = await self._made(undertaking, key, place, connection)
                if made is None:
                    place = 0
                    continue
                program, name = made, connection.programs[key, place]
            outcome = await self._answered(undertaking, program, work, name, connection)
            if outcome is not None:
                return outcome
            connection.programs.pop((key, place), None)
        raise ServiceError(
            "QUEUE_FULL",
            f"the worker has no room for a program of functions/{undertaking.function}"
            ". Try again later, or raise the server's max_programs.",
            retry_after_s=1.0,
        )

    async def _answered(
        self,
        undertaking: Undertaking,
        program: IsolatedProgram,
        work: Work,
        name: int,
        connection: Connection,
    ) -> Outcome | None:
        """Runs a program; returns None where the worker does not have it."""
        places = program.slots(work.batch)
        region, is_new = _taken(connection, undertaking, places.size_bytes)
        views: list[Array] = []
        try:
            views += places.views(region.memory)
            count = len(work.arrays)
            await _off_loop(_copy, views[:count], work.arrays)
            reply, _ = await connection.ask(
                _question(connection, name, work, region, is_new=is_new),
                undertaking,
                self._executing(undertaking.function),
                (region.descriptor,) if is_new else (),
            )
            if isinstance(reply, Unavailable):
                return None
            if not isinstance(reply, Ran):
                raise _unasked(reply)
            *arrays, finite = await _off_loop(_copied, views[count:], ())
            return Outcome(program.outline, tuple(arrays), finite, reply.execute_s)
        finally:
            # Whoever is told of a failure must not keep the memory.
            views.clear()
            connection.pool.give(region)

    def _executing(self, function: str) -> Budget:
        return Budget(self._max_execute_s(function), "max_execute_s", "ran")


def _taken(
    connection: Connection, undertaking: Undertaking, size_bytes: int
) -> tuple[Region, bool]:
    try:
        return connection.pool.take(size_bytes)
    except OSError as error:
        resource = f"functions/{undertaking.function}"
        raise ServiceError(
            "DEVICE_OUT_OF_MEMORY",
            f"the server can't share {size_bytes} bytes of arrays with the process of "
            f"{resource}: {error.strerror}. Ask for fewer points at once, or try again "
            "later.",
            function=resource,
            wanted=f"{size_bytes} bytes",
        ) from error


def _question(
    connection: Connection, name: int, work: Work, region: Region, *, is_new: bool
) -> Run:
    return Run(
        id=connection.next_id(),
        program=name,
        batch=work.batch,
        region=region.id,
        size_bytes=region.size_bytes,
        is_new=is_new,
        dropped=connection.pool.dropped(),
    )


async def _off_loop(
    call: Callable[[Sequence[Array], Sequence[Array]], T],
    views: Sequence[Array],
    arrays: Sequence[Array],
) -> T:
    """Copies arrays: small ones at once, large ones in a thread."""
    if sum(view.nbytes for view in views) <= _COPIED_HERE_BYTES:
        return call(views, arrays)
    return await asyncio.to_thread(call, views, arrays)


def _copy(views: Sequence[Array], arrays: Sequence[Array]) -> None:
    for view, array in zip(views, arrays, strict=True):
        view[...] = array


def _copied(views: Sequence[Array], _: Sequence[Array]) -> list[Array]:
    copies = [
        # A byte of a worker's is no truth value before it was compared.
        np.asarray(view.view(np.uint8) != 0) if view.dtype == bool else view.copy()
        for view in views
    ]
    for copy in copies:
        copy.flags.writeable = False
    return copies


def _unasked(reply: object) -> ProtocolError:
    return ProtocolError(f"it answered with {type(reply).__name__}")
