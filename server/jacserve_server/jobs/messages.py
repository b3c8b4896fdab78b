"""Jobs as messages of the contract."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from jacserve.v1 import jobs_pb2
from jacserve_server.errors import ServiceError
from jacserve_server.jobs.records import JobRecord
from jacserve_server.jobs.requests import spec_of
from jacserve_server.jobs.states import FINAL, STATES, JobState

_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000
_EVERYBODY = "-"

_NUMBERS: Mapping[JobState, jobs_pb2.JobState] = MappingProxyType(
    {
        "queued": jobs_pb2.JOB_STATE_QUEUED,
        "running": jobs_pb2.JOB_STATE_RUNNING,
        "succeeded": jobs_pb2.JOB_STATE_SUCCEEDED,
        "failed": jobs_pb2.JOB_STATE_FAILED,
        "cancelled": jobs_pb2.JOB_STATE_CANCELLED,
    }
)
_STATES: dict[int, JobState] = {number: state for state, number in _NUMBERS.items()}


def encode_job(record: JobRecord) -> jobs_pb2.Job:
    """Encodes a job.

    Args:
        record: What is known of it.

    Returns:
        The message.
    """
    is_running = record.state == "running"
    progress = jobs_pb2.JobProgress(
        point_count=record.point_count,
        done_count=record.done_count,
        ready_count=record.ready_count,
        non_finite_count=record.non_finite_count,
        first_non_finite=record.first_non_finite,
        points_per_second=record.points_per_s if is_running else 0.0,
        execute_seconds=record.execute_s,
    )
    if is_running and record.points_per_s > 0:
        left_s = (record.point_count - record.done_count) / record.points_per_s
        _set(progress.estimated_end_time, time.time() + left_s)
    job = jobs_pb2.Job(
        name=f"jobs/{record.job_id}",
        query=spec_of(record.request).query,
        state=_NUMBERS[record.state],
        progress=progress,
        batch_size=record.batch_size or 0,
        chunk_size=record.chunk_size or 0,
        output=record.output,
        owner=record.identity,
    )
    if record.error is not None:
        job.error.CopyFrom(status_pb2.Status.FromString(record.error))
    _set(job.create_time, record.created_at)
    _set(job.update_time, record.updated_at)
    if record.started_at is not None:
        _set(job.start_time, record.started_at)
    if record.ended_at is not None:
        _set(job.end_time, record.ended_at)
        if record.state in FINAL:
            _set(job.expire_time, record.ended_at + record.ttl_s)
    if record.retry_at is not None and record.state == "queued":
        _set(job.retry_time, record.retry_at)
    return job


def _set(timestamp: Timestamp, seconds: float) -> None:
    """Sets a time; one beyond the year 9999 is that year's end."""
    timestamp.FromNanoseconds(int(min(seconds, 253402300799.0) * 1e9))


@dataclass(frozen=True, slots=True)
class Page:
    """Which jobs to list.

    Attributes:
        states: Only those in these states; all where there is none.
        before: Only those after this one in the list: its created_at and uid.
        size: How many at most.
        identity: Only those that it has made; None for all.
    """

    states: tuple[JobState, ...]
    before: tuple[float, str] | None
    size: int
    identity: str | None


def read_page(request: jobs_pb2.ListJobsRequest, owner: str) -> Page:
    """Reads which jobs to list.

    Args:
        request: The message.
        owner: Whose; "-" for all.

    Returns:
        The page.

    Raises:
        ServiceError: A field has no valid value.
    """
    size, token = request.page_size, request.page_token
    if size < 0:
        raise ServiceError(
            "MALFORMED_REQUEST",
            f"page_size is {size}. Pass 1 to {_LARGEST_PAGE}, or 0 for "
            f"{_DEFAULT_PAGE}.",
            field="page_size",
            page_size=size,
        )
    before = None
    if token:
        match = re.fullmatch(r"(\d{1,12}\.\d{1,9})-([0-9a-f]{32})", token, re.ASCII)
        if match is None:
            raise ServiceError(
                "MALFORMED_REQUEST",
                "page_token is not one that this server gave out. Pass the "
                "next_page_token of the page before, or nothing for the first.",
                field="page_token",
            )
        before = float(match[1]), match[2]
    for place, number in enumerate(request.states):
        if number not in _STATES:
            raise ServiceError(
                "MALFORMED_REQUEST",
                f"states has {number}, which is unspecified or unknown to this "
                f"server. Name some of {', '.join(STATES)}.",
                field=f"states[{place}]",
                number=number,
            )
    states: list[JobState] = [
        _STATES[number] for number in dict.fromkeys(request.states)
    ]
    limit = min(size or _DEFAULT_PAGE, _LARGEST_PAGE)
    return Page(tuple(states), before, limit, None if owner == _EVERYBODY else owner)


def encode_page(records: Sequence[JobRecord], size: int) -> jobs_pb2.ListJobsResponse:
    """Encodes a page of jobs.

    Args:
        records: The jobs, and one more where there is another page.
        size: How many jobs a page has.

    Returns:
        The message.
    """
    page = jobs_pb2.ListJobsResponse(jobs=map(encode_job, records[:size]))
    if len(records) > size:
        last = records[size - 1]
        # As many digits as tell times apart.
        page.next_page_token = f"{last.created_at!r}-{last.uid}"
    return page
