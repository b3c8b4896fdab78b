"""Batch jobs on storage that fills up or goes away, and of functions that change."""

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from jacserve.errors import JacobianError
from jacserve.v1 import jacobian_pb2, jobs_pb2
from job_calls import (
    FAILED,
    QUEUED,
    JobCalls,
    points,
    reason_of,
)
from job_functions import JOB
from job_servers import JobHome, JobServer
from zoo import spherical_jacobian

BATCH = 10
LARGE_BYTES = 5 * 512 * 512 * 8


@pytest.fixture
def home(tmp_path: Path) -> Iterator[JobHome]:
    with closing(JobHome(tmp_path)) as made:
        yield made


def expected(x: np.ndarray) -> np.ndarray:
    return np.array([spherical_jacobian(row) for row in x])


def create_dense(server: JobServer, job_id: str, count: int, job: int) -> np.ndarray:
    arrays = points(count, 3, job)
    server.calls.create(job_id, "dense", arrays, batch_size=BATCH)
    return expected(arrays[0])


def check_result(calls: JobCalls, job_id: str, jacobians: np.ndarray) -> None:
    found = calls.read(job_id, 0, len(jacobians)).jacobian
    np.testing.assert_allclose(found, jacobians, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_job_waits_for_a_full_disk(home):
    server = home.start()
    x, row = points(20, 512, 1)
    home.open(5)
    server.calls.create("a", "large", (x, row), batch_size=5)
    server.calls.until("a", lambda job: job.progress.done_count == 5)
    server.limit_files(LARGE_BYTES - 1)
    home.open()
    job = server.calls.until("a", lambda job: job.HasField("error"))
    assert job.state == QUEUED
    assert reason_of(job) == "STORAGE_UNAVAILABLE"
    assert "Free space" in job.error.message
    assert str(home.jobs_dir) not in job.error.message
    assert job.HasField("retry_time")
    assert job.progress.done_count == 5
    # Others go on, where they fit.
    jacobians = create_dense(server, "b", 30, 2)
    server.calls.wait("b")
    check_result(server.calls, "b", jacobians)
    server.limit_files(resource.RLIM_INFINITY)
    job = server.calls.wait("a")
    assert not job.HasField("error")
    found = server.calls.read("a").jacobian
    diagonal = np.einsum("bi,ij->bij", np.ones_like(x) * x.sum(1)[:, None], np.eye(512))
    np.testing.assert_allclose(found, diagonal + x[:, :, None], rtol=1e-12)


@pytest.mark.slow
def test_a_disk_without_room_for_the_table_loses_nothing(home):
    server = home.start()
    home.open(100)
    jacobians = create_dense(server, "a", 200, 1)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    wal = home.jobs_dir / "jobs.sqlite-wal"
    # Enough for the points, but not for one more page of the table.
    server.limit_files(wal.stat().st_size)
    with pytest.raises(JacobianError) as raised:
        create_dense(server, "b", 10, 2)
    assert raised.value.reason == "STORAGE_UNAVAILABLE"
    assert server.calls.get("a").progress.done_count == 100
    check_result(server.calls, "a", jacobians[:100])
    assert len(list(home.uploads.iterdir())) == 1
    server.limit_files(resource.RLIM_INFINITY)
    home.open()
    server.calls.wait("a")
    check_result(server.calls, "a", jacobians)
    create_dense(server, "b", 10, 2)
    server.calls.wait("b")


@pytest.mark.slow
def test_results_that_vanish_may_come_back(home):
    server = home.start()
    home.open(100)
    jacobians = create_dense(server, "a", 200, 1)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    away = home.results.with_name("away")
    home.results.rename(away)
    home.open()
    job = server.calls.until("a", lambda job: job.HasField("error"))
    assert (job.state, reason_of(job)) == (QUEUED, "STORAGE_UNAVAILABLE")
    with pytest.raises(JacobianError) as raised:
        server.calls.read("a", 0, 10)
    assert raised.value.reason == "STORAGE_UNAVAILABLE"
    away.rename(home.results)
    server.calls.wait("a")
    check_result(server.calls, "a", jacobians)
    assert max(home.times_computed()[JOB + n] for n in range(BATCH, 100)) == 1


@pytest.mark.slow
def test_the_store_of_one_job_may_come_back(home):
    server = home.start()
    home.open(100)
    jacobians = create_dense(server, "a", 200, 1)
    job = server.calls.until("a", lambda job: job.progress.done_count == 100)
    away = home.jobs_dir / "away"
    home.store(job).rename(away)
    home.open()
    job = server.calls.until("a", lambda job: job.HasField("error"))
    assert (job.state, reason_of(job)) == (QUEUED, "STORAGE_UNAVAILABLE")
    assert not home.store(job).exists()
    away.rename(home.store(job))
    server.calls.wait("a")
    check_result(server.calls, "a", jacobians)


def test_jobs_go_on_when_the_table_comes_back_that_was_away_at_the_start(tmp_path):
    database = tmp_path / "database"
    database.mkdir()
    url = f"sqlite:///{database}/jobs.sqlite"
    with closing(JobHome(tmp_path, JACSERVE_JOBS_DATABASE=url)) as home:
        server = home.start()
        home.open(100)
        create_dense(server, "a", 200, 1)
        server.calls.until("a", lambda job: job.progress.done_count == 100)
        server.kill()
        away = database.rename(tmp_path / "away")
        server = home.start()
        deadline = time.monotonic() + 60
        while "no jobs are run" not in server.errors():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        away.rename(database)
        home.open()
        # Nobody asks for jobs meanwhile.
        while JOB + 199 not in home.times_computed():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.calls.wait("a")


@pytest.fixture
def sourced(tmp_path: Path) -> Iterator[tuple[JobHome, Path, np.ndarray]]:
    """A home that reads a storage root, the root, and the points in it."""
    root = tmp_path / "root"
    root.mkdir()
    x, row = points(400, 3, 1)
    np.save(root / "x.npy", x)
    np.save(root / "row.npy", row)
    roots = json.dumps({"data": str(root)})
    with closing(JobHome(tmp_path, JACSERVE_STORAGE_ROOTS=roots)) as made:
        yield made, root, x


def create_sourced(server: JobServer) -> None:
    sources = ("data/x.npy", "data/row.npy")
    query = jacobian_pb2.Query(
        function="dense",
        quantities=[jacobian_pb2.QUANTITY_JACOBIAN],
        inputs=[
            jacobian_pb2.Input(source=jacobian_pb2.Source(path=path))
            for path in sources
        ],
    )
    spec = jobs_pb2.JobSpec(job_id="a", query=query, batch_size=BATCH)
    head = jobs_pb2.CreateJobRequest(head=spec)
    server.calls.send(iter([head.SerializeToString()]))


@pytest.mark.slow
def test_points_that_vanish_may_come_back(sourced):
    home, root, x = sourced
    server = home.start()
    home.open(100)
    create_sourced(server)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    away = root.with_name("away")
    root.rename(away)
    server.kill()
    server = home.start()
    home.open()
    job = server.calls.until("a", lambda job: job.HasField("error"))
    assert (job.state, reason_of(job)) == (QUEUED, "STORAGE_UNAVAILABLE")
    away.rename(root)
    server.calls.wait("a")
    check_result(server.calls, "a", expected(x))


@pytest.mark.slow
def test_points_of_a_volume_that_is_not_mounted_hold_a_job_up(sourced):
    """Its mount point is still there, and empty."""
    home, root, x = sourced
    server = home.start()
    home.open(100)
    create_sourced(server)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    away = root.with_name("away")
    root.rename(away)
    root.mkdir()
    home.open()
    job = server.calls.until("a", lambda job: job.HasField("error"))
    assert (job.state, reason_of(job)) == (QUEUED, "STORAGE_UNAVAILABLE")
    assert "data/x.npy is not there any more" in job.error.message
    server.stop()
    no_roots = home.start(JACSERVE_STORAGE_ROOTS="{}")
    job = no_roots.calls.until("a", lambda job: "does not name" in job.error.message)
    assert (job.state, reason_of(job)) == (QUEUED, "STORAGE_UNAVAILABLE")
    no_roots.stop()
    server = home.start()
    # Held up as it is made ready, and not only in the midst of its chunks.
    job = server.calls.until("a", lambda job: "not there" in job.error.message)
    assert (job.state, reason_of(job)) == (QUEUED, "STORAGE_UNAVAILABLE")
    root.rmdir()
    away.rename(root)
    server.calls.wait("a")
    check_result(server.calls, "a", expected(x))


@pytest.mark.slow
def test_points_that_have_changed_fail_a_job(sourced):
    home, root, x = sourced
    server = home.start()
    home.open(100)
    create_sourced(server)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    server.kill()
    np.save(root / "x.npy", x + 1.0)
    server = home.start()
    job = server.calls.wait("a", FAILED)
    assert reason_of(job) == "SOURCE_UNREADABLE"
    check_result(server.calls, "a", expected(x[:100]))


def test_points_that_change_while_a_job_runs_fail_it(sourced):
    home, root, x = sourced
    server = home.start()
    home.open(100)
    create_sourced(server)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    with (root / "x.npy").open("r+b") as file:
        file.seek(-x.nbytes, os.SEEK_END)
        file.write((x + 1.0).tobytes())
    home.open()
    job = server.calls.wait("a", FAILED)
    assert reason_of(job) == "SOURCE_UNREADABLE"
    assert "data/x.npy has changed" in job.error.message
    done = job.progress.ready_count
    assert 100 <= done < len(x)
    check_result(server.calls, "a", expected(x[:done]))


@pytest.mark.slow
def test_points_that_are_cut_off_fail_a_job(sourced):
    home, root, x = sourced
    server = home.start()
    home.open(100)
    create_sourced(server)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    with (root / "x.npy").open("r+b") as file:
        file.truncate(200 * x.itemsize * 3)
    home.open()
    job = server.calls.wait("a", FAILED)
    assert reason_of(job) == "SOURCE_UNREADABLE"
    assert "data/x.npy has changed" in job.error.message
    check_result(server.calls, "a", expected(x[:100]))


@pytest.mark.slow
def test_a_job_never_goes_on_with_another_function(home):
    server = home.start()
    home.open(100)
    jacobians = create_dense(server, "a", 200, 1)
    server.calls.until("a", lambda job: job.progress.done_count == 100)
    server.kill()
    home.open()
    changed = home.start(JOB_TEST_FACTOR="2.0")
    job = changed.calls.until("a", lambda job: job.HasField("error"))
    assert (job.state, reason_of(job)) == (QUEUED, "FUNCTION_CHANGED")
    assert job.progress.done_count == 100
    changed.kill()
    server = home.start()
    server.calls.wait("a")
    check_result(server.calls, "a", jacobians)


@pytest.mark.slow
def test_a_function_that_cant_be_traced_fails_a_job(home):
    server = home.start()
    server.calls.create("a", "picky", points(100, 5, 1))
    job = server.calls.wait("a", FAILED)
    assert "there is no fifth pump" in job.error.message
    assert job.progress.done_count == 0


@pytest.mark.slow
def test_a_function_that_raises_fails_a_job(tmp_path):
    with closing(JobHome(tmp_path, JOB_TEST_FAILING_ROW="75")) as home:
        server = home.start()
        home.open(50)
        jacobians = create_dense(server, "a", 400, 1)
        server.calls.until("a", lambda job: job.progress.done_count == 50)
        home.open()
        job = server.calls.wait("a", FAILED)
        assert "the pump is dry at row 75" in job.error.message
        ready = job.progress.ready_count
        assert 50 <= ready <= 70
        check_result(server.calls, "a", jacobians[:ready])
        with pytest.raises(JacobianError) as raised:
            server.calls.read("a")
        assert raised.value.reason == "JOB_NOT_FINISHED"
