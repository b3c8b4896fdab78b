"""Runs work on a device: finds or compiles programs, and runs them in threads."""

import asyncio
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import jax

from jacserve.tensors import Array
from jacserve_server import xla_threads
from jacserve_server.batches import finite_points, padded
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.coalescing import gathered, separated
from jacserve_server.compile_turns import (
    CompileBudgets,
    CompileTurns,
    is_owners_alone,
    owner_of,
)
from jacserve_server.device_threads import DeviceThreads
from jacserve_server.diagnosis import execution_error
from jacserve_server.errors import ServiceError
from jacserve_server.programs import (
    Device,
    Limits,
    Program,
    compile_program,
    device_name,
    fingerprint,
    smaller,
)
from jacserve_server.replicas import Replicas
from jacserve_server.single_flight import SingleFlight
from jacserve_server.sparsity import (
    ColoredPattern,
    Kind,
    find_sparsity,
)
from jacserve_server.strategies import Decision, decide
from jacserve_server.tracing import abstract_results
from jacserve_server.transforms.point import Leaf
from jacserve_server.work import (
    InputSpec,
    Outcome,
    ProgramKey,
    Sparsity,
    SparsityKey,
    Strategy,
    Work,
)
from jacserve_server.xla_threads import LAPACK

T = TypeVar("T")
_log = logging.getLogger(__name__)

# What a compiled program depends on: two ways to ask may be decided alike.
_Decided = tuple[ProgramKey, Strategy]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """How a device is.

    Attributes:
        name: Its name, such as "gpu:0".
        kind: Its kind, such as "NVIDIA H200".
        used_bytes: Bytes in use there; 0 where it can't be told, as on a CPU.
        limit_bytes: Bytes that may be used there; 0 where it can't be told.
    """

    name: str
    kind: str
    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class ProgramsState:
    """How many programs there are.

    Attributes:
        count: Programs that are kept, or being made, on all devices.
        most: Programs that may be kept, on all devices.
        compile_s: Seconds that were spent on making them, on all threads.
    """

    count: int
    most: int
    compile_s: float


class DeviceError(Exception):
    """The device asked for is not there; the text says which are."""


def stay_on_cpu() -> None:
    """Leaves all other devices to the processes that compute, before JAX is used."""
    jax.config.update("jax_platforms", "cpu")


def find_devices(name: str) -> list[Device]:
    """Finds devices of this process.

    Args:
        name: A platform such as "cpu" or "gpu" for its first device, or some by
            number, such as "gpu:1" or "gpu:0,1". "auto" stands for JAX's default
            platform: all of its GPUs, or the first device of another.

    Returns:
        The devices, in the order of the name.

    Raises:
        DeviceError: One of them is not there, or is named twice.
    """
    xla_threads.spare()
    platform, _, listed = name.partition(":")
    numbers = [int(number) for number in listed.split(",") if number]
    if len(set(numbers)) < len(numbers):
        raise DeviceError(f"device {name} has a device twice. Name each once.")
    try:
        if platform == "auto":
            devices = jax.devices()
            is_gpu = devices[0].platform == "gpu"
            numbers = numbers or (list(range(len(devices))) if is_gpu else [0])
        else:
            devices = jax.devices(platform)
        return [devices[number] for number in numbers or [0]]
    except (RuntimeError, IndexError) as error:
        found = ", ".join(device_name(device) for device in jax.devices())
        raise DeviceError(
            f"device {name} is not there; JAX found {found}. Pass some of these, or "
            "auto."
        ) from error


def find_device(name: str) -> Device:
    """Finds a device of this process: the first of those that a name stands for."""
    return find_devices(name)[0]


def memory_budget(devices: Iterable[Device]) -> int:
    """Returns the bytes that one program may take by default.

    Args:
        devices: Where it may run.

    Returns:
        3/4 of the memory of the device that has the least.
    """
    return min(map(_memory, devices)) * 3 // 4


