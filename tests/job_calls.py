"""Calls of JobService as messages, also such as a client would not send."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import grpc
import numpy as np
from google.rpc import error_details_pb2

from jacserve import tensors
from jacserve.connection import connection
from jacserve.errors import translated
from jacserve.queries import EvaluateOptions, Inputs, QueryEncoder
from jacserve.results import Result, decode_opened
from jacserve.streaming import Assembly, parts, read_head
from jacserve.v1 import jobs_pb2 as pb, jobs_pb2_grpc as pb_grpc
from jacserve.vocabulary import Quantity
from job_functions import JOB

QUEUED, RUNNING = pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING
SUCCEEDED, FAILED = pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED
CANCELLED = pb.JOB_STATE_CANCELLED
FINAL = (SUCCEEDED, FAILED, CANCELLED)
PATIENCE_S = 60.0


def upload(
    job_id: str,
    function: str,
    inputs: Inputs,
    quantities: Quantity | tuple[Quantity, ...] = "jacobian",
    *,
    options: EvaluateOptions | None = None,
    **spec: Any,
) -> list[bytes]:
    """The parts of a CreateJob."""
    ask = QueryEncoder().encode(function, inputs, quantities, options or {})
    head = pb.JobSpec(job_id=job_id, query=ask.form.query, **spec)
    return list(parts(head, [tensors.bytes_of(x) for x in ask.arrays]))


class JobCalls(AbstractContextManager["JobCalls"]):
    """A connection to JobService; its methods raise as a client's do."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._stack = ExitStack()
        # Else it would share the connection of any client in this process.
        options = [
            *connection(target, {}).options,
            ("grpc.use_local_subchannel_pool", 1),
        ]
        channel = self._stack.enter_context(
            grpc.insecure_channel(target, options=options)
        )
        self._stub: Any = pb_grpc.JobServiceStub(channel)
        service = "/jacserve.v1.JobService"
        self._create = channel.stream_unary(
            f"{service}/CreateJob", None, pb.Job.FromString
        )
        self._read = channel.unary_stream(
            f"{service}/ReadJobResult",
            pb.ReadJobResultRequest.SerializeToString,
            None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(self, raws: Iterator[bytes]) -> pb.Job:
        """Creates a job of parts, whatever they are."""
        with translated(self._target):
            return self._create(raws, timeout=PATIENCE_S)

    def sending(self, raws: Iterator[bytes]) -> Any:
        """Begins to create a job of parts; returns the call."""
        return self._create.future(raws, timeout=PATIENCE_S)

    def create(self, *arguments: Any, **options: Any) -> pb.Job:
        """Creates a job; takes what `upload` takes."""
        return self.send(iter(upload(*arguments, **options)))

    def get(self, job_id: str) -> pb.Job:
        return self._call("GetJob", pb.GetJobRequest(name=job_id))

    def list(self) -> list[pb.Job]:
        return [*self._call("ListJobs", pb.ListJobsRequest(page_size=1000)).jobs]

    def cancel(self, job_id: str) -> pb.Job:
        return self._call("CancelJob", pb.CancelJobRequest(name=job_id))

    def delete(self, job_id: str) -> None:
        self._call("DeleteJob", pb.DeleteJobRequest(name=job_id))

    def _call(self, method: str, request: Any) -> Any:
        with translated(self._target):
            return getattr(self._stub, method)(request, timeout=PATIENCE_S)

    def wait(self, job_id: str, *states: Any) -> pb.Job:
        """Returns a job once it has ended, in one of these states."""
        with translated(self._target):
            request = pb.WatchJobRequest(name=job_id)
            job = None
            for news in self._stub.WatchJob(request, timeout=PATIENCE_S):
                job = news.job
        assert job is not None
        assert job.state in (states or (SUCCEEDED,)), job
        return job

    def until(self, job_id: str, is_so: Callable[[pb.Job], Any]) -> pb.Job:
        """Returns a job once something is true of it."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so(job := self.get(job_id)):
            assert time.monotonic() < deadline, job
            time.sleep(0.01)
        return job

    def read(self, job_id: str, start: int = 0, count: int = 0) -> Result:
        request = pb.ReadJobResultRequest(name=job_id, start=start, count=count)
        with translated(self._target):
            first, *others = self._read(request, timeout=PATIENCE_S)
        part, holes = read_head(first, pb.ReadJobResultResponse)
        assembly = Assembly(first, holes)
        for each in others:
            assembly.feed(each)
        assert assembly.is_complete
        is_sparse = bool(part.head.patterns)
        return decode_opened(part.head, assembly.payloads, "csr" if is_sparse else None)


def reason_of(job: pb.Job) -> str:
    """The reason in a job's error, or ""."""
    info = error_details_pb2.ErrorInfo()
    for detail in job.error.details:
        if detail.Unpack(info):
            return info.reason
    return ""


def points(count: int, columns: int, job: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points, and their numbers as job_functions.py counts them."""
    x = np.random.default_rng(1).uniform(0.5, 2.5, size=(count, columns))
    return x, JOB * job + np.arange(count)
