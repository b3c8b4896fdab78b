"""The devices of this machine, as a server's settings have them used."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server.catalog import Catalog
from jacserve_server.compile_turns import CompileBudgets
from jacserve_server.config import Config
from jacserve_server.executor import (
    Device,
    Executor,
    default_threads,
    find_devices,
    memory_budget,
)
from jacserve_server.isolation.opening import OpenedWorker, open_worker
from jacserve_server.isolation.quarantine import Quarantine
from jacserve_server.isolation.router import AnyExecutor, Router
from jacserve_server.isolation.supervisor import WorkerState
from jacserve_server.measurements import Measurements
from jacserve_server.messages import encode_function
from jacserve_server.programs import Limits
from jacserve_server.scheduler import Scheduler
from jacserve_server.signature import FunctionSpec


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """Runs programs.

    Attributes:
        executor: Compiles and runs them.
        scheduler: Has them run in turn.
        measurements: What was measured of the functions on such a device.
        device_kind: The kind of its devices, such as "cpu".
        slots: How many programs of one function run at once, on all devices together.
        isolated: The functions that run in a worker process, by qualified name.
        quarantine: Those that are not run any more.
        workers: Tells how the worker processes are.
        when_able: Has a function told that nothing can be run any more, and that it can
            again.
    """

    executor: AnyExecutor
    scheduler: Scheduler[Any]
    measurements: Measurements
    device_kind: str
    slots: int
    isolated: frozenset[str]
    quarantine: Quarantine
    workers: Callable[[], list[WorkerState]]
    when_able: Callable[[Callable[[bool], None]], None]

    def describe(self, spec: FunctionSpec) -> pb.Function:
        """Returns what clients are told of a function.

        Args:
            spec: All that is known of it.
        """
        name = spec.qualified_name
        return encode_function(
            spec,
            self.measurements.of(name, self.device_kind),
            is_isolated=name in self.isolated,
            quarantine_reason=self.quarantine.reason(name),
        )


async def build_machine(catalog: Catalog, config: Config) -> Machine:
    """Puts the parts together, and starts the worker process, where there is one.

    Args:
        catalog: The functions.
        config: The settings.

    Returns:
        The machine.

    Raises:
        DeviceError: A device is not there.
        RegistrationError: A worker process does not find the functions.
        StartError: A worker process can't be started.
    """
    isolates_all = config.isolation == "process"
    isolated = frozenset(
        function.spec.qualified_name
        for function in catalog.functions
        if isolates_all or function.is_isolated
    )
    measurements = Measurements.load(config.cache_dir)
    quarantine = Quarantine()
    # Whatever runs there, a client has one.
    budgets = CompileBudgets(config.compile_budget_s)
    # Where all is isolated, the devices are the worker's alone.
    devices = [] if isolates_all else find_devices(config.device)
    worker = None
    if isolated:
        worker = await open_worker(catalog, config, quarantine, budgets)
    if devices:
        kind, count = devices[0].device_kind, len(devices)
        threads = config.device_threads or default_threads(devices)
        own = _own_executor(catalog, config, measurements, devices, threads, budgets)
    else:
        assert worker is not None  # A catalog is never empty.
        ready = worker.ready
        kind, count, threads = ready.device_kind, len(ready.devices), ready.threads
        own = None
    executor = _joined(own, worker, isolated)
    needs_worker = len(isolated) == len(catalog.functions)
    scheduler = Scheduler[Any](
        executor,
        slots=threads,
        max_queries=config.max_queries,
        max_bytes=config.max_queued_bytes,
        max_payload_bytes=config.max_payload_bytes,
        shard_rows=config.shard_rows,
        max_client_queries=config.max_identity_queries,
        max_client_bytes=config.max_identity_bytes,
        devices=count,
    )
    return Machine(
        executor,
        scheduler,
        measurements,
        kind,
        threads * count,
        isolated,
        quarantine,
        lambda: [] if worker is None else [worker.supervisor.state()],
        worker.supervisor.when_able if worker and needs_worker else lambda _: None,
    )


def _own_executor(
    catalog: Catalog,
    config: Config,
    measurements: Measurements,
    devices: list[Device],
    threads: int,
    budgets: CompileBudgets,
) -> Executor:
    device, *others = devices
    return Executor(
        catalog.find,
        device,
        others=others,
        threads=threads,
        compile_threads=config.compile_threads,
        max_programs=config.max_programs,
        limits=Limits(
            result_bytes=config.max_payload_bytes,
            program_bytes=config.max_program_bytes or memory_budget(devices),
        ),
        measured=partial(measurements.find, device=device.device_kind),
        max_owned_programs=config.max_identity_programs,
        compile_budgets=budgets,
    )


def _joined(
    own: Executor | None, worker: OpenedWorker | None, isolated: frozenset[str]
) -> AnyExecutor:
    if worker is None:
        assert own is not None
        return own
    if own is None:
        return worker.executor
    return Router(own, worker.executor, isolated.__contains__)
