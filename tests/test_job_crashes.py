"""Batch jobs lose nothing when servers die."""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jacserve.queries import EvaluateOptions
from job_calls import FINAL, QUEUED, RUNNING, points, reason_of
from job_functions import JOB
from job_servers import JobHome, JobServer

BATCH = 10
CHUNKS = 60
POINTS = BATCH * CHUNKS - 3


@dataclass(frozen=True)
class Kind:
    """A job of some kind; `bad` are points that give NaN."""

    function: str
    columns: int
    quantities: tuple[str, ...] = ("jacobian",)
    options: EvaluateOptions = field(default_factory=EvaluateOptions)
    dtype: str = "float64"
    bad: Sequence[int] = ()

    def arrays(self, job: int, count: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
        x, row = points(count, self.columns, job)
        x[list(self.bad)] = -1.0
        return x.astype(self.dtype), row


KINDS = {
    "dense": Kind("dense", 3),
    "csr": Kind("stencil", 8, options={"layout": "csr"}),
    "nan": Kind("roots", 2, ("value", "jacobian"), bad=(5, 101, POINTS - 1)),
    "float32": Kind("dense", 3, dtype="float32"),
    "finite": Kind("roots", 2, options={"require_finite": True}),
    "several": Kind("dense", 3, ("value", "slogdet")),
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[JobHome]:
    with closing(JobHome(tmp_path)) as made:
        yield made


def paced_home(folder: Path) -> AbstractContextManager[JobHome]:
    """One whose jobs take long enough to be interrupted anywhere."""
    return closing(JobHome(folder, JOB_TEST_PACE_S="0.02"))


def create(server: JobServer, job_id: str, kind: Kind, job: int) -> Any:
    return server.calls.create(
        job_id,
        kind.function,
        kind.arrays(job),
        kind.quantities,
        options=kind.options,
        batch_size=BATCH,
    )


def contents(store: Path) -> dict[str, Any]:
    """Every file of a store; but for the job's name, which no other has."""
    found: dict[str, Any] = {}
    for path in store.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(store))] = path.read_bytes()
    about = json.loads(found["zarr.json"])
    del about["attributes"]["jacserve"]["job"]
    found["zarr.json"] = about
    return found


def check_counters(job: Any, kind: Kind) -> None:
    progress = job.progress
    assert progress.point_count == progress.done_count == progress.ready_count == POINTS
    assert progress.non_finite_count == len(kind.bad)
    first = progress.first_non_finite if progress.HasField("first_non_finite") else None
    assert first == (kind.bad[0] if kind.bad else None)


class Interrupted:
    """Some jobs on one server, which is killed again and again."""

    def __init__(self, home: JobHome, kinds: Sequence[Kind]) -> None:
        self._home = home
        # What traces a function may try small numbers of rows: none is a job's.
        self._kinds = dict(enumerate(kinds, 1))
        self._done = dict.fromkeys(self._kinds, 0)
        self._kept: Counter[int] = Counter()
        self.server = home.start()

    def create(self) -> None:
        for n, kind in self._kinds.items():
            create(self.server, f"job-{n}", kind, n)

    def advance(self, point: int) -> None:
        """Waits until all jobs are so far."""
        for n in self._kinds:
            job = self.server.calls.until(
                f"job-{n}",
                lambda job: job.progress.done_count >= point or job.state in FINAL,
            )
            self._see(n, job)

    def restart(self, *, is_graceful: bool = False) -> None:
        """Ends the server, and sees that a new one has lost nothing."""
        for n in self._kinds:
            self._see(n, self.server.calls.get(f"job-{n}"))
        if is_graceful:
            self.server.stop()
        else:
            self.server.kill()
        self.server = self._home.start()
        for n in self._kinds:
            self._see(n, self.server.calls.get(f"job-{n}"))

    def _see(self, n: int, job: Any) -> None:
        assert not job.HasField("error"), job
        assert job.progress.done_count >= self._done[n]
        self._done[n] = job.progress.done_count
        times = self._home.times_computed()
        ready = range(JOB * n, JOB * n + job.progress.ready_count)
        for row in ready:
            # What is ready is not computed again, ever.
            assert times[row] == self._kept.setdefault(row, times[row])

    def finish(self) -> None:
        """Ends the jobs, and compares them with others that nothing has interrupted."""
        calls = self.server.calls
        for n, kind in self._kinds.items():
            create(self.server, f"whole-{n}", kind, n + 100)
        for n, kind in self._kinds.items():
            job, whole = calls.wait(f"job-{n}"), calls.wait(f"whole-{n}")
            self._see(n, job)
            assert job.batch_size == job.chunk_size == BATCH
            check_counters(job, kind)
            found, expected = (contents(self._home.store(x)) for x in (job, whole))
            assert found == expected
            chunks = [name for name in found if name.startswith("status/c")]
            assert len(chunks) == CHUNKS


