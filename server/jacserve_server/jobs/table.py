"""The durable table of jobs, shared by the servers of a folder of jobs.

Every method is one change, whole or not at all; it blocks, and several threads may
call. Whatever the servers do at once, a job has one owner while it runs, and its
counters are the sums of its chunks. A server that has lost a job is told so by the next
thing that it does to it.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    delete,
    func,
    or_,
    select,
    tuple_,
    update,
)

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

_MOST_VALUES = 1000
# Longer than any job is held up for.
_LONGEST_WAIT_S = 600.0


class JobTable:
    """The jobs of one folder.

    Any method may raise TableError. Then it has changed nothing, except perhaps where
    the connection was lost; all may be repeated.

    A `uid` names a job, and `server` the server that runs it: a method that takes both
    returns False, and does nothing, where that server does not run the job any more.
    """

    def __init__(
        self, url: str, folder: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Opens the table; makes it where there is none.

        Args:
            url: "sqlite:///PATH" or "postgresql://USER:PASSWORD@HOST/NAME".
            folder: Names the folder of jobs among all that the database serves.
            clock: The time, in seconds since 1970.

        Raises:
            TableError: The database can't be used, or a newer program has made it.
        """
        self._clock = clock
        self._rows = JobRows(folder, clock)
        self._database = Database(url)
        try:
            with self._database.writing() as connection:
                schema.prepare(connection)
        except TableError:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    def create(
        self, new: NewJob, check: Callable[[int, int], None] | None = None
    ) -> tuple[JobRecord, bool]:
        """Queues a job, if its id is free.

        Args:
            new: The job.
            check: Told how many others are queued or running, of its identity and of
                all; what it raises keeps the job out.

        Returns:
            The job of that id, which is another where it was taken; and whether it is
            the new one.
        """
        is_it = or_(has_id(new.job_id, new.identity), jobs.c.uid == new.uid)
        while True:
            with self._database.writing() as connection:
                self._rows.add(connection, new)
                found = self._rows.one(connection, is_it)
                # Not before: several may come at once.
                if check and found is not None and found.uid == new.uid:
                    own, all_ = self._unfinished(connection, new.identity)
                    check(own - 1, all_ - 1)
            # Else the id was taken, and its job has been deleted since.
            if found is not None:
                return found, found.uid == new.uid

    def find(self, job_id: str, identity: str = "") -> JobRecord | None:
        """Returns somebody's job of an id; None where there is none.

        Args:
            job_id: The job.
            identity: Who has made it.
        """
        with self._database.reading() as connection:
            return self._rows.one(connection, has_id(job_id, identity))

    def get(self, uid: str) -> JobRecord | None:
        """Returns a job by its uid; a deleted one, too, until it is purged."""
        with self._database.reading() as connection:
            return self._rows.one(connection, jobs.c.uid == uid)

    def jobs(
        self,
        *,
        states: Collection[JobState] = (),
        identity: str | None = None,
        before: tuple[float, str] | None = None,
        limit: int,
    ) -> list[JobRecord]:
        """Lists jobs, the newest first.

        Args:
            states: Only jobs in these; in any where there is none.
            identity: Only jobs that it has made; None for all.
            before: Only jobs that come after this one in the list: its `created_at`
                and `uid`.
            limit: The most jobs to return.

        Returns:
            The jobs.
        """
        conditions = [IS_TAKEN]
        if states:
            conditions.append(jobs.c.state.in_(states))
        if identity is not None:
            conditions.append(jobs.c.identity == identity)
        if before is not None:
            conditions.append(tuple_(*OLDEST_FIRST) < before)
        with self._database.reading() as connection:
            return self._rows.all(connection, *conditions, newest=limit)

    def counts(self) -> Mapping[JobState, int]:
        """Returns how many jobs are in each state."""
        query = (
            select(jobs.c.state, func.count().label("number"))
            .where(self._rows.is_here, IS_TAKEN)
            .group_by(jobs.c.state)
        )
        with self._database.reading() as connection:
            found = {row.state: row.number for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in STATES}

    def unfinished(self, identity: str) -> tuple[int, int]:
        """Returns how many jobs are queued or running: of one identity, and of all."""
        with self._database.reading() as connection:
            return self._unfinished(connection, identity)

    def _unfinished(self, connection: Connection, identity: str) -> tuple[int, int]:
        query = (
            select(jobs.c.identity, func.count().label("number"))
            .where(self._rows.is_here, IS_TAKEN, jobs.c.state.not_in(FINAL))
            .group_by(jobs.c.identity)
        )
        found = {row.identity: row.number for row in connection.execute(query)}
        return found.get(identity, 0), sum(found.values())

    def cancel(self, job_id: str, identity: str = "") -> JobRecord | None:
        """Stops a job, whoever runs it; does nothing to one that has ended.

        Args:
            job_id: The job.
            identity: Who has made it.

        Returns:
            The job as it is then; None where there is none.
        """
        is_it = has_id(job_id, identity)
        with self._database.writing() as connection:
            self._rows.move(connection, "cancelled", is_it, error=None)
            return self._rows.one(connection, is_it)

    def delete(self, job_id: str, identity: str = "") -> str | None:
        """Frees a job's id at once, stops the job, and condemns it to be purged.

        Args:
            job_id: The job.
            identity: Who has made it.

        Returns:
            Its uid; None where there is none.
        """
        return self._delete(has_id(job_id, identity))

    def forget(self, uid: str) -> None:
        """Deletes a job by its uid; does nothing to one that is deleted."""
        self._delete(and_(jobs.c.uid == uid, IS_TAKEN))

    def _delete(self, condition: ColumnElement[bool]) -> str | None:
        with self._database.writing() as connection:
            found = self._rows.one(connection, condition, lock="wait")
            if found is None:
                return None
            is_it = jobs.c.uid == found.uid
            self._rows.move(connection, "cancelled", is_it, error=None)
            self._rows.change(connection, is_it, is_condemned=True)
            return found.uid

    def claim(
        self,
        server: str,
        functions: Collection[str],
        is_alive: Callable[[str], bool],
        *,
        running: Collection[str],
    ) -> JobRecord | None:
        """Takes a job that may run, for a server to run it.

        It is one of whoever has the fewest that run, and of these the oldest.

        That is a queued one that this server, a dead one or nobody has accepted, or a
        running one whose server is dead, which is a strike against it. Of two servers
        only one gets it. A server has one thread that claims.

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
        # Who runs a job must have left it: then it may go back to the queue as well.
        waits = jobs.c.state.in_(sources_of("running"))
        is_running = jobs.c.state.in_(sources_of("queued"))
        is_left = self._is_left(server, is_alive, or_(waits, is_running))
        # None waits for so long: the clock was ahead when that was written.
        never = now + _LONGEST_WAIT_S
        at = jobs.c.retry_at
        is_due = or_(at.is_(None), at <= now, at > never)
        may_run = and_(
            jobs.c.function.in_(functions),
            is_left,
            or_(and_(waits, is_due), and_(is_running, jobs.c.uid.not_in(running))),
        )
        with self._database.writing() as connection:
            # What is locked is being claimed, or cancelled.
            found = self._rows.one(
                connection,
                may_run,
                lock="skip",
                first=[self._rows.running_of_identity()],
            )
            if found is None:
                return None
            is_it = jobs.c.uid == found.uid
            started_at = now if found.started_at is None else found.started_at
            # It may have been what ended its server.
            is_strike = found.state == "running" and found.owner != server
            self._rows.change(
                connection,
                is_it,
                state="running",
                owner=server,
                strikes=found.strikes + int(is_strike),
                error=None,
                retry_at=None,
                started_at=started_at,
            )
            return self._rows.one(connection, is_it)

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
            Whether it is planned so now, and was not before.
        """
        is_unplanned = and_(runs(uid, server), jobs.c.chunk_size.is_(None))
        with self._database.writing() as connection:
            return self._rows.change(
                connection,
                is_unplanned,
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
        """Counts a chunk that is written, once: to repeat it changes nothing.

        Args:
            uid: The job.
            server: The server that runs it.
            chunk: The chunk.
            boot: The boot of the machine whose memory may hold the chunk still; None
                for one that is on a disk.
            points_per_s: How fast the job is of late.
            ready_count: The points before the first that is not computed.

        Returns:
            Whether the server runs the job.
        """
        with self._database.writing(is_durable=False) as connection:
            job = self._rows.one(connection, runs(uid, server), lock="wait")
            if job is None:
                return False
            if add_chunk(connection, uid, chunk, boot):
                firsts = (job.first_non_finite, chunk.first_non_finite)
                self._rows.change(
                    connection,
                    jobs.c.uid == uid,
                    done_count=job.done_count + chunk.rows,
                    ready_count=ready_count,
                    non_finite_count=job.non_finite_count + chunk.non_finite,
                    first_non_finite=least(firsts),
                    execute_s=job.execute_s + chunk.execute_s,
                    points_per_s=points_per_s,
                    attempts=0,
                    strikes=0,
                )
            return True

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
        is_strike: bool = False,
    ) -> bool:
        """Queues a running job again, for any server.

        Args:
            uid: The job.
            server: The server that runs it.
            error: What holds it up, as a serialized google.rpc.Status; None where it
                is released for the server's sake.
            retry_at: When to try again; None for at once.
            is_strike: Whether it may be the job itself that is at fault.

        Returns:
            Whether the server ran the job.
        """
        why = {}
        if error is not None:
            why = {
                "error": error,
                "attempts": jobs.c.attempts + 1,
                "strikes": jobs.c.strikes + int(is_strike),
            }
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
        """Returns the uids of the jobs that have been kept long enough.

        Args:
            keep: How many ended jobs are kept, the last to end.

        Returns:
            Of the jobs that have ended, those whose time is up, and of those that are
            too many the oldest of whoever has the most.
        """
        query = (
            select(jobs.c.uid, jobs.c.identity, jobs.c.ended_at + jobs.c.ttl_s)
            .where(self._rows.is_here, IS_TAKEN, jobs.c.state.in_(FINAL))
            .order_by(jobs.c.ended_at, *OLDEST_FIRST)
        )
        with self._database.reading() as connection:
            ended = connection.execute(query).all()
        now = self._clock()
        over = [uid for uid, _, expires_at in ended if expires_at <= now]
        kept: dict[str, deque[str]] = {}
        for uid, identity, expires_at in ended:
            if expires_at > now:
                kept.setdefault(identity, deque()).append(uid)
        surplus = len(ended) - len(over) - keep
        # Else one could have the results of all others deleted.
        return over + [max(kept.values(), key=len).popleft() for _ in range(surplus)]

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
