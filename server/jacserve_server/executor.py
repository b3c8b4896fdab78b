"""Runs work on a device: finds or compiles programs, and runs them in threads."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import jax

from jacserve.vocabulary import Mode
from jacserve_server.batches import padded
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.programs import (
    Device,
    Limits,
    Program,
    check_result_size,
    choose_mode,
    compile_program,
    without_quantities,
)
from jacserve_server.single_flight import SingleFlight
from jacserve_server.work import Computation, Outcome, ProgramKey, Work

T = TypeVar("T")


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


def memory_budget(device: Device) -> int:
    """Returns the bytes that one program may take by default: 3/4 of the memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        memory = stats["bytes_limit"]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory * 3 // 4


def _contained(call: Callable[..., T], *arguments: Any) -> T:
    """Calls, and lets nothing but Exceptions out.

    Of the rest, asyncio would end the event loop for a KeyboardInterrupt or a
    SystemExit; but here these are raised by a registered function, not by Python.
    """
    try:
        return call(*arguments)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError("a registered function tried to end the server") from error


class Executor:
    """Runs programs on one device of this process.

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
        limits: Limits,
    ) -> None:
        """Starts no work yet.

        Args:
            find: Finds a function by its qualified name.
            device: Where programs run.
            threads: How many may run at once.
            compile_threads: How many may be compiled at once.
            max_programs: How many compiled ones are kept.
            limits: What one program may take.
        """
        self._find = find
        self._device = device
        self._limits = limits
        self._device_threads = ThreadPoolExecutor(threads, "device")
        self._compile_threads = ThreadPoolExecutor(compile_threads, "compile")
        self._programs = SingleFlight[ProgramKey, Program](
            self._compile_threads, capacity=max_programs
        )
        self._modes = SingleFlight[Computation, Mode](
            self._compile_threads, capacity=max_programs
        )

    def ready(self, key: ProgramKey) -> Program | None:
        """Returns a program that is compiled already, else None."""
        computation = key.computation
        if computation.mode == "auto":
            mode = self._modes.ready(without_quantities(computation))
            if mode is None:
                return None
            key = replace(key, computation=replace(computation, mode=mode))
        return self._programs.ready(key)

    async def prepare(self, key: ProgramKey) -> Program:
        """Returns a program, compiled if need be.

        What is being compiled when its last asker leaves is finished, for the next.

        Args:
            key: Which program; "auto" as its mode lets the shapes decide.

        Returns:
            The program, its mode decided.

        Raises:
            ServiceError: It can't be compiled.
        """
        function = self._find(key.computation.function)
        if key.computation.mode == "auto":
            shapes = without_quantities(key.computation)
            mode = await self._modes.get(
                shapes, partial(_contained, choose_mode, function, shapes)
            )
            key = replace(key, computation=replace(key.computation, mode=mode))
        compiling = partial(compile_program, function, key, self._device, self._limits)
        return await self._programs.get(key, partial(_contained, compiling))

    async def run(self, program: Program, work: Work) -> Outcome:
        """Runs a program in a thread of the device.

        Args:
            program: The program for the work's computation and batch.
            work: On what.

        Returns:
            What came of it.

        Raises:
            ServiceError: The result is too large to send, or the device failed.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._device_threads, _contained, self._run, program, work
        )

    def close(self) -> None:
        """Takes no more work; what runs can't be stopped and is not waited for."""
        self._compile_threads.shutdown(wait=False, cancel_futures=True)
        self._device_threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, program: Program, work: Work) -> Outcome:
        computation, bucket = program.key.computation, program.key.bucket
        name = f"functions/{computation.function}"
        check_result_size(name, program.row_bytes, work.batch, self._limits)
        start = time.monotonic()
        arrays, finite = program.run(padded(work, bucket))
        if work.batch is not None:
            arrays = [array[: work.batch] for array in arrays]
            finite = finite[: work.batch]
        return Outcome(
            function=computation.function,
            outputs=tuple(
                (quantity, path, array)
                for (quantity, path), array in zip(program.outline, arrays, strict=True)
            ),
            finite=finite,
            mode=cast("Mode | None", computation.mode),
            bucket=bucket,
            device=device_name(self._device),
            execute_s=time.monotonic() - start,
        )
