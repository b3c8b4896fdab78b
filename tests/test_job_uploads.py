"""Uploads of jobs that break off, and that several clients send at once."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import grpc
import numpy as np
import pytest

import job_client_process
from jacserve.errors import InvalidRequestError, JacobianError, NotFoundError
from job_calls import PATIENCE_S, SUCCEEDED, JobCalls, points, upload
from job_functions import JOB
from job_servers import JobHome, JobServer
from zoo import spherical_jacobian

MANY = 200_000  # Points that take several pieces.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobHome]:
    with closing(JobHome(tmp_path_factory.mktemp("jobs"))) as made:
        yield made


@pytest.fixture(scope="module")
def server(home: JobHome) -> JobServer:
    return home.start()


@pytest.fixture(scope="module")
def other(home: JobHome) -> JobServer:
    """Only for tests at the end: it removes its files in its own time."""
    return home.start()


def until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_nothing_left(home: JobHome, server: JobServer, job_id: str) -> None:
    """Neither a job nor files of it; and the id is as good as new."""
    until(lambda: not any(home.uploads.iterdir()))
    with pytest.raises(NotFoundError) as raised:
        server.calls.get(job_id)
    assert raised.value.reason == "JOB_NOT_FOUND"
    x, row = points(20, 3, 1)
    server.calls.create(job_id, "dense", (x, row))
    server.calls.wait(job_id)
    jacobians = [spherical_jacobian(each) for each in x]
    np.testing.assert_allclose(server.calls.read(job_id).jacobian, jacobians, 1e-12)
    server.calls.delete(job_id)
    until(lambda: not any(home.uploads.iterdir()) and not any(home.results.iterdir()))


def test_an_upload_that_is_cancelled_leaves_nothing(home, server):
    blocked = threading.Event()

    def first_parts() -> Iterator[bytes]:
        yield from upload("cut", "dense", points(MANY, 3))[:3]
        blocked.wait()

    call = server.calls.sending(first_parts())
    until(lambda: home.uploads.exists() and any(home.uploads.iterdir()))
    call.cancel()
    blocked.set()
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    check_nothing_left(home, server, "cut")


def test_the_upload_of_a_client_that_is_killed_leaves_nothing(home, server):
    command = [sys.executable, job_client_process.__file__, server.target, "killed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "sent\n"
        until(lambda: any(home.uploads.iterdir()))
        client.kill()
    check_nothing_left(home, server, "killed")


def test_old_arrays_of_no_job_are_removed_after_a_sweep_that_failed(tmp_path):
    with closing(JobHome(tmp_path)) as home:
        server = home.start()
        left, away = home.uploads / "left", home.uploads.with_name("away")
        for job_id in ("first", "second"):
            server.calls.create(job_id, "dense", points(5, 3))
            server.calls.wait(job_id)
        left.mkdir()
        an_hour_ago = time.time() - 3700
        os.utime(left, (an_hour_ago, an_hour_ago))
        home.uploads.rename(away)
        server.calls.delete("first")
        until(lambda: "jobs are not tidied up" in server.errors())
        away.rename(home.uploads)
        server.calls.delete("second")
        until(lambda: not left.exists())


def ends_early(parts: list[bytes]) -> list[bytes]:
    return parts[:-1]


def skips_a_piece(parts: list[bytes]) -> list[bytes]:
    return [*parts[:2], *parts[3:]]


def repeats_a_piece(parts: list[bytes]) -> list[bytes]:
    return [*parts[:3], *parts[2:]]


def says_too_much(parts: list[bytes]) -> list[bytes]:
    return [*parts, parts[-1]]


def has_no_pieces(parts: list[bytes]) -> list[bytes]:
    return [parts[0], b"\x0a\x00"]


@pytest.mark.parametrize(
    "spoil", [ends_early, skips_a_piece, repeats_a_piece, says_too_much, has_no_pieces]
)
def test_an_upload_that_is_no_stream_of_pieces_leaves_nothing(home, server, spoil):
    parts = spoil(upload("spoilt", "dense", points(MANY, 3)))
    with pytest.raises(InvalidRequestError) as raised:
        server.calls.send(iter(parts))
    assert raised.value.reason == "STREAM_BROKEN"
    check_nothing_left(home, server, "spoilt")


def test_an_upload_that_is_empty_is_refused(server):
    with pytest.raises(InvalidRequestError) as raised:
        server.calls.send(iter([]))
    assert raised.value.reason == "STREAM_BROKEN"


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Makes calls at the same moment; returns what they return or raise."""
    barrier = threading.Barrier(len(calls))

    def made(call: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return call()
        except JacobianError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(made, calls))


@pytest.mark.parametrize("are_two", [False, True], ids=["one-server", "two-servers"])
def test_a_job_that_is_sent_twice_at_once_is_one_job(home, server, other, are_two):
    targets = [server.target, (other if are_two else server).target]
    with ExitStack() as stack:
        clients = [stack.enter_context(JobCalls(target)) for target in targets]
        for turn in range(10):
            job_id, number = f"same-{are_two}-{turn}", 10 + 20 * are_two + turn
            sent = upload(job_id, "dense", points(50, 3, number), batch_size=10)
            jobs = at_once([lambda c=c, s=sent: c.send(iter(s)) for c in clients])
            assert [job.name for job in jobs] == [f"jobs/{job_id}"] * 2
            assert jobs[0].output == jobs[1].output
            assert jobs[0].create_time == jobs[1].create_time
        for turn in range(10):
            job_id, number = f"same-{are_two}-{turn}", 10 + 20 * are_two + turn
            clients[0].until(job_id, lambda job: job.progress.done_count == 50)
            times = home.times_computed()
            assert {times[JOB * number + n] for n in range(10, 50)} == {1}
            clients[1].delete(job_id)


@pytest.mark.slow
@pytest.mark.parametrize("are_two", [False, True], ids=["one-server", "two-servers"])
def test_of_two_jobs_of_one_id_there_is_one(server, other, are_two):
    targets = [server.target, (other if are_two else server).target]
    x, row = points(50, 3, 50)
    inputs = [x, x + 0.25]
    won: dict[str, int] = {}
    with ExitStack() as stack:
        clients = [stack.enter_context(JobCalls(target)) for target in targets]
        for turn in range(10):
            job_id = f"either-{are_two}-{turn}"
            sent = [upload(job_id, "dense", (x, row)) for x in inputs]
            calls = [
                lambda c=c, s=s: c.send(iter(s))
                for c, s in zip(clients, sent, strict=True)
            ]
            answers = at_once(calls)
            [lost] = [n for n in (0, 1) if isinstance(answers[n], JacobianError)]
            assert answers[lost].reason == "JOB_ALREADY_EXISTS"
            assert answers[lost].code == "ALREADY_EXISTS"
            won[job_id] = 1 - lost
        for job_id, winner in won.items():
            clients[1].until(job_id, lambda job: job.state == SUCCEEDED)
            jacobians = [spherical_jacobian(each) for each in inputs[winner]]
            found = clients[1 - winner].read(job_id).jacobian
            np.testing.assert_allclose(found, jacobians, rtol=1e-12, atol=1e-14)
            clients[1 - winner].delete(job_id)
