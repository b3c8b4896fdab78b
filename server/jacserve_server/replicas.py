"""The programs of the first device on further ones, made in the background."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from jacserve_server.compile_turns import CompileTurns
from jacserve_server.errors import ServiceError
from jacserve_server.single_flight import SingleFlight

P = TypeVar("P")


class Replicas(Generic[P]):
    """Has each program on further devices as soon as they could use it.

    There it belongs to whom it belongs to on the first. Used from one event loop.
    """

    def __init__(
        self,
        make: Callable[[P, int], P | None],
        places: int,
        *,
        max_programs: int,
        max_owned_programs: int | None,
    ) -> None:
        """Starts empty.

        Args:
            make: Makes a program of the first device for a further one, given by its
                place among these; returns None for one that can't be made, which is
                not tried again.
            places: How many further devices there are.
            max_programs: How many programs are kept for each.
            max_owned_programs: How many of them are kept that are one owner's; None for
                any.
        """
        self._make = make
        self._owners: WeakKeyDictionary[P, str] = WeakKeyDictionary()
        # A thread of its own: who waits for a first program goes before.
        self._turns = CompileTurns(1)
        self._programs = [
            SingleFlight[P, P | None](
                self._turns.submit, capacity=max_programs, share=max_owned_programs
            )
            for _ in range(places)
        ]
        self._on_ready: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        """Returns how many programs there are, on all further devices."""
        return sum(map(len, self._programs))

    def when_ready(self, call: Callable[[], None]) -> None:
        """Has a function called whenever a program got ready on another device."""
        self._on_ready = call

    def note_owner(self, program: P, owner: str) -> None:
        """Takes note of whose a program of the first device is. Any thread may call.

        Args:
            program: The program.
            owner: Who has first asked for it; "" for the server itself.
        """
        self._owners[program] = owner

    def find(self, program: P, place: int) -> P | None:
        """Returns a program on a further device; has it made where it is not there.

        Args:
            program: The one on the first device.
            place: Which of the further devices.

        Returns:
            The same program on that device; None if it is not ready there.
        """
        programs = self._programs[place]
        if not programs.has(program):
            self._begin(program, place)
        return programs.ready(program)

    async def get(self, program: P, place: int) -> P | None:
        """Returns a program on a further device, made if need be.

        Args:
            program: The one on the first device.
            place: Which of the further devices.

        Returns:
            The same program on that device; None if it can't be made there.
        """
        make = partial(self._make, program, place)
        return await self._programs[place].get(program, make)

    def close(self) -> None:
        """Makes no more."""
        self._turns.close()

    def _begin(self, program: P, place: int) -> None:
        make, owner = partial(self._make, program, place), self._owners[program]
        # Whose too many others wait is looked at again when it is looked for.
        with suppress(ServiceError):
            self._programs[place].begin(program, make, self._on_ready, owner)
