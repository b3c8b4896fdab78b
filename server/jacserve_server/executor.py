"""Runs work on a device: finds or compiles its program, then runs it in a thread."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax

from jacserve.vocabulary import Mode
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.planning import padded
from jacserve_server.programs import (
    Device,
    Program,
    SingleFlight,
    choose_mode,
    compile_program,
)
from jacserve_server.query import Outcome, ProgramKey, Work


class DeviceError(Exception):
    """The device asked for is not there; the text says which are."""


def find_device(name: str) -> Device:
    """Finds a device of this process.

    Args:
        name: "auto" for JAX's default, a platform such as "cpu" or "gpu" for its
            first device, or one by number, such as "gpu:1".

    Returns:
        The device.

    Raises:
        DeviceError: There is no such device.
    """
    platform, _, number = name.partition(":")
    try:
        devices = jax.devices() if platform == "auto" else jax.devices(platform)
        return devices[int(number or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        found = ", ".join(device_name(device) for device in jax.devices())
        raise DeviceError(
            f"device {name} is not there; JAX found {found}. Pass one of these, or "
            "auto."
        ) from error


def device_name(device: Device) -> str:
    """Returns a device's name, such as "cpu:0"."""
    return f"{device.platform}:{device.id}"


class Executor:
    """Executes work on one device of this process.

    It takes and returns plain data, so another executor, in another process, can
    stand in its place. Used from one event loop; programs are compiled and run in
    threads of their own.
    """

    def __init__(
        self,
        find: Callable[[str], RegisteredFunction],
        device: Device,
        *,
        threads: int,
        compile_threads: int,
        max_programs: int,
        max_result_bytes: int,
    ) -> None:
        """Starts no work yet.

        Args:
            find: Finds a function by its qualified name.
            device: Where programs run.
            threads: How many may run at once.
            compile_threads: How many may be compiled at once.
            max_programs: How many compiled ones are kept.
            max_result_bytes: The most that one result may take.
        """
        self._find = find
        self._device = device
        self._max_result_bytes = max_result_bytes
        self._device_threads = ThreadPoolExecutor(threads, "device")
        self._compile_threads = ThreadPoolExecutor(compile_threads, "compile")
        self._programs = SingleFlight[ProgramKey, Program](
            self._compile_threads, capacity=max_programs
        )
        self._modes = SingleFlight[ProgramKey, Mode](
            self._compile_threads, capacity=max_programs
        )

    async def execute(self, work: Work) -> Outcome:
        """Executes one piece of work.

        Cancelling drops the work if it has not begun to run; a program that is
        being compiled is finished for the next who asks.

        Args:
            work: What to run, and on what.

        Returns:
            What came of it.

        Raises:
            ServiceError: It can't be compiled or run.
        """
        program, compile_s = await self._program(work.key)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._device_threads, self._run, program, work, compile_s, time.monotonic()
        )

    def close(self) -> None:
        """Waits for what runs and drops what waits."""
        self._compile_threads.shutdown(cancel_futures=True)
        self._device_threads.shutdown(cancel_futures=True)

    async def _program(self, key: ProgramKey) -> tuple[Program, float]:
        """Returns the program, and the seconds spent waiting for it."""
        function = self._find(key.function)
        start = time.monotonic()
        was_ready = True
        if key.mode == "auto":
            shapes = replace(key, quantities=(), layout="matrix", bucket=None)
            was_ready = self._modes.is_ready(shapes)
            mode = await self._modes.get(shapes, lambda: choose_mode(function, shapes))
            key = replace(key, mode=mode)
        was_ready = was_ready and self._programs.is_ready(key)
        program = await self._programs.get(
            key,
            lambda: compile_program(
                function, key, self._device, max_result_bytes=self._max_result_bytes
            ),
        )
        return program, 0.0 if was_ready else time.monotonic() - start

    def _run(
        self, program: Program, work: Work, compile_s: float, submitted: float
    ) -> Outcome:
        start = time.monotonic()
        arrays, finite = program.run(padded(work))
        if work.batch is not None:
            arrays = [array[: work.batch] for array in arrays]
            finite = finite[: work.batch]
        return Outcome(
            key=program.key,
            outputs=tuple(
                (quantity, path, array)
                for (quantity, path), array in zip(program.outline, arrays, strict=True)
            ),
            finite=finite,
            device=device_name(self._device),
            queue_s=start - submitted,
            compile_s=compile_s,
            execute_s=time.monotonic() - start,
        )
