import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from jacserve.v1 import jacobian_pb2 as _jacobian_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseFunctionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ServerStatus(_message.Message):
    __slots__ = ("version", "start_time", "is_serving", "devices", "load", "programs", "jobs", "functions", "identities", "workers", "calls", "resident_bytes")
    class JobsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class CallsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    FUNCTIONS_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    start_time: _timestamp_pb2.Timestamp
    is_serving: bool
    devices: _containers.RepeatedCompositeFieldContainer[DeviceStatus]
    load: LoadStatus
    programs: ProgramsStatus
    jobs: _containers.ScalarMap[str, int]
    functions: _containers.RepeatedCompositeFieldContainer[FunctionStatus]
    identities: _containers.RepeatedCompositeFieldContainer[IdentityStatus]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    calls: _containers.ScalarMap[str, int]
    resident_bytes: int
    def __init__(self, version: _Optional[str] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., is_serving: bool = ..., devices: _Optional[_Iterable[_Union[DeviceStatus, _Mapping]]] = ..., load: _Optional[_Union[LoadStatus, _Mapping]] = ..., programs: _Optional[_Union[ProgramsStatus, _Mapping]] = ..., jobs: _Optional[_Mapping[str, int]] = ..., functions: _Optional[_Iterable[_Union[FunctionStatus, _Mapping]]] = ..., identities: _Optional[_Iterable[_Union[IdentityStatus, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., calls: _Optional[_Mapping[str, int]] = ..., resident_bytes: _Optional[int] = ...) -> None: ...

class DeviceStatus(_message.Message):
    __slots__ = ("name", "kind", "slot_count", "running_count", "used_bytes", "limit_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    slot_count: int
    running_count: int
    used_bytes: int
    limit_bytes: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., slot_count: _Optional[int] = ..., running_count: _Optional[int] = ..., used_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ...) -> None: ...

class LoadStatus(_message.Message):
    __slots__ = ("query_count", "max_query_count", "size_bytes", "max_size_bytes", "waiting_count", "background_count", "stream_count")
    QUERY_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_QUERY_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_COUNT_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_COUNT_FIELD_NUMBER: _ClassVar[int]
    STREAM_COUNT_FIELD_NUMBER: _ClassVar[int]
    query_count: int
    max_query_count: int
    size_bytes: int
    max_size_bytes: int
    waiting_count: int
    background_count: int
    stream_count: int
    def __init__(self, query_count: _Optional[int] = ..., max_query_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., max_size_bytes: _Optional[int] = ..., waiting_count: _Optional[int] = ..., background_count: _Optional[int] = ..., stream_count: _Optional[int] = ...) -> None: ...

class ProgramsStatus(_message.Message):
    __slots__ = ("count", "max_count", "hit_count", "miss_count", "compile_seconds")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_COUNT_FIELD_NUMBER: _ClassVar[int]
    HIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    MISS_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMPILE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    count: int
    max_count: int
    hit_count: int
    miss_count: int
    compile_seconds: float
    def __init__(self, count: _Optional[int] = ..., max_count: _Optional[int] = ..., hit_count: _Optional[int] = ..., miss_count: _Optional[int] = ..., compile_seconds: _Optional[float] = ...) -> None: ...

class FunctionStatus(_message.Message):
    __slots__ = ("name", "query_count", "error_count", "point_count", "execute_seconds", "p50_seconds", "p99_seconds", "quarantine_reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    QUERY_COUNT_FIELD_NUMBER: _ClassVar[int]
    ERROR_COUNT_FIELD_NUMBER: _ClassVar[int]
    POINT_COUNT_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    P50_SECONDS_FIELD_NUMBER: _ClassVar[int]
    P99_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    query_count: int
    error_count: int
    point_count: int
    execute_seconds: float
    p50_seconds: float
    p99_seconds: float
    quarantine_reason: str
    def __init__(self, name: _Optional[str] = ..., query_count: _Optional[int] = ..., error_count: _Optional[int] = ..., point_count: _Optional[int] = ..., execute_seconds: _Optional[float] = ..., p50_seconds: _Optional[float] = ..., p99_seconds: _Optional[float] = ..., quarantine_reason: _Optional[str] = ...) -> None: ...

class IdentityStatus(_message.Message):
    __slots__ = ("identity", "query_count", "size_bytes")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    QUERY_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    identity: str
    query_count: int
    size_bytes: int
    def __init__(self, identity: _Optional[str] = ..., query_count: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("device", "process_id", "start_count", "last_failure", "resident_bytes")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    START_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    device: str
    process_id: int
    start_count: int
    last_failure: str
    resident_bytes: int
    def __init__(self, device: _Optional[str] = ..., process_id: _Optional[int] = ..., start_count: _Optional[int] = ..., last_failure: _Optional[str] = ..., resident_bytes: _Optional[int] = ...) -> None: ...
