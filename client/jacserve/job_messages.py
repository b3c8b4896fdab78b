"""Messages of batch jobs from and to values."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast, get_args

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from jacserve import tensors
from jacserve.errors import (
    CancelledError,
    InvalidRequestError,
    JacobianError,
    ServerError,
    from_status,
    readable,
)
from jacserve.queries import JobInputs, JobOptions, encode_job_query, number_of
from jacserve.streaming import parts
from jacserve.tensors import Array
from jacserve.v1 import jobs_pb2
from jacserve.vocabulary import JOB_STATES, QUANTITIES, JobState, Quantity, word

OnError = Literal["record", "fail"]

_LONGEST_TTL_S = 315_576_000_000  # The most that a Duration may hold.


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is.

    Attributes:
        point_count: The points of the job.
        done_count: Those that are computed, in whatever order.
        ready_count: Those before the first that is not computed: as many can be read.
        non_finite_count: The computed points that gave NaN or Inf.
        first_non_finite: The first of them that is known; None where there is none.
        points_per_s: The points per second of late; 0 while it does not run.
        estimated_end: When it will have ended at that rate; None where that can't be
            told.
        execute_s: The seconds that devices have spent on it.
    """

    point_count: int
    done_count: int
    ready_count: int
    non_finite_count: int
    first_non_finite: int | None
    points_per_s: float
    estimated_end: datetime | None
    execute_s: float

    @property
    def fraction(self) -> float:
        """The share of the points that is computed, from 0 to 1."""
        return self.done_count / self.point_count if self.point_count else 0.0

    @property
    def remaining_s(self) -> float | None:
        """The seconds that it takes yet at this rate; None where that can't be told."""
        remaining_count = self.point_count - self.done_count
        if not remaining_count and self.point_count:
            return 0.0
        return remaining_count / self.points_per_s if self.points_per_s > 0 else None


