"""A running server: gRPC, health and reflection around the service."""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from jacserve_server.catalog import Catalog, build_catalog
from jacserve_server.config import Config
from jacserve_server.executor import Executor, find_device
from jacserve_server.registry import Registry
from jacserve_server.scheduler import Scheduler
from jacserve_server.service import JacobianService

_SERVICE = pb.DESCRIPTOR.services_by_name["JacobianService"].full_name
# What a message needs beside the arrays: names, shapes and timing.
_ENVELOPE_BYTES = 2**20


class AddressError(Exception):
    """The server can't listen where it was told to; the text has the remedy."""


class Server:
    """Serves a catalog on one port, from one event loop."""

    def __init__(self, catalog: Catalog, config: Config) -> None:
        """Puts the parts together; `start` opens the port.

        Args:
            catalog: The functions.
            config: The settings.

        Raises:
            DeviceError: The device is not there.
        """
        self._config = config
        self._executor = Executor(
            catalog.find,
            find_device(config.device),
            threads=config.device_threads,
            compile_threads=config.compile_threads,
            max_programs=config.max_programs,
            max_result_bytes=config.max_message_bytes,
        )
        self._scheduler = Scheduler(
            self._executor.execute, max_queries=config.max_queries
        )
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        message_bytes = config.max_message_bytes + _ENVELOPE_BYTES
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", message_bytes),
                # Two servers on one port would silently share its callers.
                ("grpc.so_reuseport", 0),
            ]
        )
        pb_grpc.add_JacobianServiceServicer_to_server(
            JacobianService(catalog, self._scheduler), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> str:
        """Opens the port and answers calls.

        Returns:
            The address to call, such as "127.0.0.1:50051".

        Raises:
            AddressError: The address can't be listened on.
        """
        host, port = self._config.host, self._config.port
        address = f"[{host}]" if ":" in host else host
        try:
            bound = self._server.add_insecure_port(f"{address}:{port}")
        except RuntimeError as error:
            raise AddressError(
                f"can't listen on {address}:{port}. Another program may hold the "
                "port: pass another with --port, or 0 for a free one."
            ) from error
        await self._server.start()
        for name in ("", _SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return f"{address}:{bound}"

    async def stop(self) -> None:
        """Drains: not ready, running calls finish within the grace, then closed."""
        await self._health.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(self._config.grace_s):
                await self._scheduler.drain()
        except TimeoutError:
            pass
        # A drained call has its answer, but may not have sent it yet.
        await self._server.stop(grace=1.0)
        self._executor.close()


async def serve_until_signal(
    catalog: Catalog, config: Config, on_start: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    Args:
        catalog: The functions.
        config: The settings.
        on_start: Called with the address once calls are answered.

    Raises:
        AddressError: The address can't be listened on.
        DeviceError: The device is not there.
    """
    server = Server(catalog, config)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    on_start(await server.start())
    await stopping.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        # The second one ends the process at once.
        loop.remove_signal_handler(number)
    await server.stop()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine in a new event loop, uvloop's where that is installed.

    Args:
        main: The coroutine.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main)


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
    """

    target: str


@contextmanager
def serving(*registries: Registry, **settings: Any) -> Generator[RunningServer]:
    """Runs a server in a thread of this process, on a free loopback port.

    ```python
    with serving(registry) as server, jacserve.Client(server.target) as client:
        client.jacobian("spherical", x)
    ```

    Args:
        *registries: The functions to serve.
        **settings: Settings of `Config`.

    Yields:
        The running server; it drains and stops at the end of the block.

    Raises:
        RegistrationError: Functions can't be served.
    """
    config = Config.load(**{"port": 0, "grace_s": 5.0, **settings})
    catalog = build_catalog(registries)
    started: Future[tuple[str, Callable[[], object]]] = Future()
    thread = threading.Thread(
        target=run, args=(_serve_until_told(catalog, config, started),), name="jacserve"
    )
    thread.start()
    try:
        target, stop = started.result()
    except BaseException:
        thread.join()
        raise
    try:
        yield RunningServer(target)
    finally:
        stop()
        thread.join()


async def _serve_until_told(
    catalog: Catalog,
    config: Config,
    started: Future[tuple[str, Callable[[], object]]],
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        server = Server(catalog, config)
        target = await server.start()
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result((target, partial(loop.call_soon_threadsafe, stopping.set)))
    await stopping.wait()
    await server.stop()
