"""Starts a worker process as the settings say."""

import sys
from typing import NamedTuple

from jacserve_server.catalog import Catalog
from jacserve_server.compile_turns import CompileBudgets
from jacserve_server.config import Config
from jacserve_server.executor import DeviceError, DeviceState
from jacserve_server.isolation import origins
from jacserve_server.isolation.executor import IsolatedExecutor
from jacserve_server.isolation.process import is_worker
from jacserve_server.isolation.protocol import Ready, Start
from jacserve_server.isolation.quarantine import Quarantine
from jacserve_server.isolation.supervisor import StartError, Supervisor
from jacserve_server.registry import RegistrationError


class OpenedWorker(NamedTuple):
    """A worker that is ready.

    Attributes:
        executor: Runs programs in it.
        supervisor: Keeps it running.
        ready: What it says of itself.
    """

    executor: IsolatedExecutor
    supervisor: Supervisor
    ready: Ready


async def open_worker(
    catalog: Catalog,
    config: Config,
    quarantine: Quarantine,
    compile_budgets: CompileBudgets,
) -> OpenedWorker:
    """Starts a worker process, and waits until it is ready.

    Args:
        catalog: The functions.
        config: The settings.
        quarantine: What functions do to workers is counted there.
        compile_budgets: The seconds of compiling that each client may have.

    Returns:
        The worker.

    Raises:
        DeviceError: A device is not there.
        RegistrationError: A worker process does not find the functions.
        StartError: It can't be started.
    """
    if is_worker():
        raise RegistrationError(
            "a file of functions starts a server when it is imported, which a worker "
            'process does, too. Start it under if __name__ == "__main__".'
        )
    ours = origins.digests(catalog)
    supervisor = Supervisor(
        _start(catalog, config),
        check=lambda ready: origins.check_agreement(
            ours, dict(ready.functions), catalog
        ),
        quarantine=quarantine,
        start_s=config.max_compile_s,
        max_tail_bytes=config.max_payload_bytes,
    )
    try:
        ready = await supervisor.open()
    except StartError as error:
        cause = error.unfit.cause if error.unfit is not None else "other"
        if cause == "device":
            raise DeviceError(str(error)) from error
        if cause == "functions":
            problem = f"in the worker process, {error}"
            raise RegistrationError(problem) from error
        raise
    budgets_s = {
        function.spec.qualified_name: function.max_execute_s or config.max_execute_s
        for function in catalog.functions
    }
    executor = IsolatedExecutor(
        supervisor,
        quarantine,
        devices=[DeviceState(name, ready.device_kind, 0, 0) for name in ready.devices],
        compile_threads=config.compile_threads,
        max_programs=config.max_programs,
        max_compile_s=config.max_compile_s,
        max_execute_s=budgets_s.__getitem__,
        max_owned_programs=config.max_identity_programs,
        compile_budgets=compile_budgets,
    )
    return OpenedWorker(executor, supervisor, ready)


def _start(catalog: Catalog, config: Config) -> Start:
    return Start(
        origins=origins.origins_of(catalog.registries),
        search_path=tuple(sys.path),
        device=config.device,
        device_threads=config.device_threads,
        compile_threads=config.compile_threads,
        max_programs=config.max_programs,
        result_bytes=config.max_payload_bytes,
        program_bytes=config.max_program_bytes,
        cache_dir=str(config.cache_dir.absolute()),
        max_cache_bytes=config.max_cache_bytes,
    )
