"""Sends each function to what runs it: this process, or the worker."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from jacserve_server.executor import DeviceState, Executor, ProgramsState
from jacserve_server.isolation.executor import IsolatedExecutor, IsolatedProgram
from jacserve_server.programs import Program
from jacserve_server.work import Outcome, ProgramKey, Sparsity, SparsityKey, Work

AnyProgram: TypeAlias = Program | IsolatedProgram
AnyExecutor: TypeAlias = "Executor | IsolatedExecutor | Router"


class Router:
    """An executor made of two. Used from one event loop.

    Each has its own places, so that what waits for the one never holds up the other:
    first those of this process, then the worker's.

    Attributes:
        places: How many both have.
    """

    def __init__(
        self,
        own: Executor,
        isolated: IsolatedExecutor,
        is_isolated: Callable[[str], bool],
    ) -> None:
        """Keeps its collaborators.

        Args:
            own: Runs functions in this process.
            isolated: Runs functions in a worker.
            is_isolated: Tells by its qualified name whether a function runs there.
        """
        self.places = own.places + isolated.places
        self._own = own
        self._isolated = isolated
        self._is_isolated = is_isolated

    def devices(self) -> list[DeviceState]:
        """Returns how the devices are, in the order of places."""
        return [*self._own.devices(), *self._isolated.devices()]

    @property
    def programs(self) -> ProgramsState:
        """How many programs there are."""
        own, isolated = self._own.programs, self._isolated.programs
        return ProgramsState(
            own.count + isolated.count,
            own.most + isolated.most,
            own.compile_s + isolated.compile_s,
        )

    def ready(self, key: ProgramKey) -> AnyProgram | None:
        """Returns a program that can run now, else None."""
        return self._of(key.computation.function).ready(key)

    async def prepare(self, key: ProgramKey, client: str = "") -> AnyProgram:
        """Returns a program, compiled if need be."""
        return await self._of(key.computation.function).prepare(key, client)

    async def fingerprint(self, key: ProgramKey, client: str = "") -> str:
        """Identifies what a program computes."""
        return await self._of(key.computation.function).fingerprint(key, client)

    async def sparsity(self, sought: SparsityKey, client: str = "") -> Sparsity:
        """Finds a sparsity pattern."""
        return await self._of(sought.function).sparsity(sought, client)

    def on(self, program: AnyProgram, place: int) -> AnyProgram | None:
        """Returns a ready program on a device; None on those of the other executor."""
        of_isolated = place - self._own.places
        if isinstance(program, IsolatedProgram):
            return self._isolated.on(program, of_isolated) if of_isolated >= 0 else None
        return self._own.on(program, place) if of_isolated < 0 else None

    def when_ready(self, call: Callable[[], None]) -> None:
        """Has a function called whenever a program got ready on another device."""
        self._own.when_ready(call)
        self._isolated.when_ready(call)

    def run_now(self, program: AnyProgram, work: Work) -> Outcome:
        """Runs a brief program in this thread."""
        assert isinstance(program, Program)  # No other is brief.
        return self._own.run_now(program, work)

    def run(
        self, program: AnyProgram, works: Sequence[Work]
    ) -> "asyncio.Future[list[Outcome]]":
        """Runs a program once: on a piece of work, or on several points together."""
        if isinstance(program, IsolatedProgram):
            return self._isolated.run(program, works)
        return self._own.run(program, works)

    def close(self) -> None:
        """Takes no more work; the worker ends."""
        self._own.close()
        self._isolated.close()

    def _of(self, function: str) -> Executor | IsolatedExecutor:
        return self._isolated if self._is_isolated(function) else self._own
