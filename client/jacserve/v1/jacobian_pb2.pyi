import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Quantity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTITY_UNSPECIFIED: _ClassVar[Quantity]
    QUANTITY_VALUE: _ClassVar[Quantity]
    QUANTITY_JACOBIAN: _ClassVar[Quantity]
    QUANTITY_GRADIENT: _ClassVar[Quantity]
    QUANTITY_DETERMINANT: _ClassVar[Quantity]
    QUANTITY_ABS_DETERMINANT: _ClassVar[Quantity]
    QUANTITY_SLOGDET: _ClassVar[Quantity]
    QUANTITY_JVP: _ClassVar[Quantity]
    QUANTITY_VJP: _ClassVar[Quantity]
    QUANTITY_HESSIAN: _ClassVar[Quantity]
    QUANTITY_HVP: _ClassVar[Quantity]
    QUANTITY_NEWTON_STEP: _ClassVar[Quantity]
    QUANTITY_SINGULAR_VALUES: _ClassVar[Quantity]
    QUANTITY_CONDITION_NUMBER: _ClassVar[Quantity]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_AUTO: _ClassVar[Mode]
    MODE_FORWARD: _ClassVar[Mode]
    MODE_REVERSE: _ClassVar[Mode]
    MODE_SPARSE: _ClassVar[Mode]
    MODE_FORWARD_OVER_REVERSE: _ClassVar[Mode]
    MODE_REVERSE_OVER_REVERSE: _ClassVar[Mode]
    MODE_FORWARD_OVER_FORWARD: _ClassVar[Mode]

class Isolation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ISOLATION_UNSPECIFIED: _ClassVar[Isolation]
    ISOLATION_NONE: _ClassVar[Isolation]
    ISOLATION_PROCESS: _ClassVar[Isolation]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_MATRIX: _ClassVar[Layout]
    LAYOUT_BLOCKS: _ClassVar[Layout]
    LAYOUT_CSR: _ClassVar[Layout]
    LAYOUT_COO: _ClassVar[Layout]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_BOOL: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]
    DTYPE_INT16: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]
    DTYPE_UINT8: _ClassVar[DType]
    DTYPE_UINT16: _ClassVar[DType]
    DTYPE_UINT32: _ClassVar[DType]
    DTYPE_UINT64: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT64: _ClassVar[DType]
    DTYPE_COMPLEX64: _ClassVar[DType]
    DTYPE_COMPLEX128: _ClassVar[DType]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    SHAPE_MISMATCH: _ClassVar[ErrorReason]
    DTYPE_MISMATCH: _ClassVar[ErrorReason]
    MALFORMED_TENSOR: _ClassVar[ErrorReason]
    ARGUMENT_MISMATCH: _ClassVar[ErrorReason]
    MALFORMED_REQUEST: _ClassVar[ErrorReason]
    MODE_UNSUPPORTED: _ClassVar[ErrorReason]
    QUANTITY_UNSUPPORTED: _ClassVar[ErrorReason]
    TRACE_FAILED: _ClassVar[ErrorReason]
    FUNCTION_NOT_FOUND: _ClassVar[ErrorReason]
    RESULT_NOT_FINITE: _ClassVar[ErrorReason]
    RESULT_TOO_LARGE: _ClassVar[ErrorReason]
    BATCH_TOO_LARGE: _ClassVar[ErrorReason]
    QUEUE_FULL: _ClassVar[ErrorReason]
    DEVICE_OUT_OF_MEMORY: _ClassVar[ErrorReason]
    SHUTTING_DOWN: _ClassVar[ErrorReason]
    COMPILATION_FAILED: _ClassVar[ErrorReason]
    EXECUTION_FAILED: _ClassVar[ErrorReason]
    UNEXPECTED: _ClassVar[ErrorReason]
    SPARSITY_UNSUPPORTED: _ClassVar[ErrorReason]
    NOT_INSTALLED: _ClassVar[ErrorReason]
    PATTERN_UNKNOWN: _ClassVar[ErrorReason]
    STREAM_REQUIRED: _ClassVar[ErrorReason]
    STREAM_BROKEN: _ClassVar[ErrorReason]
    QUERY_TOO_LARGE: _ClassVar[ErrorReason]
    JOB_NOT_FOUND: _ClassVar[ErrorReason]
    JOB_ALREADY_EXISTS: _ClassVar[ErrorReason]
    JOB_NOT_FINISHED: _ClassVar[ErrorReason]
    TOO_MANY_JOBS: _ClassVar[ErrorReason]
    SOURCE_FORBIDDEN: _ClassVar[ErrorReason]
    SOURCE_UNREADABLE: _ClassVar[ErrorReason]
    STORAGE_UNAVAILABLE: _ClassVar[ErrorReason]
    FUNCTION_CHANGED: _ClassVar[ErrorReason]
    TOKEN_INVALID: _ClassVar[ErrorReason]
    SCOPE_MISSING: _ClassVar[ErrorReason]
    TOO_MANY_STREAMS: _ClassVar[ErrorReason]
    COMPILE_BUDGET_SPENT: _ClassVar[ErrorReason]
    STREAM_IDLE: _ClassVar[ErrorReason]
    TIME_BUDGET_SPENT: _ClassVar[ErrorReason]
    WORKER_DIED: _ClassVar[ErrorReason]
    FUNCTION_QUARANTINED: _ClassVar[ErrorReason]
    WORKER_UNAVAILABLE: _ClassVar[ErrorReason]
