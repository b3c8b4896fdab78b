"""The devices of this machine, as a server's settings have them used."""

from dataclasses import dataclass
from functools import partial

from jacserve_server.catalog import Catalog
from jacserve_server.config import Config
from jacserve_server.executor import (
    Executor,
    default_threads,
    find_devices,
    memory_budget,
)
from jacserve_server.measurements import Measurements
from jacserve_server.programs import Limits, Program
from jacserve_server.scheduler import Scheduler


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """Runs programs.

    Attributes:
        executor: Compiles and runs them.
        scheduler: Has them run in turn.
        measurements: What was measured of the functions on such a device.
        device_kind: The kind of its devices, such as "cpu".
        slots: How many programs run at once, on all devices together.
    """

    executor: Executor
    scheduler: Scheduler[Program]
    measurements: Measurements
    device_kind: str
    slots: int


def build_machine(catalog: Catalog, config: Config) -> Machine:
    """Puts the parts together; nothing runs yet.

    Args:
        catalog: The functions.
        config: The settings.

    Returns:
        The machine.

    Raises:
        DeviceError: A device is not there.
    """
    devices = find_devices(config.device)
    device, *others = devices
    threads = config.device_threads or default_threads(devices)
    measurements = Measurements.load(config.cache_dir)
    executor = Executor(
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
        compile_budget_s=config.compile_budget_s,
    )
    scheduler = Scheduler(
        executor,
        slots=threads,
        max_queries=config.max_queries,
        max_bytes=config.max_queued_bytes,
        shard_rows=config.shard_rows,
        max_client_queries=config.max_identity_queries,
        max_client_bytes=config.max_identity_bytes,
    )
    kind = device.device_kind
    return Machine(executor, scheduler, measurements, kind, threads * len(devices))
