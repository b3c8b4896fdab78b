"""`jacserve jobs`, as a shell sees it."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from jaxtyping import Array, Float
from numpy.lib.format import open_memmap
from typer.testing import CliRunner, Result

import jacserve
from interruptible import COMMAND
from jacserve import array_files, job_report
from jacserve.commands import app
from jacserve.job_messages import JobInfo, decode_job
from jacserve.v1 import jobs_pb2
from jacserve_server import Registry, serving

registry = Registry()
# By what stands in a point: whoever computes it waits for this.
GATES = {-1.0: threading.Event(), -2.0: threading.Event(), -3.0: threading.Event()}
ROW = 2**16  # float64 numbers, half a MiB, so that a chunk has few points.


def hold(x: np.ndarray) -> np.ndarray:
    for number, gate in GATES.items():
        if (np.asarray(x) == number).any():
            gate.wait(60)
    return np.zeros_like(x)


@registry.function
def wide(x: Float[Array, ""]) -> Float[Array, "65536"]:
    zero = jax.pure_callback(hold, x, x, vmap_method="broadcast_all")
    return (1.0 / x + zero) * jnp.ones(ROW)


@registry.function
def scaled(x: Float[Array, "3"], a: Float[Array, ""]) -> Float[Array, "3"]:
    return a / x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def target(folder: Path) -> Generator[str]:
    with serving(
        registry, jobs_dir=folder / "jobs", storage_roots={"data": str(folder)}
    ) as server:
        yield server.target


@pytest.fixture(scope="module")
def client(target: str) -> Generator[jacserve.Client]:
    with jacserve.Client(target, timeout_s=60.0) as connected:
        yield connected


@pytest.fixture
def jobs(target: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JACSERVE_TARGET", target)

    def run(*arguments: object, code: int = 0) -> Result:
        done = CliRunner().invoke(app, ["jobs", *map(str, arguments)])
        assert done.exit_code == code, done.output
        assert "\x1b" not in done.output
        return done

    return run


def command(*arguments: str) -> list[str]:
    return [*COMMAND, "jobs", *arguments]


POINTS = np.random.default_rng(0).uniform(0.5, 2.0, size=(1000, 3))


def test_from_a_file_to_a_file(jobs, folder: Path) -> None:
    np.save(folder / "points.npy", POINTS)
    done = jobs(
        "submit", "scaled", "-i", "x=points.npy", "-i", "a=2.0", "-q", "jacobian",
        "--wrt", "x", "--id", "night-1", "--ttl", "2w",
    )  # fmt: skip
    assert done.stdout == "night-1\n"
    assert re.search(r"night-1: succeeded, 1,000 points in \d+ s\n$", done.stderr)
    jobs("fetch", "night-1", "-o", "out.npy")
    truth = -2.0 / POINTS[:, :, None] ** 2 * np.eye(3)
    np.testing.assert_allclose(np.load(folder / "out.npy"), truth)
    jobs("fetch", "night-1", "-o", "out.npz", "-q", "jacobian")
    with np.load(folder / "out.npz") as saved:
        np.testing.assert_allclose(saved["jacobian"], truth)
        assert saved["finite_points"].all()
    done = jobs(
        "submit", "scaled", "--source", "x=data/out.npz:jacobian", "-i", "a=2.0",
        code=1,
    )  # fmt: skip
    assert "x has shape [1000, 3, 3]" in done.stderr
    id = jobs(
        "submit", "scaled", "--source", "x=data/points.npy", "-i", "a=2.0", "--detach"
    ).stdout.strip()
    assert jobs("watch", id).stdout.startswith(f"{id}: ")


def test_an_archive_is_sent_without_being_loaded(jobs, client, folder: Path) -> None:
    np.savez_compressed(folder / "all.npz", x=POINTS, a=2.0)
    function = client.describe("scaled")
    found = array_files.read_inputs(["all.npz"], function, None, mapped=True)
    assert isinstance(found, dict)
    assert all(isinstance(array, np.memmap) for array in found.values())
    jobs("submit", "scaled", "-i", "all.npz", "-q", "value", "--id", "archive")
    value = client.job("archive").result().value
    np.testing.assert_allclose(value, 2.0 / POINTS)


def test_the_list(jobs, client) -> None:
    inputs = {"x": POINTS * [np.nan, 1.0, 1.0], "a": 1.0}
    jobs_there = [
        client.submit_job("scaled", inputs, id=id, on_error=on_error)
        for id, on_error in [("list-1", "record"), ("list-2", "fail")]
    ]
    for job in jobs_there:
        job.wait(60)
    heading, *lines = jobs("list").stdout.splitlines()
    assert heading.split() == [
        "id", "state", "function", "quantities", "progress", "rate", "left", "created"
    ]  # fmt: skip
    by_id = {line.split()[0]: line for line in lines}
    assert re.search(
        r"succeeded +scaled@1 +value, jacobian +100.0% +\d+ s ago$", by_id["list-1"]
    )
    assert "failed (RESULT_NOT_FINITE)" in by_id["list-2"]
    listed = json.loads(jobs("list", "--json", "--state", "failed").stdout)
    [found] = [each for each in listed if each["id"] == "list-2"]
    assert found["error"]["reason"] == "RESULT_NOT_FINITE"
    assert found["progress"]["point_count"] == 1000
    assert found["created"].endswith("+00:00")
    done = jobs("watch", "list-2", code=1)
    assert "jacserve: job list-2 has failed: value, jacobian" in done.stderr
    done = jobs("watch", "list-1")
    assert "1,000 with NaN or Inf (point 0 is one)" in done.stdout


def held_points(number: float) -> np.ndarray:
    points = np.arange(64.0)
    points[40] = number
    return points


def test_a_job_that_is_cancelled(jobs, client, folder: Path) -> None:
    client.submit_job(
        "wide", held_points(-1.0), quantities="value", batch_size=8, id="held-1"
    )
    job = client.job("held-1")
    next(iter(job))
    jobs("cancel", "held-1")
    GATES[-1.0].set()
    assert "held-1: cancelled, " in jobs("watch", "held-1", code=3).stdout
    assert "was cancelled" in jobs("fetch", "held-1", "-o", "a.npz", code=1).stderr
    assert not (folder / "a.npz").exists()
    jobs("fetch", "held-1", "-o", "a.npy", "--ready")
    ready = job.progress().ready_count
    assert 16 <= ready < 64
    assert np.load(folder / "a.npy").shape == (ready, ROW)
    assert jobs("delete", "held-1").stdout == "held-1 is deleted.\n"
    assert "held-1" in jobs("watch", "held-1", code=1).stderr


def test_ctrl_c_leaves_the_job_running(jobs, target: str, client) -> None:
    job = client.submit_job(
        "wide", held_points(-2.0), quantities="value", batch_size=8, id="held-2"
    )
    watching = subprocess.Popen(
        command("watch", "held-2", "--target", target),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    first = watching.stdout.readline()
    assert first.startswith("held-2: ")
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert out == ""
    assert err == (
        "Detached. The job goes on; come back with: jacserve jobs watch held-2 "
        f"--target {target}\n"
    )
    assert not job.done()
    GATES[-2.0].set()
    assert "held-2: succeeded, 64 points" in jobs("watch", "held-2").stdout


def test_ctrl_c_while_points_are_sent(
    target: str, folder: Path, tmp_path: Path, client
) -> None:
    # Not on the disk, and much to send.
    open_memmap(tmp_path / "x.npy", "w+", "float64", (2**27,)).flush()
    submitting = subprocess.Popen(
        command("submit", "wide", "-i", "x=x.npy", "--target", target),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((folder / "jobs" / "uploads").glob("*.*")):
        assert submitting.poll() is None, submitting.communicate()
        time.sleep(0.01)
    submitting.send_signal(signal.SIGINT)
    _, err = submitting.communicate(timeout=30)
    assert submitting.returncode == 130
    found = re.fullmatch(
        r"Interrupted while the points were sent. The same command with --id (\w{32}) "
        r"sends them again, or finds the job that there is.\n",
        err,
    )
    assert found, err
    with pytest.raises(jacserve.NotFoundError):
        client.job(found[1])


def test_a_bar_in_a_terminal(target: str, client) -> None:
    job = client.submit_job(
        "wide", held_points(-3.0), quantities="value", batch_size=8, id="held-3"
    )
    next(iter(job))
    leader, follower = pty.openpty()
    watching = subprocess.Popen(
        command("watch", "held-3", "--target", target),
        stdout=follower,
        stderr=follower,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    )
    os.close(follower)
    shown = ""
    try:
        while "NaN or Inf" not in shown:
            shown += os.read(leader, 65536).decode(errors="replace")
        GATES[-3.0].set()
        while "succeeded, 64 points" not in shown:
            shown += os.read(leader, 65536).decode(errors="replace")
        assert watching.wait(30) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(leader)
    assert re.search(r"running.*━.*\d+%.*\d+/64 points.*\x1b\[33m +1 NaN or Inf", shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "scaled", "-i", "no.npy"], "no.npy can't be read"),
        (["submit", "scaled", "--source", "data/x.npy"], "data/x.npy is not there"),
        (
            ["submit", "scaled", "--source", "x=a", "-i", "x=[1]"],
            "An input is given twice",
        ),
        (
            ["submit", "scaled", "--source", "x=a", "--source", "b"],
            "all inputs by name",
        ),
        (["submit", "scaled", "--source", "a", "-i", "[1]"], "all inputs by name"),
        (["submit", "scaled", "--source", "x=:a"], "--source takes NAME=PATH"),
        (["submit", "scaled", "-i", "[1]", "--ttl", "soon"], "not soon"),
        (["submit", "scaled", "-i", "x=[1,2,3]", "-i", "a=1"], "no array has an axis"),
        (["submit", "sclaed"], "Did you mean scaled?"),
        (["list", "--state", "asleep"], "'asleep', which does not exist"),
        (["watch", "nobody"], "nobody"),
        (["cancel", "nobody"], "nobody"),
        (["delete", "nobody"], "nobody"),
        (["fetch", "nobody", "-o", "a.npz"], "nobody"),
        (["fetch", "nobody", "-o", "a.txt"], "none of .npy, .npz, .parquet"),
        (["fetch", "nobody", "-o", "no/a.npz"], "no folder no"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(jobs, arguments, words: str) -> None:
    done = jobs(*arguments, code=1)
    assert words in done.stderr
    assert done.stderr.startswith("jacserve: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_has_examples(jobs) -> None:
    for each in ("submit", "list", "watch", "cancel", "fetch", "delete"):
        assert f"Example: jacserve jobs {each}" in jobs(each, "--help").stdout


def news(state: int, done: int, **fields) -> JobInfo:
    progress = jobs_pb2.JobProgress(
        point_count=1000, done_count=done, points_per_second=50.0
    )
    name, at = "jobs/a", cast("jobs_pb2.JobState", state)
    message = jobs_pb2.Job(name=name, state=at, progress=progress, **fields)
    return decode_job(message, "host:1")


def test_what_a_timeout_is_for(jobs) -> None:
    said = " ".join(jobs("fetch", "--help").stdout.replace("│", "").split())
    assert "not to wait for it" in said


def test_a_pipe_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    running = [news(jobs_pb2.JOB_STATE_RUNNING, done) for done in range(1000)]
    ended = news(jobs_pb2.JOB_STATE_SUCCEEDED, 1000)
    job_report.follow([*running, ended], stream)
    assert stream.getvalue().splitlines() == [
        "a: running, 0.0% (0 of 1,000 points), 50 points/s, 20 s left",
        "a: succeeded, 1,000 points",
    ]


def test_what_holds_a_job_up_is_said() -> None:
    info = error_details_pb2.ErrorInfo(reason="STORAGE_UNAVAILABLE", domain="jacserve")
    error = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="the disk is full.")
    error.details.add().Pack(info)
    assert job_report.one_line(news(jobs_pb2.JOB_STATE_QUEUED, 0, error=error)) == (
        "a: waiting: STORAGE_UNAVAILABLE, 0.0% (0 of 1,000 points): the disk is full."
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (0.5, "0.5"), (12.34, "12.3"), (999, "999"), (999.7, "1.00 k"),
        (12345, "12.3 k"), (123456, "123 k"), (2.5e6, "2.50 M"), (7.1e9, "7.10 G"),
    ],
)  # fmt: skip
def test_numbers_with_prefixes(number: float, text: str) -> None:
    assert job_report.si(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (59.4, "59 s"), (59.7, "1 min 0 s"), (61, "1 min 1 s"),
        (3599.9, "1 h 0 min"), (7260, "2 h 1 min"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert job_report.duration(seconds) == text