QUANTITY_UNSPECIFIED: Quantity
QUANTITY_VALUE: Quantity
QUANTITY_JACOBIAN: Quantity
QUANTITY_GRADIENT: Quantity
QUANTITY_DETERMINANT: Quantity
QUANTITY_ABS_DETERMINANT: Quantity
QUANTITY_SLOGDET: Quantity
QUANTITY_JVP: Quantity
QUANTITY_VJP: Quantity
QUANTITY_HESSIAN: Quantity
QUANTITY_HVP: Quantity
QUANTITY_NEWTON_STEP: Quantity
QUANTITY_SINGULAR_VALUES: Quantity
QUANTITY_CONDITION_NUMBER: Quantity
MODE_UNSPECIFIED: Mode
MODE_AUTO: Mode
MODE_FORWARD: Mode
MODE_REVERSE: Mode
MODE_SPARSE: Mode
MODE_FORWARD_OVER_REVERSE: Mode
MODE_REVERSE_OVER_REVERSE: Mode
MODE_FORWARD_OVER_FORWARD: Mode
ISOLATION_UNSPECIFIED: Isolation
ISOLATION_NONE: Isolation
ISOLATION_PROCESS: Isolation
LAYOUT_UNSPECIFIED: Layout
LAYOUT_MATRIX: Layout
LAYOUT_BLOCKS: Layout
LAYOUT_CSR: Layout
LAYOUT_COO: Layout
DTYPE_UNSPECIFIED: DType
DTYPE_BOOL: DType
DTYPE_INT8: DType
DTYPE_INT16: DType
DTYPE_INT32: DType
DTYPE_INT64: DType
DTYPE_UINT8: DType
DTYPE_UINT16: DType
DTYPE_UINT32: DType
DTYPE_UINT64: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT64: DType
DTYPE_COMPLEX64: DType
DTYPE_COMPLEX128: DType
ERROR_REASON_UNSPECIFIED: ErrorReason
SHAPE_MISMATCH: ErrorReason
DTYPE_MISMATCH: ErrorReason
MALFORMED_TENSOR: ErrorReason
ARGUMENT_MISMATCH: ErrorReason
MALFORMED_REQUEST: ErrorReason
MODE_UNSUPPORTED: ErrorReason
QUANTITY_UNSUPPORTED: ErrorReason
TRACE_FAILED: ErrorReason
FUNCTION_NOT_FOUND: ErrorReason
RESULT_NOT_FINITE: ErrorReason
RESULT_TOO_LARGE: ErrorReason
BATCH_TOO_LARGE: ErrorReason
QUEUE_FULL: ErrorReason
DEVICE_OUT_OF_MEMORY: ErrorReason
SHUTTING_DOWN: ErrorReason
COMPILATION_FAILED: ErrorReason
EXECUTION_FAILED: ErrorReason
UNEXPECTED: ErrorReason
SPARSITY_UNSUPPORTED: ErrorReason
NOT_INSTALLED: ErrorReason
PATTERN_UNKNOWN: ErrorReason
STREAM_REQUIRED: ErrorReason
STREAM_BROKEN: ErrorReason
QUERY_TOO_LARGE: ErrorReason
JOB_NOT_FOUND: ErrorReason
JOB_ALREADY_EXISTS: ErrorReason
JOB_NOT_FINISHED: ErrorReason
TOO_MANY_JOBS: ErrorReason
SOURCE_FORBIDDEN: ErrorReason
SOURCE_UNREADABLE: ErrorReason
STORAGE_UNAVAILABLE: ErrorReason
FUNCTION_CHANGED: ErrorReason
TOKEN_INVALID: ErrorReason
SCOPE_MISSING: ErrorReason
TOO_MANY_STREAMS: ErrorReason
COMPILE_BUDGET_SPENT: ErrorReason
STREAM_IDLE: ErrorReason
TIME_BUDGET_SPENT: ErrorReason
WORKER_DIED: ErrorReason
FUNCTION_QUARANTINED: ErrorReason
WORKER_UNAVAILABLE: ErrorReason

