"""The durable table of jobs, shared by the servers of a folder of jobs.

Every method is one change, whole or not at all; it blocks, and several threads may
call. Whatever the servers do at once, a job has one owner while it runs, and its
counters are the sums of its chunks. A server that has lost a job is told so by the next
thing that it does to it.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, tuple_, update

from jacserve_server.jobs import schema
from jacserve_server.jobs.database import Database, TableError
from jacserve_server.jobs.records import ChunkRecord, JobRecord, NewJob
from jacserve_server.jobs.rows import (
    OLDEST_FIRST,
    JobRows,
    add_chunk,
    chunks_of,
    has_id,
    least,
    runs,
    sums_of,
)
from jacserve_server.jobs.schema import IS_TAKEN, chunks, jobs
from jacserve_server.jobs.states import FINAL, STATES, JobState, sources_of

__all__ = ["ChunkRecord", "JobRecord", "JobTable", "NewJob", "TableError"]

    def chunks(self, uid: str) -> list[ChunkRecord]:
        """Returns the chunks of a job that are committed, in order."""
        with self._database.reading() as connection:
            job = self._rows.one(connection, jobs.c.uid == uid)
            return [] if job is None else chunks_of(connection, uid)

    def settle(self, uid: str, server: str, indexes: Sequence[int]) -> None:
        """Notes that chunks are on a disk.

        Args:
            uid: The job.
            server: The server that runs it; nothing is noted where it does not.
            indexes: The places of the chunks.
        """
        with self._database.writing(is_durable=False) as connection:
            if not self._rows.one(connection, runs(uid, server), lock="wait"):
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
            server: The server that runs it.
            boot: The boot of this machine, whose memory still has its chunks; None
                where that is not known.
        """
        is_lost = and_(chunks.c.uid == uid, chunks.c.boot.is_not(None))
        if boot is not None:
            is_lost = and_(is_lost, chunks.c.boot != boot)
        with self._database.writing() as connection:
            if not self._rows.one(connection, runs(uid, server), lock="wait"):
                return
            if connection.execute(delete(chunks).where(is_lost)).rowcount:
                sums = sums_of(chunks_of(connection, uid))
                self._rows.change(connection, jobs.c.uid == uid, **sums)

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
            Whether the server ran the job.
        """
        why = {}
        if error is not None:
            why = {"error": error, "attempts": jobs.c.attempts + 1}
        is_it = runs(uid, server)
        with self._database.writing() as connection:
            return self._rows.move(
                connection, "queued", is_it, owner=None, retry_at=retry_at, **why
            )

    def finish(
        self,
        uid: str,
        server: str,
        state: Literal["succeeded", "failed"],
        *,
        error: bytes | None = None,
    ) -> bool:
        """Ends a running job.

        Args:
            uid: The job.
            server: The server that runs it.
            state: How it ends.
            error: Why it has failed, as a serialized google.rpc.Status.

        Returns:
            Whether the server ran the job.
        """
        with self._database.writing() as connection:
            return self._rows.move(connection, state, runs(uid, server), error=error)

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
        is_left = self._is_left(server, is_alive, jobs.c.is_condemned)
        with self._database.reading() as connection:
            return self._rows.all(connection, jobs.c.is_condemned, is_left)

    def purge(self, uid: str) -> None:
        """Forgets a deleted job and its chunks; does nothing to another.

        Args:
            uid: The job, whose files are gone.
        """
        is_it = and_(self._rows.is_here, jobs.c.uid == uid, jobs.c.is_condemned)
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
            .where(self._rows.is_here, IS_TAKEN, jobs.c.state.in_(FINAL))
            .order_by(jobs.c.ended_at, *OLDEST_FIRST)
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

    def _is_left(
        self,
        server: str,
        is_alive: Callable[[str], bool],
        condition: ColumnElement[bool],
    ) -> ColumnElement[bool]:
        """Is true of jobs that no living server owns, but perhaps this one.

        Whoever becomes an owner after this is taken for alive.
        """
        with self._database.reading() as connection:
            owners = self._rows.owners(connection, condition)
        gone = [owner for owner in owners if owner != server and not is_alive(owner)]
        return or_(jobs.c.owner.is_(None), jobs.c.owner.in_([server, *gone]))
