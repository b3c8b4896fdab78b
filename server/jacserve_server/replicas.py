"""The programs of the first device on further ones, made in the background."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from jacserve_server.single_flight import SingleFlight

P = TypeVar("P")


class Replicas(Generic[P]):
    """Has each program on further devices as soon as they could use it.

    Used from one event loop.
    """

    def __init__(
        self,
        make: Callable[[P, int], P | None],
        places: int,
        *,
        max_programs: int,
    ) -> None:
        """Starts empty.

        Args:
            make: Makes a program of the first device for a further one, given by its
                place among these; returns None for one that can't be made, which is
                not tried again.
            places: How many further devices there are.
            max_programs: How many programs are kept for each.
        """
        self._make = make
        # A thread of its own: who waits for a first program goes before.
        self._thread = ThreadPoolExecutor(1, "compile-replicas")
        self._programs = [
            SingleFlight[P, P | None](
                lambda _, make: self._thread.submit(make), capacity=max_programs
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
            make = partial(self._make, program, place)
            programs.begin(program, make, self._on_ready)
        return programs.ready(program)

    def is_coming(self, program: P, place: int) -> bool:
        """Whether a program that was looked for there is still being made.

        Args:
            program: The one on the first device.
            place: Which of the further devices.
        """
        return not self._programs[place].is_made(program)

    def close(self) -> None:
        """Makes no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
