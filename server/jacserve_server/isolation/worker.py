"""The program of a worker process: makes programs and runs them, as it is told.

It is started by the server, with one end of a socket pair and nothing else, and ends
with it. `python -m jacserve_server.isolation.worker` is of no use to anybody else.
"""

import asyncio
import ctypes
import faulthandler
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from jacserve.tensors import Array
from jacserve_server import allocator, compile_cache, xla_threads
from jacserve_server.errors import ServiceError
from jacserve_server.executor import (
    DeviceError,
    Executor,
    default_threads,
    find_devices,
    memory_budget,
)
from jacserve_server.isolation import origins
from jacserve_server.isolation.channel import Channel
from jacserve_server.isolation.process import become_worker
from jacserve_server.isolation.protocol import (
    FLAG,
    NEWS,
    ORDERS,
    Failed,
    FindSparsity,
    Fingerprint,
    Fingerprinted,
    Found,
    PatternHead,
    Prepare,
    Prepared,
    Ran,
    Ready,
    Request,
    Run,
    Start,
    Unavailable,
    Unfit,
    pattern_bytes,
    slots,
)
from jacserve_server.isolation.regions import opened
from jacserve_server.measurements import Measurements
from jacserve_server.programs import Limits, Program, device_name
from jacserve_server.registration import build_catalog
from jacserve_server.registry import RegistrationError
from jacserve_server.work import Outcome, ProgramKey, Work

_log = logging.getLogger(__name__)

# Where the code of functions does not come by accident.
_DESCRIPTOR = 900
_COPIED_HERE_BYTES = 2**18
_PR_SET_PDEATHSIG = 1
# More than a server has of them at once; it names one again that is not known here.
_NAMES = 4