class Function(_message.Message):
    __slots__ = ("name", "documentation", "arguments", "results", "modes", "missing_modes", "preferred_mode", "max_batch", "measured_strategies", "sizes", "quarantine_reason", "isolation")
    class SizesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTATION_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    MISSING_MODES_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_MODE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MEASURED_STRATEGIES_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_REASON_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    documentation: str
    arguments: _containers.RepeatedCompositeFieldContainer[Argument]
    results: _containers.RepeatedCompositeFieldContainer[ResultArray]
    modes: _containers.RepeatedScalarFieldContainer[Mode]
    missing_modes: _containers.RepeatedCompositeFieldContainer[MissingMode]
    preferred_mode: Mode
    max_batch: int
    measured_strategies: _containers.RepeatedCompositeFieldContainer[MeasuredStrategy]
    sizes: _containers.ScalarMap[str, int]
    quarantine_reason: str
    isolation: Isolation
    def __init__(self, name: _Optional[str] = ..., documentation: _Optional[str] = ..., arguments: _Optional[_Iterable[_Union[Argument, _Mapping]]] = ..., results: _Optional[_Iterable[_Union[ResultArray, _Mapping]]] = ..., modes: _Optional[_Iterable[_Union[Mode, str]]] = ..., missing_modes: _Optional[_Iterable[_Union[MissingMode, _Mapping]]] = ..., preferred_mode: _Optional[_Union[Mode, str]] = ..., max_batch: _Optional[int] = ..., measured_strategies: _Optional[_Iterable[_Union[MeasuredStrategy, _Mapping]]] = ..., sizes: _Optional[_Mapping[str, int]] = ..., quarantine_reason: _Optional[str] = ..., isolation: _Optional[_Union[Isolation, str]] = ...) -> None: ...

