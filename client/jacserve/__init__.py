"""Remote Jacobians of functions that a jacserve server has registered.

The client needs numpy, grpcio and protobuf, and nothing else.
"""

from jacserve.async_client import AsyncClient
from jacserve.async_jobs import AsyncJob
from jacserve.checking import Check
from jacserve.client import Client
from jacserve.errors import (
    AccessError,
    CancelledError,
    CapacityError,
    DeadlineError,
    InvalidRequestError,
    JacobianError,
    NonFiniteError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    ServerError,
    UnavailableError,
)
from jacserve.functions import (
    ArgumentInfo,
    FunctionInfo,
    MeasuredStrategy,
    ResultInfo,
    Sparsity,
)
from jacserve.job_messages import JobInfo, JobProgress
from jacserve.job_reading import Chunk
from jacserve.jobs import Job
from jacserve.queries import Source
from jacserve.results import Result, Timing
from jacserve.server_status import (
    DeviceStatus,
    FunctionStatus,
    IdentityStatus,
    LoadStatus,
    ProgramsStatus,
    ServerStatus,
    WorkerStatus,
)
from jacserve.sparse import Pattern, SparseMatrix
from jacserve.vocabulary import JobState, Layout, Mode, ModeOption, Quantity

__all__ = [
    "AccessError",
    "ArgumentInfo",
    "AsyncClient",
    "AsyncJob",
    "CancelledError",
    "CapacityError",
    "Check",
    "Chunk",
    "Client",
    "DeadlineError",
    "DeviceStatus",
    "FunctionInfo",
    "FunctionStatus",
    "IdentityStatus",
    "InvalidRequestError",
    "JacobianError",
    "Job",
    "JobInfo",
    "JobProgress",
    "JobState",
    "Layout",
    "LoadStatus",
    "MeasuredStrategy",
    "Mode",
    "ModeOption",
    "NonFiniteError",
    "NotFoundError",
    "OverloadedError",
    "Pattern",
    "PreconditionError",
    "ProgramsStatus",
    "Quantity",
    "Result",
    "ResultInfo",
    "ServerError",
    "ServerStatus",
    "Source",
    "SparseMatrix",
    "Sparsity",
    "Timing",
    "UnavailableError",
    "WorkerStatus",
]
