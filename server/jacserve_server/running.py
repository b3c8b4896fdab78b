"""Runs servers: one until a signal comes, or as a guest in a thread of a process."""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from jacserve_server import compile_cache, xla_threads
from jacserve_server.catalog import Catalog
from jacserve_server.config import Config
from jacserve_server.entrance import open_entrance
from jacserve_server.machine import build_machine
from jacserve_server.registration import build_catalog
from jacserve_server.registry import Registry
from jacserve_server.server import Server

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Ending(Enum):
    """How a server has ended, in words."""

    DRAINED = "Stopped."
    UNREADY = "Stopped before it was ready."
    CUT_OFF = "Stopped while calls still ran."
    FAULT = "Stopped by a fault, of which the log has more."


async def serve_until_signal(
    catalog: Catalog, config: Config, on_start: Callable[[str], None]
) -> Ending:
    """Serves until SIGTERM or SIGINT, or until gRPC has ended, then drains.

    Args:
        catalog: The functions.
        config: The settings.
        on_start: Called with the address once calls are answered.

    Returns:
        How it has ended.

    Raises:
        AddressError: The address can't be listened on.
        DeviceError: The device is not there.
        RegistrationError: A worker process does not find the functions.
        StartError: A worker process can't be started.
        WarmUpError: A function can't be made ready.
    """
    compile_cache.enable(config.cache_dir, config.max_cache_bytes)
    server = await _build_server(catalog, config)
    xla_threads.yield_to_others()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    starting = asyncio.create_task(server.start())
    told = asyncio.create_task(stopping.wait())
    await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return Ending.UNREADY
    on_start(await starting)
    ended = asyncio.create_task(server.ended())
    await asyncio.wait({told, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not told.done():
        _log.critical("gRPC has ended by itself, and so does the server")
    for number in (signal.SIGTERM, signal.SIGINT):
        # A second one ends the process at once, whatever its threads do.
        loop.add_signal_handler(number, os._exit, 128 + number)
    is_drained = await server.stop()
    if not told.done():
        return Ending.FAULT
    return Ending.DRAINED if is_drained else Ending.CUT_OFF


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in a new event loop, uvloop's where that is installed.

    Args:
        main: The coroutine.

    Returns:
        What it returns.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that runs in this process.

    Attributes:
        target: The address to call.
        metrics_url: Where Prometheus is answered; "" where it is not.
    """

    target: str
    metrics_url: str = ""


@contextmanager
def serving(*registries: Registry, **settings: Any) -> Generator[RunningServer]:
    """Runs a server in a thread of this process, on a free loopback port.

    ```python
    with serving(registry) as server, jacserve.Client(server.target) as client:
        client.jacobian("spherical", x)
    ```

    Args:
        *registries: The functions to serve.
        **settings: Settings of `Config`; those not given come from the environment
            or are the defaults, but for host and port.

    Yields:
        The running server. At the end of the block it drains, for at most grace_s.

    Raises:
        RegistrationError: Functions can't be served.
        DeviceError: The device is not there.
        StartError: A worker process can't be started.
        AddressError: The address can't be listened on.
        WarmUpError: A function can't be made ready.
        pydantic.ValidationError: A setting has no valid value.
    """
    with ExitStack() as stack:
        # A guest in a process must not run the jobs of the user's servers.
        if "jobs_dir" not in settings and "JACSERVE_JOBS_DIR" not in os.environ:
            folder = TemporaryDirectory(prefix="jacserve-jobs-")
            settings["jobs_dir"] = Path(stack.enter_context(folder)) / "jobs"
        defaults = {"host": "127.0.0.1", "port": 0, "grace_s": 5.0}
        config = Config.load(**{**defaults, **settings})
        yield from _served(build_catalog(registries), config)


def _served(catalog: Catalog, config: Config) -> Generator[RunningServer]:
    started: Future[RunningServer] = Future()
    stop: Future[None] = Future()
    thread = threading.Thread(
        target=run,
        args=(_serve_until_told(catalog, config, started, stop),),
        name="jacserve",
    )
    thread.start()
    try:
        yield started.result()
    finally:
        stop.set_result(None)
        thread.join()


async def _serve_until_told(
    catalog: Catalog,
    config: Config,
    started: Future[RunningServer],
    stop: Future[None],
) -> None:
    try:
        server = await _build_server(catalog, config)
        target = await server.start()
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(RunningServer(target, server.metrics_url))
    await asyncio.wrap_future(stop)
    await server.stop()


async def _build_server(catalog: Catalog, config: Config) -> Server:
    # Nothing is compiled, and no process started, before this is settled.
    entrance = open_entrance(config)
    machine = await build_machine(catalog, config)
    return Server(catalog, machine, entrance, config)
