"""How a server is, all of it at once: its status, as the contract has it."""

import asyncio
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version

from google.protobuf.timestamp_pb2 import Timestamp

from jacserve.v1 import admin_pb2 as pb
from jacserve_server.errors import ServiceError
from jacserve_server.isolation.process import resident_bytes
from jacserve_server.isolation.supervisor import WorkerState
from jacserve_server.machine import Machine
from jacserve_server.tallies import Histogram, Tallies, quantile

# What concerns single functions.
QUERY_METHODS = ("GetSparsity", "Evaluate", "EvaluateStream", "Session")
# The table of jobs may be on another machine, and whoever asks how this one is must
# not wait for that.
_PATIENCE_S = 1.0
_log = logging.getLogger(__name__)


class Overview:
    """Tells how a server is. Used from its event loop."""

    def __init__(
        self,
        machine: Machine,
        *,
        is_serving: Callable[[], bool],
        streams: Callable[[], int],
        jobs: Callable[[], Awaitable[Mapping[str, int]]],
    ) -> None:
        """Keeps where to look.

        Args:
            machine: The devices, and what they do.
            is_serving: Tells whether health says SERVING.
            streams: Tells how many streams are open.
            jobs: Counts jobs by state; may raise ServiceError.
        """
        self._machine = machine
        self._is_serving = is_serving
        self._streams = streams
        self._jobs = jobs
        self._start_ns = time.time_ns()
        self._version = version("jacserve")

    @property
    def tallies(self) -> Tallies:
        """The counts since the start."""
        return self._machine.scheduler.tallies

    def workers(self) -> list[WorkerState]:
        """Returns how the processes are that isolated functions run in."""
        return self._machine.workers()

    async def status(self) -> pb.ServerStatus:
        """Returns how the server is now."""
        jobs = await self._counted_jobs()
        executor, scheduler = self._machine.executor, self._machine.scheduler
        load, programs = scheduler.load, executor.programs
        start_time = Timestamp()
        start_time.FromNanoseconds(self._start_ns)
        return pb.ServerStatus(
            version=self._version,
            start_time=start_time,
            is_serving=self._is_serving(),
            devices=[
                pb.DeviceStatus(
                    name=device.name,
                    kind=device.kind,
                    slot_count=load.slots,
                    running_count=running,
                    used_bytes=device.used_bytes,
                    limit_bytes=device.limit_bytes,
                )
                for device, running in zip(
                    executor.devices(), load.running, strict=True
                )
            ],
            load=pb.LoadStatus(
                query_count=load.in_flight.queries,
                max_query_count=load.most.queries,
                size_bytes=load.in_flight.size_bytes,
                max_size_bytes=load.most.size_bytes,
                waiting_count=load.waiting,
                background_count=load.background,
                stream_count=self._streams(),
            ),
            programs=pb.ProgramsStatus(
                count=programs.count,
                max_count=programs.most,
                hit_count=self.tallies.program_hits,
                miss_count=self.tallies.program_misses,
                compile_seconds=programs.compile_s,
            ),
            jobs=jobs,
            functions=_functions(self.tallies, self._machine.quarantine.reasons),
            identities=[
                pb.IdentityStatus(
                    identity=client,
                    query_count=share.queries,
                    size_bytes=share.size_bytes,
                )
                for client, share in load.shares.items()
            ],
            workers=[
                pb.WorkerStatus(
                    device=worker.device,
                    process_id=worker.process_id,
                    start_count=worker.start_count,
                    last_failure=worker.last_failure,
                    resident_bytes=worker.resident_bytes,
                )
                for worker in self.workers()
            ],
            calls=_calls(self.tallies),
            resident_bytes=resident_bytes(os.getpid()),
        )

    async def _counted_jobs(self) -> Mapping[str, int]:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._jobs()
        except (ServiceError, TimeoutError) as error:
            _log.debug("jobs can't be counted: %s", error)
            return {}


def _calls(tallies: Tallies) -> Mapping[str, int]:
    codes: Counter[str] = Counter()
    for (_, _, code, _), count in tallies.calls.items():
        codes[code] += count
    return codes


def _functions(
    tallies: Tallies, quarantined: Mapping[str, str]
) -> list[pb.FunctionStatus]:
    found: dict[str, pb.FunctionStatus] = {}

    def status(function: str) -> pb.FunctionStatus:
        if function not in found:
            found[function] = pb.FunctionStatus(name=f"functions/{function}")
        return found[function]

    for (method, function, code, _), count in tallies.calls.items():
        if function and method in QUERY_METHODS:
            status(function).query_count += count
            status(function).error_count += count if code != "OK" else 0
    for function, computed in tallies.computed.items():
        status(function).point_count = computed.points
        status(function).execute_seconds = computed.device_s
    for function, reason in quarantined.items():
        status(function).quarantine_reason = reason
    seconds: defaultdict[str, list[Histogram]] = defaultdict(list)
    for (method, function), histogram in tallies.seconds.items():
        if function in found and method in QUERY_METHODS:
            seconds[function].append(histogram)
    for function, histograms in seconds.items():
        status(function).p50_seconds = quantile(histograms, 0.5)
        status(function).p99_seconds = quantile(histograms, 0.99)
    return sorted(found.values(), key=lambda each: (-each.query_count, each.name))