class Worker:
    """Does what the server asks. Used from one event loop."""

    def __init__(self, end: socket.socket, on_end: asyncio.Event) -> None:
        """Listens.

        Args:
            end: The end of the socket pair.
            on_end: Set when the server is gone.
        """
        self._executor: Executor | None = None
        self._names: dict[int, tuple[ProgramKey, int]] = {}
        self._max_names = 0
        self._regions: dict[int, memoryview] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel = Channel(
            end,
            on_message=self._take,
            on_closed=lambda _: on_end.set(),
            max_tail_bytes=0,
            takes_descriptors=True,
        )

    def _take(self, head: bytes, tail: bytes) -> None:
        order = ORDERS.validate_json(head)
        if isinstance(order, Start):
            self._channel.send(NEWS.dump_json(self._started(order)))
            return
        if isinstance(order, Run):
            self._share(order)
            if self._run_now(order):
                return
        task = asyncio.get_running_loop().create_task(self._answer(order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _started(self, start: Start) -> Ready | Unfit:
        try:
            return self._start(start)
        except RegistrationError as error:
            return Unfit("functions", str(error))
        except DeviceError as error:
            return Unfit("device", str(error))
        except Exception as error:
            _log.exception("it can't start")
            return Unfit("other", f"{type(error).__name__}: {error}")

    def _start(self, start: Start) -> Ready:
        sys.path[:] = start.search_path
        cache_dir = Path(start.cache_dir)
        compile_cache.enable(cache_dir, start.max_cache_bytes)
        catalog = build_catalog(origins.load(start.origins))
        device, *others = devices = find_devices(start.device)
        threads = start.device_threads or default_threads(devices)
        measurements = Measurements.load(cache_dir)
        self._max_names = _NAMES * start.max_programs * len(devices)
        self._executor = Executor(
            catalog.find,
            device,
            others=others,
            threads=threads,
            compile_threads=start.compile_threads,
            max_programs=start.max_programs,
            limits=Limits(
                result_bytes=start.result_bytes,
                program_bytes=start.program_bytes or memory_budget(devices),
            ),
            measured=partial(measurements.find, device=device.device_kind),
        )
        xla_threads.yield_to_others()
        return Ready(
            devices=tuple(map(device_name, devices)),
            device_kind=device.device_kind,
            threads=threads,
            functions=tuple(origins.digests(catalog).items()),
        )

    def _share(self, order: Run) -> None:
        for region in order.dropped:
            self._regions.pop(region, None)
        if order.is_new:
            descriptor = self._channel.descriptors.popleft()
            self._regions[order.region] = opened(descriptor, order.size_bytes)

    async def _answer(self, order: Request) -> None:
        try:
            reply, tail = await self._done(order)
        except ServiceError as error:
            reply, tail = Failed.of(order.id, error), b""
        except Exception as error:
            _log.exception("it failed")
            failure = ServiceError(
                "UNEXPECTED",
                f"the server failed on this call, with {type(error).__name__}. Its log "
                "has more.",
            )
            reply, tail = Failed.of(order.id, failure), b""
        self._channel.send(NEWS.dump_json(reply), tail)

    async def _done(
        self, order: Request
    ) -> tuple[Prepared | Ran | Found | Fingerprinted | Unavailable, bytes]:
        executor = self._executor
        assert executor is not None  # The server waits until it is ready.
        if isinstance(order, Prepare):
            return await self._prepared(executor, order)
        if isinstance(order, Run):
            return await self._ran(executor, order), b""
        if isinstance(order, Fingerprint):
            return Fingerprinted(order.id, await executor.fingerprint(order.key)), b""
        return await _found(executor, order)

    async def _prepared(
        self, executor: Executor, order: Prepare
    ) -> tuple[Prepared | Unavailable, bytes]:
        program = await executor.prepare(order.key)
        if order.place:
            found = await executor.replica(program, order.place)
            if found is None:
                return Unavailable(order.id), b""
            program = found
        while len(self._names) >= self._max_names:
            del self._names[next(iter(self._names))]
        self._names[order.id] = order.key, order.place
        outline = program.outline
        patterns = outline.patterns.items()
        prepared = Prepared(
            id=order.id,
            arrays=outline.arrays,
            results=program.results,
            modes=tuple(outline.modes.items()),
            patterns=tuple((q, PatternHead(p.shape, p.nnz)) for q, p in patterns),
            strategy=outline.strategy,
            device=outline.device,
            is_lone=program.is_lone,
        )
        return prepared, b"".join(pattern_bytes(pattern) for _, pattern in patterns)

    def _program(self, executor: Executor, order: Run) -> Program | None:
        key, place = self._names.get(order.program, (None, 0))
        program = executor.ready(key) if key is not None else None
        return executor.on(program, place) if program is not None else None

    def _run_now(self, order: Run) -> bool:
        """Runs a brief program at once; returns whether it was one."""
        executor = self._executor
        assert executor is not None
        program = self._program(executor, order)
        if program is None or not program.is_brief:
            return False
        try:
            work, results = self._work(program, order)
            outcome = executor.run_now(program, work)
            _write(outcome, results)
            reply = Ran(order.id, outcome.execute_s)
        except ServiceError as error:
            reply = Failed.of(order.id, error)
        self._channel.send(NEWS.dump_json(reply))
        return True

    async def _ran(self, executor: Executor, order: Run) -> Ran | Unavailable:
        program = self._program(executor, order)
        if program is None:
            return Unavailable(order.id)
        work, results = self._work(program, order)
        [outcome] = await executor.run(program, [work])
        if sum(array.nbytes for array in results) <= _COPIED_HERE_BYTES:
            _write(outcome, results)
        else:
            await asyncio.to_thread(_write, outcome, results)
        return Ran(order.id, outcome.execute_s)

    def _work(self, program: Program, order: Run) -> tuple[Work, list[Array]]:
        """Returns the work that is in a region, and where its results go."""
        computation = program.key.computation
        specs = (*computation.arrays, *program.results, FLAG)
        views = slots(specs, order.batch).views(self._regions[order.region])
        count = len(computation.arrays)
        return Work(computation, tuple(views[:count]), order.batch), views[count:]


async def _found(executor: Executor, order: FindSparsity) -> tuple[Found, bytes]:
    found = await executor.sparsity(order.sought)
    head = PatternHead(found.pattern.shape, found.pattern.nnz)
    news = Found(order.id, head, found.color_count, found.mode)
    return news, pattern_bytes(found.pattern)


def _write(outcome: Outcome, results: Sequence[Array]) -> None:
    for place, array in zip(results, (*outcome.arrays, outcome.finite), strict=True):
        place[...] = array


def _end_with(parent: int) -> None:
    """Has the kernel end this process with the thread that has started it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _go_first() -> None:
    """Has the kernel end this process first where memory does not suffice."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _moved(descriptor: int) -> socket.socket:
    """Moves the socket out of the way of code that closes or writes to descriptors."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, min(_DESCRIPTOR, most // 2))
    os.close(descriptor)
    return socket.socket(fileno=moved)


async def _work_until_left(end: socket.socket) -> None:
    left = asyncio.Event()
    worker = Worker(end, left)
    await left.wait()
    del worker
    sys.stdout.flush()
    # Nothing that still runs is waited for.
    os._exit(0)


def main() -> None:
    """Works for the server that has started this process."""
    parent, descriptor = map(int, sys.argv[1:])
    become_worker()
    _end_with(parent)
    _go_first()
    allocator.share_arenas()
    allocator.trim_for_ever()
    xla_threads.spare()
    faulthandler.enable()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    end = _moved(descriptor)
    with asyncio.Runner() as runner:
        runner.run(_work_until_left(end))


if __name__ == "__main__":
    main()