class Argument(_message.Message):
    __slots__ = ("name", "dtypes", "shape", "differentiable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENTIABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtypes: _containers.RepeatedScalarFieldContainer[DType]
    shape: _containers.RepeatedCompositeFieldContainer[Dimension]
    differentiable: bool
    def __init__(self, name: _Optional[str] = ..., dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., shape: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., differentiable: bool = ...) -> None: ...

class ResultArray(_message.Message):
    __slots__ = ("path", "shape")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    path: _containers.RepeatedCompositeFieldContainer[PathStep]
    shape: _containers.RepeatedCompositeFieldContainer[Dimension]
    def __init__(self, path: _Optional[_Iterable[_Union[PathStep, _Mapping]]] = ..., shape: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ...) -> None: ...

class Dimension(_message.Message):
    __slots__ = ("size", "symbol")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_FIELD_NUMBER: _ClassVar[int]
    size: int
    symbol: str
    def __init__(self, size: _Optional[int] = ..., symbol: _Optional[str] = ...) -> None: ...

class PathStep(_message.Message):
    __slots__ = ("key", "index")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    key: str
    index: int
    def __init__(self, key: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...

class MissingMode(_message.Message):
    __slots__ = ("mode", "reason")
    MODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    reason: str
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class MeasuredStrategy(_message.Message):
    __slots__ = ("inputs", "wrt", "bucket", "mode", "chunk_size", "speedup")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SIZE_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    inputs: str
    wrt: _containers.RepeatedScalarFieldContainer[str]
    bucket: int
    mode: Mode
    chunk_size: int
    speedup: float
    def __init__(self, inputs: _Optional[str] = ..., wrt: _Optional[_Iterable[str]] = ..., bucket: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ..., chunk_size: _Optional[int] = ..., speedup: _Optional[float] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ("function", "inputs", "quantities", "wrt", "mode", "layout", "cast", "require_finite", "tangents", "cotangents", "patterns", "exact")
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    QUANTITIES_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CAST_FIELD_NUMBER: _ClassVar[int]
    REQUIRE_FINITE_FIELD_NUMBER: _ClassVar[int]
    TANGENTS_FIELD_NUMBER: _ClassVar[int]
    COTANGENTS_FIELD_NUMBER: _ClassVar[int]
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    function: str
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    quantities: _containers.RepeatedScalarFieldContainer[Quantity]
    wrt: _containers.RepeatedScalarFieldContainer[str]
    mode: Mode
    layout: Layout
    cast: bool
    require_finite: bool
    tangents: _containers.RepeatedCompositeFieldContainer[Input]
    cotangents: _containers.RepeatedCompositeFieldContainer[Cotangent]
    patterns: _containers.RepeatedScalarFieldContainer[str]
    exact: bool
    def __init__(self, function: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., quantities: _Optional[_Iterable[_Union[Quantity, str]]] = ..., wrt: _Optional[_Iterable[str]] = ..., mode: _Optional[_Union[Mode, str]] = ..., layout: _Optional[_Union[Layout, str]] = ..., cast: bool = ..., require_finite: bool = ..., tangents: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., cotangents: _Optional[_Iterable[_Union[Cotangent, _Mapping]]] = ..., patterns: _Optional[_Iterable[str]] = ..., exact: bool = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("name", "tensor", "source")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensor: Tensor
    source: Source
    def __init__(self, name: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., source: _Optional[_Union[Source, _Mapping]] = ...) -> None: ...

class Cotangent(_message.Message):
    __slots__ = ("path", "tensor", "source")
    PATH_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    path: _containers.RepeatedCompositeFieldContainer[PathStep]
    tensor: Tensor
    source: Source
    def __init__(self, path: _Optional[_Iterable[_Union[PathStep, _Mapping]]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., source: _Optional[_Union[Source, _Mapping]] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("path", "array")
    PATH_FIELD_NUMBER: _ClassVar[int]
    ARRAY_FIELD_NUMBER: _ClassVar[int]
    path: str
    array: str
    def __init__(self, path: _Optional[str] = ..., array: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("function", "outputs", "patterns", "finite", "device", "bucket", "timing", "chunk_size", "measured", "coalesced_count", "finite_points")
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    COALESCED_COUNT_FIELD_NUMBER: _ClassVar[int]
    FINITE_POINTS_FIELD_NUMBER: _ClassVar[int]
    function: str
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    patterns: _containers.RepeatedCompositeFieldContainer[Pattern]
    finite: bool
    device: str
    bucket: int
    timing: Timing
    chunk_size: int
    measured: bool
    coalesced_count: int
    finite_points: Tensor
    def __init__(self, function: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., patterns: _Optional[_Iterable[_Union[Pattern, _Mapping]]] = ..., finite: bool = ..., device: _Optional[str] = ..., bucket: _Optional[int] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., chunk_size: _Optional[int] = ..., measured: bool = ..., coalesced_count: _Optional[int] = ..., finite_points: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("quantity", "path", "tensor", "mode", "pattern")
    QUANTITY_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    quantity: Quantity
    path: _containers.RepeatedCompositeFieldContainer[PathStep]
    tensor: Tensor
    mode: Mode
    pattern: str
    def __init__(self, quantity: _Optional[_Union[Quantity, str]] = ..., path: _Optional[_Iterable[_Union[PathStep, _Mapping]]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., mode: _Optional[_Union[Mode, str]] = ..., pattern: _Optional[str] = ...) -> None: ...

class Pattern(_message.Message):
    __slots__ = ("hash", "row_count", "column_count", "columns", "rows", "row_starts")
    HASH_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    COLUMN_COUNT_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_STARTS_FIELD_NUMBER: _ClassVar[int]
    hash: str
    row_count: int
    column_count: int
    columns: Tensor
    rows: Tensor
    row_starts: Tensor
    def __init__(self, hash: _Optional[str] = ..., row_count: _Optional[int] = ..., column_count: _Optional[int] = ..., columns: _Optional[_Union[Tensor, _Mapping]] = ..., rows: _Optional[_Union[Tensor, _Mapping]] = ..., row_starts: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_duration", "compile_duration", "execute_duration")
    QUEUE_DURATION_FIELD_NUMBER: _ClassVar[int]
    COMPILE_DURATION_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_DURATION_FIELD_NUMBER: _ClassVar[int]
    queue_duration: _duration_pb2.Duration
    compile_duration: _duration_pb2.Duration
    execute_duration: _duration_pb2.Duration
    def __init__(self, queue_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., compile_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., execute_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "streamed_bytes", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STREAMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    streamed_bytes: int
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., streamed_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class EvaluateStreamRequest(_message.Message):
    __slots__ = ("head", "piece")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    head: Query
    piece: Piece
    def __init__(self, head: _Optional[_Union[Query, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ...) -> None: ...

class EvaluateStreamResponse(_message.Message):
    __slots__ = ("head", "piece")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    head: Result
    piece: Piece
    def __init__(self, head: _Optional[_Union[Result, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("tensor", "offset", "data")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    data: bytes
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("id", "timeout", "cancel", "query")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    id: int
    timeout: _duration_pb2.Duration
    cancel: bool
    query: Query
    def __init__(self, id: _Optional[int] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., cancel: bool = ..., query: _Optional[_Union[Query, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("id", "error", "result")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: _status_pb2.Status
    result: Result
    def __init__(self, id: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class ListFunctionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListFunctionsResponse(_message.Message):
    __slots__ = ("functions", "next_page_token")
    FUNCTIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    functions: _containers.RepeatedCompositeFieldContainer[Function]
    next_page_token: str
    def __init__(self, functions: _Optional[_Iterable[_Union[Function, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetFunctionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetSparsityRequest(_message.Message):
    __slots__ = ("name", "sizes", "wrt", "quantity")
    class SizesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    QUANTITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    sizes: _containers.ScalarMap[str, int]
    wrt: _containers.RepeatedScalarFieldContainer[str]
    quantity: Quantity
    def __init__(self, name: _Optional[str] = ..., sizes: _Optional[_Mapping[str, int]] = ..., wrt: _Optional[_Iterable[str]] = ..., quantity: _Optional[_Union[Quantity, str]] = ...) -> None: ...

class Sparsity(_message.Message):
    __slots__ = ("pattern", "color_count", "mode", "inputs")
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    COLOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    pattern: Pattern
    color_count: int
    mode: Mode
    inputs: str
    def __init__(self, pattern: _Optional[_Union[Pattern, _Mapping]] = ..., color_count: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ..., inputs: _Optional[str] = ...) -> None: ...
