"""How a server is, as values."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from jacserve.v1 import admin_pb2


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """A device that a server computes on.

    Attributes:
        name: Its name, such as "gpu:0".
        kind: Its kind, such as "NVIDIA H200".
        slot_count: How many programs may run on it at once.
        running_count: How many run now.
        used_bytes: What JAX has in use there; None where it can't be told.
        limit_bytes: What JAX may use there; likewise.
    """

    name: str
    kind: str
    slot_count: int
    running_count: int
    used_bytes: int | None
    limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class LoadStatus:
    """What is in flight.

    Attributes:
        query_count: Queries that have no answer yet.
        max_query_count: How many there may be.
        size_bytes: Bytes of queries and of large results.
        max_size_bytes: How many there may be.
        waiting_count: Pieces of work that wait for a device.
        background_count: Pieces of work of jobs that wait for a device.
        stream_count: Streams that are open: sessions, uploads and downloads.
    """

    query_count: int
    max_query_count: int
    size_bytes: int
    max_size_bytes: int
    waiting_count: int
    background_count: int
    stream_count: int


@dataclass(frozen=True, slots=True)
class ProgramsStatus:
    """Compiled programs.

    Attributes:
        count: How many are kept.
        max_count: How many may be kept.
        hit_count: Queries that found theirs.
        miss_count: Queries that had to wait for theirs.
        compile_s: Seconds spent on compiling.
    """

    count: int
    max_count: int
    hit_count: int
    miss_count: int
    compile_s: float


@dataclass(frozen=True, slots=True)
class FunctionStatus:
    """What was asked of a function.

    Attributes:
        name: Its name with its version, such as "polar@1".
        query_count: Queries that have ended.
        error_count: Those of them that failed.
        point_count: Points that were computed.
        execute_s: Seconds that devices have spent on it.
        p50_s: An upper bound of the seconds that half of its queries took, from
            arrival to answer; None where there were none.
        p99_s: Of 99 in 100; likewise.
        quarantine_reason: Why it is not run any more; empty where it is.
    """

    name: str
    query_count: int
    error_count: int
    point_count: int
    execute_s: float
    p50_s: float | None
    p99_s: float | None
    quarantine_reason: str


@dataclass(frozen=True, slots=True)
class IdentityStatus:
    """What one caller has in flight.

    Attributes:
        identity: Who: an identity, or an address where nobody has to say who they are.
        query_count: Queries that have no answer yet.
        size_bytes: Their bytes.
    """

    identity: str
    query_count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A process that isolated functions run in.

    Attributes:
        device: The device that it computes on.
        process_id: Its process id; None while it is started anew.
        start_count: How often it was started.
        last_failure: Why it was last killed or died; empty where it never was.
        resident_bytes: Its resident memory; None where it can't be told.
    """

    device: str
    process_id: int | None
    start_count: int
    last_failure: str
    resident_bytes: int | None


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """How a server is, as `Client.status` returns it. Counts are since it started.

    Attributes:
        version: The version of jacserve.
        start_time: When it started.
        is_serving: Whether it takes calls: not before it is ready, nor when it is
            going away.
        devices: The devices that it computes on.
        load: What is in flight.
        programs: Compiled programs.
        jobs: How many there are in each state, such as "running".
        functions: What was asked of each function, the most first.
        identities: Who has something in flight.
        workers: The processes that isolated functions run in.
        calls: Calls that have ended, by status code, such as "OK".
        resident_bytes: Resident memory of its process; None where it can't be told.
    """

    version: str
    start_time: datetime
    is_serving: bool
    devices: tuple[DeviceStatus, ...]
    load: LoadStatus
    programs: ProgramsStatus
    jobs: Mapping[str, int]
    functions: tuple[FunctionStatus, ...]
    identities: tuple[IdentityStatus, ...]
    workers: tuple[WorkerStatus, ...]
    calls: Mapping[str, int]
    resident_bytes: int | None

    @property
    def call_count(self) -> int:
        """The calls that have ended."""
        return sum(self.calls.values())

    @property
    def error_count(self) -> int:
        """Those of them that failed."""
        return self.call_count - self.calls.get("OK", 0)


def decode_status(message: admin_pb2.ServerStatus) -> ServerStatus:
    """Decodes how a server is."""
    load, programs = message.load, message.programs
    return ServerStatus(
        version=message.version,
        start_time=message.start_time.ToDatetime(tzinfo=UTC),
        is_serving=message.is_serving,
        devices=tuple(
            DeviceStatus(
                name=device.name,
                kind=device.kind,
                slot_count=device.slot_count,
                running_count=device.running_count,
                used_bytes=device.used_bytes or None,
                limit_bytes=device.limit_bytes or None,
            )
            for device in message.devices
        ),
        load=LoadStatus(
            query_count=load.query_count,
            max_query_count=load.max_query_count,
            size_bytes=load.size_bytes,
            max_size_bytes=load.max_size_bytes,
            waiting_count=load.waiting_count,
            background_count=load.background_count,
            stream_count=load.stream_count,
        ),
        programs=ProgramsStatus(
            count=programs.count,
            max_count=programs.max_count,
            hit_count=programs.hit_count,
            miss_count=programs.miss_count,
            compile_s=programs.compile_seconds,
        ),
        jobs=dict(message.jobs),
        functions=tuple(
            FunctionStatus(
                name=function.name.removeprefix("functions/"),
                query_count=function.query_count,
                error_count=function.error_count,
                point_count=function.point_count,
                execute_s=function.execute_seconds,
                p50_s=function.p50_seconds or None,
                p99_s=function.p99_seconds or None,
                quarantine_reason=function.quarantine_reason,
            )
            for function in message.functions
        ),
        identities=tuple(
            IdentityStatus(each.identity, each.query_count, each.size_bytes)
            for each in message.identities
        ),
        workers=tuple(
            WorkerStatus(
                device=worker.device,
                process_id=worker.process_id or None,
                start_count=worker.start_count,
                last_failure=worker.last_failure,
                resident_bytes=worker.resident_bytes or None,
            )
            for worker in message.workers
        ),
        calls=dict(message.calls),
        resident_bytes=message.resident_bytes or None,
    )
