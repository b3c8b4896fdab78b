"""The programs of the first device on further ones, compiled in the background."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from jacserve_server.catalog import RegisteredFunction
from jacserve_server.errors import ServiceError
from jacserve_server.programs import (
    Device,
    Limits,
    Program,
    compile_program,
    device_name,
)
from jacserve_server.single_flight import SingleFlight

_log = logging.getLogger(__name__)


class Replicas:
    """Has each program on further devices as soon as they could use it.

    Used from one event loop.
    """

    def __init__(
        self,
        find: Callable[[str], RegisteredFunction],
        devices: Sequence[Device],
        *,
        max_programs: int,
        limits: Limits,
    ) -> None:
        """Starts empty.

        Args:
            find: Finds a function by its qualified name.
            devices: The further devices.
            max_programs: How many compiled programs are kept for each.
            limits: What one program may take.
        """
        self._find = find
        self._devices = devices
        self._limits = limits
        # A thread of its own: who waits for a first program goes before.
        self._thread = ThreadPoolExecutor(1, "compile-replicas")
        self._programs = [
            # None stands for one that could not be made, and is not tried again.
            SingleFlight[Program, Program | None](
                lambda _, make: self._thread.submit(make), capacity=max_programs
            )
            for _ in devices
        ]
        self._on_ready: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        """Returns how many programs there are, on all further devices."""
        return sum(map(len, self._programs))

    def when_ready(self, call: Callable[[], None]) -> None:
        """Has a function called whenever a program got ready on another device."""
        self._on_ready = call

    def find(self, program: Program, place: int) -> Program | None:
        """Returns a program on a further device; has it made where it is not there.

        Args:
            program: The one on the first device.
            place: Which of the further devices.

        Returns:
            The same program on that device; None if it is not ready there.
        """
        programs = self._programs[place]
        if not programs.has(program):
            make = partial(self._make, program, self._devices[place])
            programs.begin(program, make, self._on_ready)
        return programs.ready(program)

    def close(self) -> None:
        """Makes no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, program: Program, device: Device) -> Program | None:
        function = self._find(program.key.computation.function)
        try:
            return compile_program(
                function, program.key, program.decision, device, self._limits
            )
        except ServiceError as error:
            name = device_name(device)
            _log.warning("%s is not used for this: %s", name, error.message)
            return None
