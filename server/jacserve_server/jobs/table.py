"""The durable table of jobs, shared by the servers of a folder of jobs.

Every method is one transaction, and blocks; several threads may call. Whatever the
servers do at once, a job has one owner while it runs, and its counters are the sums of
its chunks. A server that has lost a job is told so by what it does next.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import takewhile
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from jacserve_server.jobs import schema
from jacserve_server.jobs.database import Database, TableError
from jacserve_server.jobs.records import ChunkRecord, JobRecord, NewJob
from jacserve_server.jobs.schema import chunks, jobs
from jacserve_server.jobs.states import FINAL, STATES, JobState, sources_of

__all__ = ["ChunkRecord", "JobRecord", "JobTable", "NewJob", "TableError"]

_JOB = [jobs.c[field.name] for field in fields(JobRecord)]
_CHUNK = [chunks.c[field.name] for field in fields(ChunkRecord)]
_OLDEST_FIRST = (jobs.c.created_at, jobs.c.uid)
_MOST_VALUES = 1000
_INSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class JobTable:
    """The jobs of one folder."""

    def __init__(
        self, url: str, folder: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Opens the table; makes it where there is none.

        Args:
            url: "sqlite:///PATH" or "postgresql://USER:PASSWORD@HOST/NAME".
            folder: Names the folder of jobs among all that the database serves.
            clock: The time, in seconds since 1970.

        Raises:
            TableError: The database can't be used. Any other method may raise it, too;
                then nothing has changed, except perhaps where the connection was lost.
        """
        self._folder = folder
        self._clock = clock
        self._database = Database(url)
        self._insert = _INSERTS[self._database.dialect]
        try:
            with self._database.writing() as connection:
                schema.prepare(connection)
        except TableError:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    def create(self, new: NewJob) -> tuple[JobRecord, bool]:
        """Queues a job, if its id is free.

        Args:
            new: The job.

        Returns:
            The job of that id, which is another where it was taken; and whether it is
            the new one.
        """
        now = self._clock()
        statement = (
            self._insert(jobs)
            .values(
                **asdict(new),
                folder=self._folder,
                state="queued",
                created_at=now,
                updated_at=now,
            )
            .on_conflict_do_nothing(
                index_elements=[jobs.c.folder, jobs.c.job_id],
                index_where=schema.IS_TAKEN,
            )
        )
        while True:
            with self._database.writing() as connection:
                connection.execute(statement)
                found = self._one(connection, jobs.c.job_id == new.job_id)
            # Else it was taken, and has been deleted since.
            if found is not None:
                return found, found.uid == new.uid

    def find(self, job_id: str) -> JobRecord | None:
        """Returns the job of an id; None where there is none, or it is deleted."""
        with self._database.reading() as connection:
            return self._one(connection, jobs.c.job_id == job_id)

    def get(self, uid: str) -> JobRecord | None:
        """Returns a job by its uid; a deleted one, too, until it is purged."""
        with self._database.reading() as connection:
            return _record(
                connection.execute(
                    select(*_JOB).where(self._is_here, jobs.c.uid == uid)
                ).one_or_none()
            )

    def jobs(
        self,
        *,
        states: Collection[JobState] = (),
        before: tuple[float, str] | None = None,
        limit: int,
    ) -> list[JobRecord]:
        """Lists jobs, the newest first.

        Args:
            states: Only jobs in these; in any where there is none.
            before: Only jobs that come after this one in the list: its `created_at`
                and `uid`.
            limit: The most jobs to return.

        Returns:
            The jobs.
        """
        query = select(*_JOB).where(self._is_here, schema.IS_TAKEN)
        if states:
            query = query.where(jobs.c.state.in_(states))
        if before is not None:
            query = query.where(tuple_(*_OLDEST_FIRST) < before)
        newest_first = [column.desc() for column in _OLDEST_FIRST]
        with self._database.reading() as connection:
            found = connection.execute(query.order_by(*newest_first).limit(limit))
            return [JobRecord(*row) for row in found]

    def counts(self) -> Mapping[JobState, int]:
        """Returns how many jobs are in each state."""
        query = (
            select(jobs.c.state, func.count().label("number"))
            .where(self._is_here, schema.IS_TAKEN)
            .group_by(jobs.c.state)
        )
        with self._database.reading() as connection:
            found = {row.state: row.number for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in STATES}

    def claim(
        self,
        server: str,
        functions: Collection[str],
        is_alive: Callable[[str], bool],
        *,
        running: Collection[str],
    ) -> JobRecord | None:
        """Takes the oldest job that may run, for a server to run it.

        That is a queued one that it or nobody who lives has accepted, or a running one
        whose server is dead. Of two servers only one gets it. A server makes one such
        call at a time.

        Args:
            server: The id of the server.
            functions: The functions that it has.
            is_alive: Tells whether another server lives.
            running: The uids of the jobs that the server runs. One that it owns and
                does not run is taken up again.

        Returns:
            The job, running now; None where there is none.
        """
        now = self._clock()
        waits = jobs.c.state.in_(sources_of("running"))
        runs = jobs.c.state.in_(sources_of("queued"))
        owners = self._owners(or_(waits, runs))
        gone = [*_dead(owners, server, is_alive), server]
        is_due = or_(jobs.c.retry_at.is_(None), jobs.c.retry_at <= now)
        is_ours = or_(jobs.c.owner.is_(None), jobs.c.owner.in_(gone))
        oldest = (
            select(*_JOB)
            .where(
                self._is_here,
                jobs.c.function.in_(functions),
                or_(
                    and_(waits, is_due, is_ours),
                    and_(runs, jobs.c.owner.in_(gone), jobs.c.uid.not_in(running)),
                ),
            )
            .order_by(*_OLDEST_FIRST)
            .limit(1)
            # A job that is locked is being claimed, or cancelled.
            .with_for_update(skip_locked=True)
        )
        with self._database.writing() as connection:
            found = connection.execute(oldest).one_or_none()
            if found is None:
                return None
            self._change(
                connection,
                jobs.c.uid == found.uid,
                state="running",
                owner=server,
                started_at=func.coalesce(jobs.c.started_at, now),
            )
            return self._one(connection, jobs.c.uid == found.uid)

    def plan(
        self,
        uid: str,
        server: str,
        *,
        batch_size: int,
        chunk_size: int,
        fingerprint: str,
    ) -> bool:
        """Fixes how a job is computed, once and for all.

        Args:
            uid: The job.
            server: The server that runs it.
            batch_size: The points computed at once.
            chunk_size: The points of a chunk.
            fingerprint: Of its function.

        Returns:
            False where the server does not run the job any more, or it is planned.
        """
        with self._database.writing() as connection:
            return self._change(
                connection,
                self._runs(uid, server),
                jobs.c.chunk_size.is_(None),
                batch_size=batch_size,
                chunk_size=chunk_size,
                fingerprint=fingerprint,
            )

    def commit(
        self,
        uid: str,
        server: str,
        chunk: ChunkRecord,
        *,
        boot: str | None,
        points_per_s: float,
        ready_count: int,
    ) -> bool:
        """Counts a chunk that is written. To repeat it changes nothing.

        Args:
            uid: The job.
            server: The server that runs it.
            chunk: The chunk.
            boot: The boot of the machine whose memory may hold the chunk still; None
                for one that is on a disk.
            points_per_s: How fast the job is of late.
            ready_count: The points before the first that is not computed.

        Returns:
            False where the server does not run the job any more.
        """
        with self._database.writing(is_durable=False) as connection:
            job = self._held(connection, uid, server)
            if job is None:
                return False
            added = connection.execute(
                self._insert(chunks)
                .values(uid=uid, boot=boot, **asdict(chunk))
                .on_conflict_do_nothing(),
                execution_options={"preserve_rowcount": True},
            )
            if added.rowcount:
                firsts = (job.first_non_finite, chunk.first_non_finite)
                self._change(
                    connection,
                    jobs.c.uid == uid,
                    done_count=job.done_count + chunk.rows,
                    ready_count=ready_count,
                    non_finite_count=job.non_finite_count + chunk.non_finite,
                    first_non_finite=_least(firsts),
                    execute_s=job.execute_s + chunk.execute_s,
                    points_per_s=points_per_s,
                    attempts=0,
                    error=None,
                    retry_at=None,
                )
            return True

    def settle(self, uid: str, server: str, indexes: Sequence[int]) -> None:
        """Notes that chunks are on a disk.

        Args:
            uid: The job.
            server: The server that runs it; nothing is noted where it does not.
            indexes: The places of the chunks.
        """
        with self._database.writing(is_durable=False) as connection:
            if not self._held(connection, uid, server):
                return
            # A database takes only so many values in one statement.
            for first in range(0, len(indexes), _MOST_VALUES):
                places = indexes[first : first + _MOST_VALUES]
                connection.execute(
                    update(chunks)
                    .where(chunks.c.uid == uid, chunks.c.index.in_(places))
                    .values(boot=None)
                )

    def unsettle(self, uid: str, server: str, boot: str | None) -> None:
        """Drops the chunks that may have been lost with the memory of a machine.

        Args:
            uid: The job.
            server: The server that runs it; nothing is dropped where it does not.
            boot: The boot of this machine, whose memory still has its chunks; None
                where that is not known.
        """
        is_lost = chunks.c.boot.is_not(None)
        if boot is not None:
            is_lost &= chunks.c.boot != boot
        with self._database.writing() as connection:
            if not self._held(connection, uid, server):
                return
            lost = connection.execute(
                delete(chunks).where(chunks.c.uid == uid, is_lost)
            )
            if lost.rowcount:
                left = _chunks(connection, uid)
                self._change(connection, jobs.c.uid == uid, **_sums(left))

    def chunks(self, uid: str) -> list[ChunkRecord]:
        """Returns the chunks of a job that are committed, in order."""
        with self._database.reading() as connection:
            is_here = exists().where(self._is_here, jobs.c.uid == uid)
            return (
                _chunks(connection, uid) if connection.scalar(select(is_here)) else []
            )

    def release(
        self,
        uid: str,
        server: str,
        *,
        error: bytes | None = None,
        retry_at: float | None = None,
    ) -> bool:
        """Queues a running job again, for any server.

        Args:
            uid: The job.
            server: The server that runs it.
            error: What holds it up, as a serialized google.rpc.Status; None where it
                is released for the server's sake.
            retry_at: When to try again; None for at once.

        Returns:
            False where the server does not run the job any more.
        """
        held_up = {}
        if error is not None:
            held_up = {"error": error, "attempts": jobs.c.attempts + 1}
        with self._database.writing() as connection:
            return self._move(
                connection,
                "queued",
                self._runs(uid, server),
                owner=None,
                retry_at=retry_at,
                **held_up,
            )

    def finish(
        self, uid: str, server: str, state: JobState, *, error: bytes | None = None
    ) -> bool:
        """Ends a running job.

        Args:
            uid: The job.
            server: The server that runs it.
            state: "succeeded" or "failed".
            error: Why it has failed, as a serialized google.rpc.Status.

        Returns:
            False where the server does not run the job any more.
        """
        with self._database.writing() as connection:
            return self._move(
                connection, state, self._runs(uid, server), error=error, retry_at=None
            )

    def cancel(self, job_id: str) -> JobRecord | None:
        """Stops a job, whoever runs it; does nothing to one that has ended.

        Args:
            job_id: The job.

        Returns:
            The job as it is then; None where there is none.
        """
        is_it = and_(jobs.c.job_id == job_id, schema.IS_TAKEN)
        with self._database.writing() as connection:
            self._move(connection, "cancelled", is_it, error=None, retry_at=None)
            return self._one(connection, is_it)

    def delete(self, job_id: str) -> str | None:
        """Frees a job's id at once, stops the job, and condemns it to be purged.

        Args:
            job_id: The job.

        Returns:
            Its uid; None where there is none.
        """
        is_it = and_(jobs.c.job_id == job_id, schema.IS_TAKEN)
        with self._database.writing() as connection:
            self._move(connection, "cancelled", is_it, error=None, retry_at=None)
            found = self._one(connection, is_it)
            if found is None:
                return None
            is_it = jobs.c.uid == found.uid
            is_new = self._change(connection, is_it, schema.IS_TAKEN, is_condemned=True)
            return found.uid if is_new else None

    def condemned(
        self, server: str, is_alive: Callable[[str], bool]
    ) -> list[JobRecord]:
        """Returns the deleted jobs whose files this server may remove.

        Args:
            server: The id of the server. It knows itself which of them it still runs.
            is_alive: Tells whether another server lives, and may still write files.

        Returns:
            The jobs.
        """
        is_condemned = and_(self._is_here, jobs.c.is_condemned)
        gone = [*_dead(self._owners(jobs.c.is_condemned), server, is_alive), server]
        is_left = or_(jobs.c.owner.is_(None), jobs.c.owner.in_(gone))
        query = select(*_JOB).where(is_condemned, is_left).order_by(*_OLDEST_FIRST)
        with self._database.reading() as connection:
            return [JobRecord(*row) for row in connection.execute(query)]

    def purge(self, uid: str) -> None:
        """Forgets a deleted job and its chunks; does nothing to another.

        Args:
            uid: The job, whose files are gone.
        """
        is_it = and_(self._is_here, jobs.c.uid == uid, jobs.c.is_condemned)
        with self._database.writing() as connection:
            if connection.execute(delete(jobs).where(is_it)).rowcount:
                connection.execute(delete(chunks).where(chunks.c.uid == uid))

    def expired(self, *, keep: int) -> list[str]:
        """Returns the ids of the jobs that have been kept long enough.

        Args:
            keep: How many ended jobs are kept, the last to end.

        Returns:
            Of the jobs that have ended, those whose time is up, and the oldest of
            those that are too many; the oldest first.
        """
        query = (
            select(jobs.c.job_id, jobs.c.ended_at + jobs.c.ttl_s)
            .where(self._is_here, schema.IS_TAKEN, jobs.c.state.in_(FINAL))
            .order_by(jobs.c.ended_at, *_OLDEST_FIRST)
        )
        with self._database.reading() as connection:
            ended = connection.execute(query).all()
        now = self._clock()
        surplus = len(ended) - keep
        return [
            job_id
            for position, (job_id, expires_at) in enumerate(ended)
            if position < surplus or expires_at <= now
        ]

    @property
    def _is_here(self) -> ColumnElement[bool]:
        return jobs.c.folder == self._folder

    def _runs(self, uid: str, server: str) -> ColumnElement[bool]:
        return and_(
            jobs.c.uid == uid, jobs.c.state == "running", jobs.c.owner == server
        )

    def _one(
        self, connection: Connection, *conditions: ColumnElement[bool]
    ) -> JobRecord | None:
        query = select(*_JOB).where(self._is_here, schema.IS_TAKEN, *conditions)
        return _record(connection.execute(query).one_or_none())

    def _held(self, connection: Connection, uid: str, server: str) -> JobRecord | None:
        """Returns a job that a server runs, and keeps others from changing it."""
        query = select(*_JOB).where(self._is_here, self._runs(uid, server))
        return _record(connection.execute(query.with_for_update()).one_or_none())

    def _owners(self, condition: ColumnElement[bool]) -> Sequence[str | None]:
        query = select(jobs.c.owner).where(self._is_here, condition).distinct()
        with self._database.reading() as connection:
            return connection.scalars(query).all()

    def _change(
        self, connection: Connection, *conditions: ColumnElement[bool], **values: Any
    ) -> bool:
        """Changes a job; tells whether there was one to change."""
        statement = (
            update(jobs)
            .where(self._is_here, *conditions)
            .values(updated_at=self._clock(), **values)
        )
        return connection.execute(statement).rowcount > 0

    def _move(
        self,
        connection: Connection,
        target: JobState,
        condition: ColumnElement[bool],
        **values: Any,
    ) -> bool:
        """Changes a job's state, from one that allows it."""
        if target in FINAL:
            values["ended_at"] = self._clock()
        may_go = jobs.c.state.in_(sources_of(target))
        return self._change(
            connection, condition, may_go, state=target, points_per_s=0.0, **values
        )


def _record(row: Row[Any] | None) -> JobRecord | None:
    return None if row is None else JobRecord(*row)


def _chunks(connection: Connection, uid: str) -> list[ChunkRecord]:
    query = select(*_CHUNK).where(chunks.c.uid == uid).order_by(chunks.c.index)
    return [ChunkRecord(*row) for row in connection.execute(query)]


def _dead(
    owners: Iterable[str | None], server: str, is_alive: Callable[[str], bool]
) -> list[str]:
    others = [owner for owner in owners if owner is not None and owner != server]
    return [owner for owner in others if not is_alive(owner)]


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _sums(found: Sequence[ChunkRecord]) -> dict[str, Any]:
    """Computes a job's counters from its chunks, in order."""
    unbroken = takewhile(lambda pair: pair[0] == pair[1].index, enumerate(found))
    return {
        "done_count": sum(chunk.rows for chunk in found),
        "ready_count": sum(chunk.rows for _, chunk in unbroken),
        "non_finite_count": sum(chunk.non_finite for chunk in found),
        "first_non_finite": _least(chunk.first_non_finite for chunk in found),
        "execute_s": sum(chunk.execute_s for chunk in found),
    }