def _memory(device: Device) -> int:
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _state(device: Device) -> DeviceState:
    stats = device.memory_stats() or {}
    return DeviceState(
        device_name(device),
        device.device_kind,
        stats.get("bytes_in_use", 0),
        stats.get("bytes_limit", 0),
    )


def default_threads(devices: Sequence[Device]) -> int:
    """Returns how many programs run at once on each device by default.

    On a GPU two, so that the results of one leave it while the next is computed. CPU
    devices share the cores; more than four threads would only wait for each other.
    """
    if devices[0].platform != "cpu":
        return 2
    return max(1, min(os.cpu_count() or 1, 4) // len(devices))


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
    """Runs programs on devices of this process.

    It takes and returns plain data, so another executor, in another process, can
    stand in its place. Used from one event loop; programs are compiled and run in
    threads of their own. What another device runs is compiled for the first one first.

    Attributes:
        places: How many devices there are.
    """

    def __init__(
        self,
        find: Callable[[str], RegisteredFunction],
        device: Device,
        *,
        others: Sequence[Device] = (),
        threads: int,
        compile_threads: int,
        max_programs: int,
        limits: Limits,
        measured: Callable[[ProgramKey], Sequence[Strategy]] = lambda _: (),
        max_owned_programs: int | None = None,
        compile_budgets: CompileBudgets | None = None,
    ) -> None:
        """Starts no work yet.

        Args:
            find: Finds a function by its qualified name.
            device: Where programs are compiled first, and brief ones run.
            others: Where else they run, of the same kind.
            threads: How many may run at once on each device.
            compile_threads: How many may be compiled at once.
            max_programs: How many compiled ones are kept for each device.
            limits: What one program may take.
            measured: Finds the strategies that were measured, the fastest first.
            max_owned_programs: How many are kept that one client has first asked for;
                None for any, though whoever has the most is the first to lose one.
            compile_budgets: The seconds of compiling that each client may have; None
                for any.
        """
        self._measured = measured
        self._find = find
        self._devices = (device, *others)
        self._device = device
        self._limits = limits
        self._max_programs = max_programs
        self._making = threading.Lock()
        self._compile_s = 0.0
        self._made_count = 0
        self.places = 1 + len(others)
        self._others = others
        self._replicas = Replicas[Program](
            self._replica,
            len(others),
            max_programs=max_programs,
            max_owned_programs=max_owned_programs,
        )
        # The scheduler sees to it that no device has more than its threads.
        self._device_threads = DeviceThreads(threads * self.places)
        self._turns = CompileTurns(compile_threads, compile_budgets)
        self._programs = SingleFlight[_Decided, Program](
            self._turns.submit,
            capacity=max_programs,
            share=max_owned_programs,
            is_owners_alone=is_owners_alone,
        )
        self._decisions = SingleFlight[ProgramKey, tuple[_Decided, Decision]](
            self._turns.submit,
            capacity=max_programs,
            share=max_owned_programs,
            is_owners_alone=is_owners_alone,
        )
        # Those that stand in for programs which the memory did not suffice for.
        self._frugal: WeakKeyDictionary[Program, Program] = WeakKeyDictionary()
        # These serve every batch size and every set of quantities.
        self._results = functools.lru_cache(maxsize=max_programs)(self._trace)
        self._sparsity = functools.lru_cache(maxsize=max_programs)(self._find_sparsity)

    def devices(self) -> list[DeviceState]:
        """Returns how the devices are. Any thread may call."""
        return list(map(_state, self._devices))

    @property
    def programs(self) -> ProgramsState:
        """How many programs there are."""
        count = len(self._programs) + len(self._replicas)
        return ProgramsState(count, self._max_programs * self.places, self._compile_s)

    def ready(self, key: ProgramKey) -> Program | None:
        """Returns a program that is compiled already, else None."""
        found = self._decisions.ready(key)
        return None if found is None else self._programs.ready(found[0])

    async def prepare(self, key: ProgramKey, client: str = "") -> Program:
        """Returns a program, compiled if need be.

        What is being compiled when its last asker leaves is finished, for the next.

        Args:
            key: Which program.
            client: Who asks; "" for the server itself.

        Returns:
            The program.

        Raises:
            ServiceError: It can't be compiled, or not for this client now.
        """
        function, owner = self._find(key.computation.function), owner_of(client)
        deciding = partial(self._make, self._decide, function, key)
        decided, decision = await self._decisions.get(key, deciding, owner)
        compiling = partial(self._make, self._compile, function, key, decision, owner)
        return await self._programs.get(decided, compiling, owner)

    async def fingerprint(self, key: ProgramKey, client: str = "") -> str:
        """Identifies what a program computes, in this process and in later ones.

        Args:
            key: Which program.
            client: Who asks; "" for the server itself.

        Returns:
            A hash of its code, its constants, and the way it differentiates.

        Raises:
            ServiceError: It can't be traced, or not for this client now.
        """
        function, owner = self._find(key.computation.function), owner_of(client)
        deciding = partial(_contained, self._decide, function, key)
        _, decision = await self._decisions.get(key, deciding, owner)
        return await asyncio.wrap_future(
            self._turns.submit(
                owner,
                partial(_contained, fingerprint, function, key, decision, self._device),
            )
        )

    async def sparsity(self, sought: SparsityKey, client: str = "") -> Sparsity:
        """Finds a sparsity pattern.

        Args:
            sought: Whose.
            client: Who asks; "" for the server itself.

        Returns:
            The pattern.

        Raises:
            ServiceError: It can't be found, or not for this client now.
        """
        finding = partial(_contained, self._sparsity, sought)
        submitted = self._turns.submit(owner_of(client), finding)
        return (await asyncio.wrap_future(submitted)).sparsity

    def on(self, program: Program, place: int) -> Program | None:
        """Returns a program on one of the devices, if it is ready there.

        Where it is not, it is compiled in the background.

        Args:
            program: The one on the first device.
            place: The device's place among all.
        """
        return program if place == 0 else self._replicas.find(program, place - 1)

    async def replica(self, program: Program, place: int) -> Program | None:
        """Returns a program on one of the other devices, compiled if need be.

        Args:
            program: The one on the first device.
            place: The device's place among all.

        Returns:
            The program there; None if it can't be compiled.
        """
        return await self._replicas.get(program, place - 1)

    def when_ready(self, call: Callable[[], None]) -> None:
        """Has a function called whenever a program got ready on another device."""
        self._replicas.when_ready(call)

    def run_now(self, program: Program, work: Work) -> Outcome:
        """Runs a brief program in this thread.

        Args:
            program: The program for the work's computation and batch.
            work: On what.

        Returns:
            What came of it.

        Raises:
            ServiceError: The device failed.
        """
        return self._run(program, work)

    def run(
        self, program: Program, works: Sequence[Work]
    ) -> "asyncio.Future[list[Outcome]]":
        """Runs a program once, in a thread of the device.

        Args:
            program: The program: for the work's computation and batch, or for a batch
                of at least as many points as there are.
            works: A piece of work, or several points of one computation.

        Returns:
            What comes of each, or a ServiceError: the device failed.
        """
        run = self._run_alone if len(works) == 1 else self._run_together
        return self._device_threads.start(partial(_contained, run, program, works))

    def close(self) -> None:
        """Takes no more work; what runs can't be stopped and is not waited for."""
        self._replicas.close()
        self._turns.close()
        self._device_threads.close()

    def _make(self, call: Callable[..., T], *arguments: Any) -> T:
        """Makes a part of a program in this thread, and adds up what that takes."""
        start = time.monotonic()
        try:
            return _contained(call, *arguments)
        finally:
            with self._making:
                self._compile_s += time.monotonic() - start

    def _compile(
        self,
        function: RegisteredFunction,
        key: ProgramKey,
        decision: Decision,
        owner: str,
    ) -> Program:
        try:
            program = compile_program(
                function, key, decision, self._device, self._limits
            )
        finally:
            self._remember_less()
        self._replicas.note_owner(program, owner)
        return program

    def _remember_less(self) -> None:
        """Empties JAX's own caches, each time as many programs were made as are kept.

        They keep the traces of thousands of programs, long after these are gone.
        """
        with self._making:
            self._made_count += 1
            is_enough = self._made_count % self._max_programs == 0
        if is_enough:
            jax.clear_caches()

    def _replica(self, program: Program, place: int) -> Program | None:
        function = self._find(program.key.computation.function)
        device = self._others[place]
        try:
            return compile_program(
                function, program.key, program.decision, device, self._limits
            )
        except ServiceError as error:
            name = device_name(device)
            _log.warning("%s is not used for this: %s", name, error.message)
            return None

    def _decide(
        self, function: RegisteredFunction, key: ProgramKey
    ) -> tuple[_Decided, Decision]:
        computation = key.computation
        points = tuple(replace(x, is_batched=False) for x in computation.inputs)

        def find(kind: Kind) -> ColoredPattern:
            name, wrt = computation.function, computation.wrt
            return self._sparsity(SparsityKey(name, points, wrt, kind))

        trace = partial(self._results, computation.function, points)
        decision = decide(function, key, self._measured(key), trace, find)
        asked = replace(key, computation=replace(computation, mode=None))
        return (asked, decision.strategy), decision

    def _trace(self, name: str, points: tuple[InputSpec, ...]) -> list[Leaf]:
        return abstract_results(self._find(name).call, points)

    def _find_sparsity(self, sought: SparsityKey) -> ColoredPattern:
        return find_sparsity(self._find(sought.function), sought)

    def _run_alone(self, program: Program, works: Sequence[Work]) -> list[Outcome]:
        [work] = works
        return [self._run(program, work)]

    def _run_together(self, program: Program, works: Sequence[Work]) -> list[Outcome]:
        start = time.monotonic()
        outcome = self._execute(program, gathered(works, program.key), start)
        return separated(outcome, len(works))

    def _run(self, program: Program, work: Work) -> Outcome:
        return self._execute(program, work, time.monotonic())

    def _execute(self, program: Program, work: Work, start: float) -> Outcome:
        if not program.is_brief:  # Those take next to no memory.
            program = self._frugal.get(program, program)
        try:
            inputs = padded(work, program.key.bucket)
            try:
                arrays = _ran(program, inputs)
            except ServiceError as error:
                if error.reason != "DEVICE_OUT_OF_MEMORY" or (work.batch or 1) > 1:
                    raise
                program, arrays = self._ran_frugally(program, inputs, error)
            if work.batch is not None:
                arrays = [array[: work.batch] for array in arrays]
            finite = finite_points(arrays, work.batch)
        except MemoryError as error:
            raise execution_error(program.key, error) from error
        return Outcome(
            outline=program.outline,
            arrays=tuple(arrays),
            finite=finite,
            execute_s=time.monotonic() - start,
        )

    def _ran_frugally(
        self, program: Program, inputs: Sequence[Array], failure: ServiceError
    ) -> tuple[Program, list[Array]]:
        """Runs one point in smaller chunks, which take longer but less memory.

        Batches are not: in parts they are quicker than in chunks, and take no less.
        """
        function = self._find(program.key.computation.function)
        for strategy in smaller(program.decision.strategy):
            decision = replace(program.decision, strategy=strategy)
            try:
                frugal = compile_program(
                    function, program.key, decision, program.device, self._limits
                )
                arrays = _ran(frugal, inputs)
            except ServiceError as error:
                if error.reason != "DEVICE_OUT_OF_MEMORY":
                    raise
                failure = error
                continue
            self._frugal[program] = frugal
            return frugal, arrays
        raise failure


def _ran(program: Program, inputs: Sequence[Array]) -> list[Array]:
    with LAPACK if program.is_lone else nullcontext():
        return program.run(inputs)