def test_jobs_are_the_same_however_often_their_server_is_killed(tmp_path):
    """Three jobs at once; ten ends of their server, of which nine are kills."""
    chance = random.Random(1)
    with paced_home(tmp_path) as home:
        jobs = Interrupted(home, [KINDS[name] for name in ("dense", "csr", "nan")])
        jobs.create()
        jobs.restart()
        jobs.advance(BATCH)
        jobs.restart(is_graceful=True)
        for point in (100, 200, 250, 300, 400, 450, 500):
            jobs.advance(point)
            time.sleep(chance.uniform(0.0, 0.05))
            jobs.restart()
        jobs.advance(POINTS - 3 * BATCH)
        jobs.restart()
        jobs.finish()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_jobs_of_all_kinds_are_the_same_after_many_kills(tmp_path, seed):
    """Each seed kills a server of six jobs ten times: 100 kills in all."""
    chance = random.Random(seed)
    with paced_home(tmp_path) as home:
        jobs = Interrupted(home, list(KINDS.values()))
        jobs.create()
        for point in sorted(chance.sample(range(POINTS - 2 * BATCH), 10)):
            jobs.advance(point)
            time.sleep(chance.uniform(0.0, 0.1))
            jobs.restart()
        jobs.restart(is_graceful=True)
        jobs.finish()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_store_that_is_half_made_is_made_again(home):
    """Kills while files of the store appear, at another one each time."""
    started_ns = time.time_ns()
    jobs = Interrupted(home, [KINDS["nan"]])
    jobs.create()
    for count in (1, 2, 3, 4):
        while documents(home.results, started_ns) < count:
            if home.query("select 1 from jacserve_jobs where chunk_size is not null"):
                break  # It was too quick.
        started_ns = time.time_ns()
        jobs.restart()
    jobs.finish()


def test_a_job_that_ends_its_server_again_and_again_leaves_room_for_others(home):
    home.fatal.write_text("0")
    server = home.start()
    create(server, "a", KINDS["dense"], 1)
    server.process.wait(60)
    home.query("update jacserve_jobs set strikes = 20")
    server = home.start()
    home.fatal.unlink()
    create(server, "b", KINDS["dense"], 2)
    server.calls.wait("b")
    assert server.calls.get("a").state == RUNNING
    server.kill()
    home.query("update jacserve_jobs set strikes = 0 where state = 'running'")
    home.start().calls.wait("a")


@pytest.mark.slow
def test_a_job_outlives_the_worker_process_that_runs_it(tmp_path):
    with closing(JobHome(tmp_path, JACSERVE_ISOLATION="process")) as home:
        home.fatal.write_text("100")
        server = home.start()
        create(server, "a", KINDS["dense"], 1)
        job = server.calls.until("a", lambda job: job.HasField("error"))
        home.fatal.unlink()
        assert (job.state, reason_of(job)) == (QUEUED, "WORKER_DIED")
        assert job.progress.done_count > 0
        job = server.calls.wait("a")
        check_counters(job, KINDS["dense"])
        assert not job.HasField("error")


def documents(folder: Path, since_ns: int) -> int:
    """Counts the documents of stores that were written since."""
    found = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                written_ns = Path(above, name).stat().st_mtime_ns
                found += name == "zarr.json" and written_ns > since_ns
    return found
