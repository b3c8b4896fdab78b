"""A running server: gRPC, health and reflection around the service."""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from jacserve.v1 import admin_pb2, jacobian_pb2 as pb, jobs_pb2
from jacserve_server import (
    admin_service,
    job_service,
    probes,
)
from jacserve_server.access import OpenGate
from jacserve_server.admin_service import AdminService
from jacserve_server.batches import bucket_for
from jacserve_server.calls import Boundary, Observer
from jacserve_server.catalog import Catalog, RegisteredFunction
from jacserve_server.config import Config
from jacserve_server.entrance import Entrance
from jacserve_server.errors import ServiceError
from jacserve_server.exposure import AddressError
from jacserve_server.job_service import JobService
from jacserve_server.machine import Machine
from jacserve_server.observation import CallObserver
from jacserve_server.overview import Overview
from jacserve_server.registry import WarmUp
from jacserve_server.service import JacobianService, add_to_server
from jacserve_server.signature import FunctionSpec
from jacserve_server.streams import Streams
from jacserve_server.telemetry import TracingObserver
from jacserve_server.warmup import first_work, further_work, single_point
from jacserve_server.work import Work

if TYPE_CHECKING:
    from jacserve_server.metrics import MetricsPort

T = TypeVar("T")
_log = logging.getLogger(__name__)