@dataclass(frozen=True, slots=True)
class JobInfo:
    """What a server says of a job.

    Attributes:
        id: Its id, such as "night-1".
        function: The function and version, such as "spherical@1".
        quantities: What is computed.
        state: "queued", "running", "succeeded", "failed" or "cancelled".
        error: Why it has failed; or, while it is queued, what holds it up. None
            otherwise.
        progress: How far it is.
        batch_size: The points that are computed at once; None until it is known.
        chunk_size: The points that are kept at once; None until it is known.
        output: The Zarr store of the results: a storage root of the server, and a
            path in it.
        created: When it was created.
        started: When it first ran.
        updated: When it last changed.
        ended: When it ended.
        expires: When the server will delete it.
        retries: When the server tries again what is held up.
        owner: Who created it; empty where the server asks nobody who they are.
    """

    id: str
    function: str
    quantities: tuple[Quantity, ...]
    state: JobState
    error: JacobianError | None
    progress: JobProgress
    batch_size: int | None
    chunk_size: int | None
    output: str
    created: datetime | None
    started: datetime | None
    updated: datetime | None
    ended: datetime | None
    expires: datetime | None
    retries: datetime | None
    owner: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it has succeeded, failed or been cancelled."""
        return self.state not in {"queued", "running"}

    @property
    def headline(self) -> str:
        """What matters most, in a few words."""
        return f"{self.id} {self.function} {self.state} {self.progress.fraction:.0%}"

    def raise_unless_succeeded(self) -> None:
        """Raises why there is no whole result of a job that has ended.

        Raises:
            CancelledError: It was cancelled.
            JacobianError: It has failed with this.
        """
        progress = self.progress
        computed = f"{progress.ready_count:,} of {progress.point_count:,} points"
        if self.state == "cancelled":
            raise CancelledError(
                f"job {self.id} was cancelled; the first {computed} are computed. "
                "Read these by their range.",
                code="CANCELLED",
            )
        if self.state == "failed":
            raise self.error or ServerError(
                f"job {self.id} has failed; the first {computed} are computed",
                code="UNKNOWN",
            )


@readable()
def decode_job(message: jobs_pb2.Job, target: str) -> JobInfo:
    """Decodes a job.

    Args:
        message: The job, as a server sent it.
        target: The server's address, for the text of an error.

    Returns:
        The job.

    Raises:
        ServerError: It can't be read.
    """
    progress, query = message.progress, message.query
    has_first = progress.HasField("first_non_finite")
    return JobInfo(
        id=message.name.removeprefix("jobs/"),
        function=query.function.removeprefix("functions/"),
        quantities=tuple(
            cast("Quantity", word(QUANTITIES, number)) for number in query.quantities
        ),
        state=cast("JobState", word(JOB_STATES, message.state)),
        error=from_status(message.error, target) if message.HasField("error") else None,
        progress=JobProgress(
            point_count=progress.point_count,
            done_count=progress.done_count,
            ready_count=progress.ready_count,
            non_finite_count=progress.non_finite_count,
            first_non_finite=progress.first_non_finite if has_first else None,
            points_per_s=progress.points_per_second,
            estimated_end=_time(progress.estimated_end_time),
            execute_s=progress.execute_seconds,
        ),
        batch_size=message.batch_size or None,
        chunk_size=message.chunk_size or None,
        output=message.output,
        created=_time(message.create_time),
        started=_time(message.start_time),
        updated=_time(message.update_time),
        ended=_time(message.end_time),
        expires=_time(message.expire_time),
        retries=_time(message.retry_time),
        owner=message.owner,
    )


def _time(timestamp: Timestamp) -> datetime | None:
    # One that was left out reads as 1970.
    is_set = timestamp.seconds or timestamp.nanos
    return timestamp.ToDatetime(UTC) if is_set else None


@dataclass(frozen=True, slots=True, eq=False)
class JobRequest:
    """A job to create.

    Attributes:
        spec: The hollow message.
        arrays: Those of its arrays that have any bytes.
    """

    spec: jobs_pb2.JobSpec
    arrays: Sequence[Array]

    def to_parts(self) -> Iterator[bytes]:
        """Yields the parts of CreateJob; of a mapped file a piece at a time."""
        return parts(self.spec, list(map(tensors.bytes_of, self.arrays)))


def encode_job(
    function: str,
    inputs: JobInputs,
    quantities: Quantity | Sequence[Quantity],
    options: JobOptions,
    *,
    id: str | None,
    batch_size: int | None,
    output: str | None,
    ttl_s: float | None,
    on_error: OnError,
) -> JobRequest:
    """Makes what creates a job.

    Args:
        function: The function's name.
        inputs: Its points.
        quantities: What to compute.
        options: How to compute it.
        id: Its id; None for a new one, so that the very same can be sent again.
        batch_size: The points to compute at once.
        output: Where the results go.
        ttl_s: Seconds that it is kept after it has ended.
        on_error: Whether NaN and Inf are recorded, or fail the job.

    Returns:
        The request.

    Raises:
        InvalidRequestError: A word, a number or an array can't be sent.
        TypeError: There is no such option, or a value is of the wrong type.
    """
    if on_error not in get_args(OnError):
        raise _refused(
            f"on_error is {on_error!r}. Take one of {', '.join(get_args(OnError))}.",
            "query.require_finite",
        )
    if batch_size is not None and not 0 < batch_size < 2**31:
        raise _refused(
            f"batch_size is {batch_size}. Pass a whole number of points from 1 to "
            "2^31 - 1, or None to have the server measure what is best.",
            "batch_size",
        )
    query, arrays = encode_job_query(
        function, inputs, quantities, options, require_finite=on_error == "fail"
    )
    spec = jobs_pb2.JobSpec(
        job_id=uuid.uuid4().hex if id is None else id,
        query=query,
        batch_size=batch_size or 0,
        output=output or "",
    )
    if ttl_s is not None:
        if not 0 <= ttl_s <= _LONGEST_TTL_S:
            raise _refused(f"ttl_s is {ttl_s}. Pass seconds, 0 or more.", "ttl")
        whole_s = int(ttl_s)
        spec.ttl.CopyFrom(Duration(seconds=whole_s, nanos=int((ttl_s - whole_s) * 1e9)))
    return JobRequest(spec, arrays)


def _refused(message: str, field: str) -> InvalidRequestError:
    return InvalidRequestError(
        message, code="INVALID_ARGUMENT", reason="MALFORMED_REQUEST", field=field
    )


def encode_list_request(
    states: str | Sequence[str], owner: str = ""
) -> jobs_pb2.ListJobsRequest:
    """Makes what asks for the first page of jobs.

    Args:
        states: Only jobs in these; all where none is named.
        owner: Whose; "-" for everybody's, and "" for the caller's own.

    Returns:
        The message.

    Raises:
        InvalidRequestError: There is no such state.
    """
    words = [states] if isinstance(states, str) else states
    return jobs_pb2.ListJobsRequest(
        states=[number_of(JOB_STATES, "states", word) for word in words], owner=owner
    )


def encode_read_request(
    id: str,
    start: int,
    count: int | None,
    quantities: Quantity | Sequence[Quantity] | None,
    owner: str = "",
) -> jobs_pb2.ReadJobResultRequest:
    """Makes what asks for results of a range of points.

    Args:
        id: The job's id.
        start: The first point.
        count: How many; None for all from the first one.
        quantities: Which; None for all of the job's.
        owner: Whose it is; "" for the caller's own.

    Returns:
        The message.

    Raises:
        InvalidRequestError: The range is none, or there is no such quantity.
    """
    if start < 0 or (count is not None and count < 1):
        raise _refused(
            f"the range starts at {start} and has {count} points. Start at 0 or later, "
            "and take 1 or more, or None for all from there.",
            "start" if start < 0 else "count",
        )
    words = [quantities] if isinstance(quantities, str) else quantities or ()
    return jobs_pb2.ReadJobResultRequest(
        name=id,
        owner=owner,
        start=start,
        count=count or 0,
        quantities=[number_of(QUANTITIES, "quantities", word) for word in words],
    )
