"""The rows of one folder of jobs, read and changed within a transaction."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from itertools import takewhile
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, and_, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from jacserve_server.jobs.records import ChunkRecord, JobRecord, NewJob
from jacserve_server.jobs.schema import IS_TAKEN, chunks, jobs
from jacserve_server.jobs.states import FINAL, JobState, sources_of

OLDEST_FIRST = (jobs.c.created_at, jobs.c.uid)
_JOB = [jobs.c[field.name] for field in fields(JobRecord)]
_CHUNK = [chunks.c[field.name] for field in fields(ChunkRecord)]
_INSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def runs(uid: str, server: str) -> ColumnElement[bool]:
    """Is true of a job while a server runs it."""
    return and_(jobs.c.uid == uid, jobs.c.state == "running", jobs.c.owner == server)


def has_id(job_id: str, identity: str) -> ColumnElement[bool]:
    """Is true of somebody's job of an id that is not deleted."""
    return and_(jobs.c.identity == identity, jobs.c.job_id == job_id, IS_TAKEN)


class JobRows:
    """Statements, each about the jobs of one folder."""

    def __init__(self, folder: str, clock: Callable[[], float]) -> None:
        """Prepares for any connection.

        Args:
            folder: Names the folder of jobs among all that the database serves.
            clock: The time, in seconds since 1970.
        """
        self._clock = clock
        self._folder = folder
        self.is_here: ColumnElement[bool] = jobs.c.folder == folder

    def add(self, connection: Connection, new: NewJob) -> None:
        """Adds a job, if its id is free and it is not there yet."""
        now = self._clock()
        connection.execute(
            _INSERTS[connection.dialect.name](jobs)
            .values(
                **asdict(new),
                folder=self._folder,
                state="queued",
                created_at=now,
                updated_at=now,
            )
            .on_conflict_do_nothing()
        )

    def one(
        self,
        connection: Connection,
        condition: ColumnElement[bool],
        *,
        lock: Literal["wait", "skip"] | None = None,
        first: Sequence[ColumnElement[Any]] = (),
    ) -> JobRecord | None:
        """Returns the oldest of the jobs of which something is true.

        Args:
            connection: In a transaction.
            condition: What is true.
            first: What goes before age: those with the least of it.
            lock: Whether to keep other transactions from changing the job, and to wait
                for one that does so already, or to skip the job. In SQLite, others do
                not write meanwhile in any case.

        Returns:
            The job; None where there is none.
        """
        query = select(*_JOB).where(self.is_here, condition)
        if lock is not None:
            query = query.with_for_update(skip_locked=lock == "skip")
        query = query.order_by(*first, *OLDEST_FIRST)
        row = connection.execute(query.limit(1)).one_or_none()
        return None if row is None else JobRecord(*row)

    def all(
        self,
        connection: Connection,
        *conditions: ColumnElement[bool],
        newest: int | None = None,
    ) -> list[JobRecord]:
        """Returns jobs, the oldest first; or so many, the newest first."""
        order = OLDEST_FIRST if newest is None else [key.desc() for key in OLDEST_FIRST]
        query = select(*_JOB).where(self.is_here, *conditions)
        found = connection.execute(query.order_by(*order).limit(newest))
        return [JobRecord(*row) for row in found]

    def running_of_identity(self) -> ColumnElement[int]:
        """Is, of a job, how many run of whoever has made it."""
        others = jobs.alias()
        is_so = and_(
            others.c.folder == self._folder,
            others.c.identity == jobs.c.identity,
            others.c.state == "running",
        )
        query = select(func.count()).select_from(others).where(is_so)
        return query.correlate(jobs).scalar_subquery()

    def owners(
        self, connection: Connection, condition: ColumnElement[bool]
    ) -> Sequence[str]:
        """Returns the owners of jobs, each once."""
        has_owner = jobs.c.owner.is_not(None)
        query = select(jobs.c.owner).where(self.is_here, condition, has_owner)
        return connection.scalars(query.distinct()).all()

    def change(
        self, connection: Connection, *conditions: ColumnElement[bool], **values: Any
    ) -> bool:
        """Changes a job; tells whether there was one to change."""
        changed = {"updated_at": self._clock(), **values}
        statement = update(jobs).where(self.is_here, *conditions).values(changed)
        return connection.execute(statement).rowcount > 0

    def move(
        self,
        connection: Connection,
        target: JobState,
        condition: ColumnElement[bool],
        **values: Any,
    ) -> bool:
        """Changes a job's state, from one that allows it; tells whether it was so."""
        now = self._clock()
        if target in FINAL:
            values |= {"ended_at": now, "retry_at": None}
        if target != "running":
            values |= {"points_per_s": 0.0}
        may_go = jobs.c.state.in_(sources_of(target))
        return self.change(
            connection, condition, may_go, state=target, updated_at=now, **values
        )


def add_chunk(
    connection: Connection, uid: str, chunk: ChunkRecord, boot: str | None
) -> bool:
    """Adds a chunk of a job; tells whether it is new."""
    statement = (
        _INSERTS[connection.dialect.name](chunks)
        .values(uid=uid, boot=boot, **asdict(chunk))
        .on_conflict_do_nothing()
        .execution_options(preserve_rowcount=True)
    )
    return connection.execute(statement).rowcount > 0


def chunks_of(connection: Connection, uid: str) -> list[ChunkRecord]:
    """Returns the chunks of a job, in order."""
    query = select(*_CHUNK).where(chunks.c.uid == uid).order_by(chunks.c.index)
    return [ChunkRecord(*row) for row in connection.execute(query)]


def least(numbers: Iterable[int | None]) -> int | None:
    """Returns the least number that there is."""
    return min((number for number in numbers if number is not None), default=None)


def sums_of(found: Sequence[ChunkRecord]) -> dict[str, Any]:
    """Computes a job's counters from its chunks, in order."""
    unbroken = takewhile(lambda pair: pair[0] == pair[1].index, enumerate(found))
    return {
        "done_count": sum(chunk.rows for chunk in found),
        "ready_count": sum(chunk.rows for _, chunk in unbroken),
        "non_finite_count": sum(chunk.non_finite for chunk in found),
        "first_non_finite": least(chunk.first_non_finite for chunk in found),
        "execute_s": sum(chunk.execute_s for chunk in found),
    }