_SERVICES = (
    pb.DESCRIPTOR.services_by_name["JacobianService"].full_name,
    jobs_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
# The largest message received; larger queries come in parts. It is gRPC's default.
_MESSAGE_BYTES = 4 * 2**20
# In so many ticks on end no call may arrive before the server closes its connections;
# and so long it waits for that.
_TICK_S, _QUIET_TICKS, _MOST_REFUSING_S = 0.01, 3, 1.0
# How long jobs wait for their table to be looked for again, where it is away.
_FIRST_RETRY_S, _LONGEST_RETRY_S = 2.0, 300.0
_METADATA_BYTES = 2**13
_HANDSHAKE_MS = 10_000
KEEPALIVE = (
    # A connection whose other end is gone is noticed so: pinged after the first time
    # without traffic, and closed where there is no reply for the second.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # And clients may ping so often themselves, with calls or without.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class WarmUpError(Exception):
    """A function can't be made ready; the text says why."""


class Server:
    """Serves a catalog on one port, from one event loop."""

    def __init__(
        self, catalog: Catalog, machine: Machine, entrance: Entrance, config: Config
    ) -> None:
        """Puts the parts together; `start` opens the port.

        Args:
            catalog: The functions.
            machine: Runs them; it is the server's from now on.
            entrance: Who may come in, and how.
            config: The settings.
        """
        self._config = config
        self._credentials = entrance.credentials
        self._executor, self._scheduler = machine.executor, machine.scheduler
        self._quarantine = machine.quarantine
        self._is_serving, self._is_able = False, True
        machine.when_able(self._set_able)
        self._metrics: MetricsPort | None = None
        self._warming: asyncio.Task[None] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._warm_ups = [
            (function, warm_up)
            for function in catalog.functions
            for warm_up in function.warm_up
        ]
        self._health = probes.Health(_SERVICES)
        self._telemetry = entrance.telemetry
        self._server = grpc.aio.server(
            interceptors=[self._telemetry.interceptor] if self._telemetry else None,
            options=[
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                # What is sent is bounded by jacserve itself.
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would silently share its callers.
                ("grpc.so_reuseport", 0),
                # A flood of one client waits there, not in our event loop.
                ("grpc.max_concurrent_streams", config.max_streams),
                # Else calls at that very limit are reset, not held back.
                ("grpc.http.overload_protection", 0),
                # One more is closed before anything is read from it.
                ("grpc.max_allowed_incoming_connections", config.max_connections),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                *KEEPALIVE,
                *_lifetimes(config),
                # Beyond the first, more headers make a refusal ever more likely.
                ("grpc.max_metadata_size", _METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
            ],
        )
        observer: Observer = CallObserver(self._scheduler.tallies)
        if self._telemetry is not None:
            observer = TracingObserver(observer, self._telemetry)
        boundary = self._boundary = Boundary(entrance.gate, observer)
        streams = Streams(
            max_per_client=config.max_identity_streams, idle_s=config.stream_idle_s
        )
        self._service = JacobianService(
            catalog,
            self._scheduler,
            machine.describe,
            config.max_payload_bytes,
            boundary,
            streams,
            max_rank=config.max_rank,
            session_idle_s=config.session_idle_s,
        )
        self._jobs = JobService(
            partial(_open_desk, catalog, machine, config), boundary, streams
        )
        self._overview = Overview(
            machine,
            is_serving=lambda: self._is_healthy,
            streams=lambda: streams.count,
            jobs=self._jobs.counts,
        )
        admin = AdminService(self._overview, self._release, boundary)
        add_to_server(self._service, self._server, boundary)
        admin_service.add_to_server(admin, self._server, boundary)
        job_service.add_to_server(self._jobs, self._server, boundary)
        to_all = Boundary(OpenGate(), observer)
        probes.add_health(
            self._health, self._server, to_all if config.open_health else boundary
        )
        probes.add_reflection(
            (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME),
            self._server,
            to_all if config.open_reflection else boundary,
            streams,
        )

    async def start(self) -> str:
        """Opens the port, answers calls, and warms up; healthy only after that.

        Returns:
            The address to call, such as "127.0.0.1:50051".

        Raises:
            AddressError: The address can't be listened on.
            WarmUpError: A function can't be made ready.
        """
        host, port = self._config.host.strip("[]"), self._config.port
        address = f"[{host}]" if ":" in host else host
        try:
            _try_to_bind(host, port)
            bound = self._add_port(f"{address}:{port}")
        except (OSError, RuntimeError) as error:
            self._executor.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise AddressError(
                f"can't listen on {address}:{port}: {reason}. Pass another --port, or "
                "0 for a free one; --host takes an address of this machine."
            ) from error
        try:
            self._metrics = await self._open_metrics()
            await self._server.start()
            for function, warm_up in self._warm_ups:
                await self._warm_up(function.spec, first_work(function.spec, warm_up))
        except BaseException:  # It was cancelled, or can't be made ready.
            await self._server.stop(None)
            await self._close_metrics()
            self._executor.close()
            raise
        self._is_serving = True
        self._tell_health()
        self._warming = asyncio.create_task(self._warm_up_further())
        self._resuming = asyncio.create_task(self._resume_jobs())
        return f"{address}:{bound}"

    @property
    def _is_healthy(self) -> bool:
        return self._is_serving and self._is_able

    def _set_able(self, is_able: bool) -> None:
        self._is_able = is_able
        self._tell_health()

    def _tell_health(self) -> None:
        self._health.set(is_serving=self._is_healthy)

    def _release(self, name: str) -> pb.Function:
        found = self._service.describe(name)
        self._quarantine.release(found.name.removeprefix("functions/"))
        return self._service.describe(name)

    def _add_port(self, address: str) -> int:
        if self._credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._credentials)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus is answered; "" where it is not."""
        return "" if self._metrics is None else self._metrics.url

    async def _open_metrics(self) -> "MetricsPort | None":
        host, port = self._config.metrics_host.strip("[]"), self._config.metrics_port
        if port is None:
            return None
        from jacserve_server.metrics import MetricsPort

        loop = asyncio.get_running_loop()
        try:
            opened = MetricsPort(self._overview, loop, host=host, port=port)
        except OSError as error:
            raise AddressError(
                f"can't answer Prometheus on {host}:{port}: "
                f"{error.strerror or error}. Pass another --metrics-port, or 0 for a "
                "free one; metrics_host takes an address of this machine."
            ) from error
        _log.info("metrics are on %s", opened.url)
        return opened

    async def _close_metrics(self) -> None:
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)

    async def _warm_up(self, function: FunctionSpec, work: Work) -> None:
        try:
            await self._scheduler.submit(work)
        except ServiceError as error:
            raise WarmUpError(
                f"{function.resource} can't be warmed up: {error.message}"
            ) from error

    async def _warm_up_further(self) -> None:
        for function, warm_up in self._warm_ups:
            for work in further_work(function.spec, warm_up):
                try:
                    await self._warm_up(function.spec, work)
                except WarmUpError as error:
                    _log.warning("%s", error)
            await self._measure_gain(function, warm_up)

    async def _measure_gain(
        self, function: RegisteredFunction, warm_up: WarmUp
    ) -> None:
        bucket = bucket_for(warm_up.batch) or 1
        most = min(self._config.max_coalesced, bucket)
        if most == 1 or not function.batchable:
            return
        resource = function.spec.resource
        try:
            point = single_point(function.spec, warm_up)
            gain = await self._scheduler.measure_gain(point, most)
        except ServiceError as error:
            _log.warning("%s can't be timed: %s", resource, error.message)
            return
        if gain is not None:
            largest = gain.largest
            _log.info("%s: up to %d points are computed together", resource, largest)

    async def _resume_jobs(self) -> None:
        """Opens the table of jobs, unless there has never been a job."""
        if self._config.jobs_database is None and not self._config.jobs_dir.exists():
            return
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                await self._jobs.desk()
                return
            except ServiceError as error:
                _log.warning("no jobs are run: %s", error.message)
                if error.reason != "STORAGE_UNAVAILABLE":
                    return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_RETRY_S)

    async def ended(self) -> None:
        """Waits until nothing is answered any more: told to stop, or by a fault.

        To cancel it keeps gRPC from stopping.
        """
        with suppress(Exception):  # It has logged it.
            await self._server.wait_for_termination()

    async def stop(self) -> bool:
        """Drains: not ready, then refusing; what runs may finish within the grace.

        Returns:
            Whether all that ran has finished. What has not can't be stopped: its
            threads end with it, or with the process.
        """
        self._is_serving = False
        self._tell_health()
        # Callers that go by health turn away now, and none of them is refused.
        await asyncio.sleep(self._config.drain_delay_s)
        deadline = time.monotonic() + self._config.grace_s
        for task in (self._warming, self._resuming):
            if task is not None:
                task.cancel()
        draining = asyncio.gather(self._jobs.stop(), self._scheduler.drain())
        self._service.close_sessions()
        await self._quiet(min(_MOST_REFUSING_S, self._config.grace_s))
        self._health.close()
        # It tells all connections to go elsewhere, at once. A drained call has its
        # answer, but may not have sent all of it yet.
        left = max(deadline - time.monotonic(), 0.1)
        closing = asyncio.create_task(self._server.stop(grace=left))
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                await draining
            is_drained = True
        except TimeoutError:
            is_drained = False
        await closing
        await self._jobs.close()
        self._executor.close()
        await self._close_metrics()
        if self._telemetry is not None:
            await asyncio.to_thread(self._telemetry.close)
        return is_drained

    async def _quiet(self, most_s: float) -> None:
        """Waits until no calls arrive: to stop cancels those not taken up yet.

        Those that come meanwhile are refused as UNAVAILABLE, and so tried again.
        """
        end, quiet = time.monotonic() + most_s, 0
        while quiet < _QUIET_TICKS and time.monotonic() < end:
            before, start = self._boundary.arrivals, time.monotonic()
            await asyncio.sleep(_TICK_S)
            # An event loop that lags has not taken up all that is there.
            is_prompt = time.monotonic() - start < 2 * _TICK_S
            is_quiet = is_prompt and self._boundary.arrivals == before
            quiet = quiet + 1 if is_quiet else 0


def _open_desk(catalog: Catalog, machine: Machine, config: Config) -> Any:
    """Opens the desk of jobs; what it needs is imported when it is needed."""
    try:
        from jacserve_server.jobs.desk import JobDesk, TableError
    except ModuleNotFoundError as error:
        raise ServiceError(
            "NOT_INSTALLED",
            f"the server has no {error.name}, which jobs need. Install "
            '"jacserve[jobs]" there.',
        ) from error
    try:
        return JobDesk(catalog, machine, config)
    except (TableError, OSError) as error:
        cause = str(error)
        if isinstance(error, OSError):  # Its text has the server's folders in it.
            cause = error.strerror or type(error).__name__
        raise ServiceError(
            "STORAGE_UNAVAILABLE",
            f"the server's jobs can't be opened: {cause.rstrip('.')}. Mend its "
            "jobs_dir or its jobs_database.",
        ) from error


def _lifetimes(config: Config) -> Sequence[tuple[str, int]]:
    """Returns the options of gRPC for how long connections last."""
    idle_ms = ("grpc.max_connection_idle_ms", round(config.connection_idle_s * 1e3))
    if config.tls_client_ca is None or not config.tls_client_age_s:
        return (idle_ms,)
    age_ms = round(config.tls_client_age_s * 1e3)
    return (
        idle_ms,
        # An authority that is trusted no more is asked about at handshakes alone.
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", age_ms),
    )


def _try_to_bind(host: str, port: int) -> None:
    """Raises the OSError that gRPC would only write to stderr."""
    [(family, kind, _, _, address), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    )
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
