"""What the table of jobs keeps of a job, and of each of its chunks."""

from dataclasses import dataclass, field
from uuid import uuid4

from jacserve_server.jobs.states import JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to create.

    Attributes:
        job_id: The client's id for it.
        request: What to compute; opaque to the table.
        digest: Of the request and its points: the same job has the same.
        function: Its function, with a version: "spherical@1".
        point_count: Its points.
        output: Where its results go.
        ttl_s: How long it is kept after it has ended.
        owner: The id of the server that has accepted it.
        identity: Who makes it; "" where nobody has to say who they are.
        uid: Names its files, which may be there before the job is.
    """

    job_id: str
    request: bytes
    digest: str
    function: str
    point_count: int
    output: str
    ttl_s: float
    owner: str
    identity: str = ""
    uid: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is in the table. Times are in seconds since 1970.

    Attributes:
        uid: Names its files; of this job alone, for ever.
        identity: Who has made it; "" where nobody has to say who they are.
        job_id: Their id for it, free again once it is deleted.
        state: Where it is in its life.
        request: What to compute; opaque to the table.
        digest: Of the request and its points: the same job has the same.
        function: Its function, with a version: "spherical@1".
        point_count: Its points.
        batch_size: The points computed at once; None until it is planned.
        chunk_size: The points of a chunk; None until it is planned.
        done_count: The points of its chunks that are committed.
        ready_count: The points before the first that is not committed.
        non_finite_count: The committed points that gave NaN or Inf.
        first_non_finite: The first of them; None where there is none.
        points_per_s: How fast it is of late; 0 while it does not run.
        execute_s: The seconds that devices have spent on its chunks.
        error: A serialized google.rpc.Status: why it failed, or is held up.
        output: Where its results go.
        fingerprint: Of the function it was planned for.
        owner: The id of the server that runs it, has run it to its end, or is the
            first to look at it.
        attempts: How often in a row it was held up.
        strikes: How often since its last chunk it may have been at fault itself: its
            process died, or the memory did not suffice.
        retry_at: When it is tried again; None for at once.
        ttl_s: How long it is kept after it has ended.
        created_at: When it was created.
        started_at: When it first ran.
        updated_at: When it last changed.
        ended_at: When it ended.
    """

    uid: str
    identity: str
    job_id: str
    state: JobState
    request: bytes
    digest: str
    function: str
    point_count: int
    batch_size: int | None
    chunk_size: int | None
    done_count: int
    ready_count: int
    non_finite_count: int
    first_non_finite: int | None
    points_per_s: float
    execute_s: float
    error: bytes | None
    output: str
    fingerprint: str | None
    owner: str | None
    attempts: int
    strikes: int
    retry_at: float | None
    ttl_s: float
    created_at: float
    started_at: float | None
    updated_at: float
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """A chunk that is computed and written.

    Attributes:
        index: Its place among the job's chunks, from 0.
        rows: Its points.
        non_finite: Those that gave NaN or Inf.
        first_non_finite: The first of them, counted from the job's first point; None
            where there is none.
        execute_s: The seconds that devices have spent on it.
    """

    index: int
    rows: int
    non_finite: int
    first_non_finite: int | None
    execute_s: float
