"""How servers look in `jacserve top`."""

import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import jacserve
import zoo
from interruptible import COMMAND
from jacserve.commands import app
from jacserve.top_report import Look, View, as_json, frame, function_rates
from jacserve_server import RunningServer, serving

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
POLAR = jacserve.FunctionStatus(
    name="polar@1",
    query_count=1000,
    error_count=10,
    point_count=4000,
    execute_s=1.0,
    p50_s=2e-4,
    p99_s=0.05,
    quarantine_reason="",
)
STATUS = jacserve.ServerStatus(
    version="1.2.3",
    start_time=NOW - timedelta(hours=2),
    is_serving=True,
    devices=(
        jacserve.DeviceStatus("gpu:0", "NVIDIA H200", 2, 1, 7 * 10**10, 14 * 10**10),
        jacserve.DeviceStatus("gpu:1", "NVIDIA H200", 2, 0, None, None),
    ),
    load=jacserve.LoadStatus(12, 1024, 5_000_000, 10**9, 3, 2, 4),
    programs=jacserve.ProgramsStatus(14, 256, 99, 1, 3.0),
    jobs={"running": 2, "queued": 0, "succeeded": 5},
    functions=(POLAR,),
    identities=(),
    workers=(
        jacserve.WorkerStatus("gpu:0", 4242, 3, "did not end within 10 s", 3 * 10**8),
    ),
    calls={"OK": 2000, "NOT_FOUND": 5},
    resident_bytes=512_000_000,
)
LATER = replace(
    STATUS,
    functions=(replace(POLAR, query_count=1500, error_count=20, point_count=8000),),
    calls={"OK": 3000, "NOT_FOUND": 15},
)
BEFORE = Look("gpu-1:50051", NOW - timedelta(seconds=2), STATUS)


def drawn(*views: View, width: int = 80, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(frame(views, height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_frame() -> None:
    lines = drawn(View.of(Look("gpu-1:50051", NOW, LATER), BEFORE), height=24)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    text = "\n".join(line.rstrip() for line in lines)
    assert text == (
        "gpu-1:50051  serving  up 2 h 0 min  jacserve 1.2.3\n"
        "505 calls/s  5 errors/s  in flight 12 of 1.02 k, 5.00 MB  "
        "waiting 3 + 2 of jobs\n"
        "programs 14 of 256, 99% hits  streams 4  memory 512 MB\n"
        "\n"
        "device  kind         running  memory\n"
        "gpu:0   NVIDIA H200   1 of 2  ━━━━━━━━──────── 70.0 GB of 140 GB\n"
        "gpu:1   NVIDIA H200   0 of 2  not known\n"
        "\n"
        "function  calls/s  points/s  errors/s     p50    p99   calls\n"
        "polar@1       250    2.00 k         5  200 us  50 ms  1.50 k\n"
        "\n"
        "jobs  2 running, 5 succeeded\n"
        "worker  gpu:0  process 4242, 300 MB  restarted 2 times: "
        "did not end within 10 s"
    )


def test_a_frame_keeps_to_its_lines() -> None:
    many = [
        replace(POLAR, name=f"a_function_with_a_long_name_{n}@1") for n in range(99)
    ]
    bad = replace(POLAR, name="slow@1", quarantine_reason="did not end " * 20)
    status = replace(STATUS, functions=(*many, bad))
    lines = drawn(View.of(Look("gpu-1:50051", NOW, status), BEFORE), height=24)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    # What is in quarantine comes first, however long its reason is.
    first = next(n for n, line in enumerate(lines) if line.startswith("function")) + 1
    assert lines[first].startswith("slow@1")
    assert "quarantine" in lines[first]
    assert any(re.fullmatch(r"and \d+ more *", line) for line in lines)


def test_rates_are_of_one_process() -> None:
    restarted = replace(LATER, start_time=NOW)
    assert View.of(Look("a", NOW, restarted), BEFORE).before is None
    assert View.of(Look("a", NOW, LATER), None).before is None
    away = Look("a", NOW, None, jacserve.UnavailableError("gone"))
    assert View.of(Look("a", NOW, LATER), away).before is None
    [rates] = function_rates([View.of(Look("a", NOW, restarted), BEFORE)])
    assert rates.calls_per_s is None
    assert "-  " in drawn(View(Look("a", NOW, LATER), None))[9]


def test_functions_of_several_servers_are_added_up() -> None:
    slower = replace(LATER, functions=(replace(LATER.functions[0], p99_s=0.5),))
    views = [
        View.of(Look("a", NOW, LATER), BEFORE),
        View.of(Look("b", NOW, slower), replace(BEFORE, target="b")),
        View(Look("c", NOW, None, jacserve.UnavailableError("gone\nfor good")), None),
    ]
    [rates] = function_rates(views)
    assert (rates.calls_per_s, rates.call_count, rates.p99_s) == (500, 3000, 0.5)
    text = "\n".join(drawn(*views))
    assert "c  away" in text
    assert "gone" in text
    assert "for good" not in text
    assert "jobs  4 running, 10 succeeded" in text


def test_json_has_all_of_it() -> None:
    found = as_json(View.of(Look("a", NOW, LATER), BEFORE))
    assert json.loads(json.dumps(found)) == found
    assert found["calls_per_s"] == 505
    assert found["functions"][0]["p99_s"] == 0.05
    away = as_json(View(Look("a", NOW, None, jacserve.UnavailableError("gone")), None))
    assert away["error"] == {"code": "UNKNOWN", "message": "gone"}


def run(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done


def test_once(server: RunningServer) -> None:
    done = run("top", "--target", server.target, "--once", "--interval", "0.2")
    first, second, *_ = done.stdout.splitlines()
    assert re.fullmatch(r"127\.0\.0\.1:\d+  serving  up .+  jacserve 0\.1\.0", first)
    assert re.match(r"[\d.]+ k? ?calls/s  [\d.]+ errors/s  in flight ", second)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_once_of_a_server_that_is_away() -> None:
    command = ("top", "--target", "127.0.0.1:1", "--once", "--interval", "0.2")
    assert "127.0.0.1:1  away" in run(*command, code=1).stdout
    [line] = run(*command, "--json", code=1).stdout.splitlines()
    assert json.loads(line)["error"]["code"] == "UNAVAILABLE"


@contextmanager
def top(*arguments: object) -> Generator[tuple[subprocess.Popen[str], Iterator[str]]]:
    process = subprocess.Popen(
        [*COMMAND, "top", "--interval", "0.1", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, iter(process.stdout.readline, "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_in_a_pipe_it_sees_a_server_go_and_come_back() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with top("--target", f"127.0.0.1:{port}") as (process, lines):
        with serving(zoo.registry, port=port):
            assert any("  serving  " in line for line in lines)
            frame = list(itertools.takewhile(lambda x: "  serving  " not in x, lines))
            assert frame[-1] == "\n"
        assert any("  away" in line for line in lines)
        with serving(zoo.registry, port=port):
            assert any("  serving  " in line for line in lines)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")


def test_who_reads_json_may_stop_at_any_time(server: RunningServer) -> None:
    with top("--json", "--target", server.target) as (process, lines):
        assert json.loads(next(lines))["is_serving"]
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudoterminals")
def test_in_a_terminal_it_draws_and_ctrl_c_ends_it_quietly(
    server: RunningServer,
) -> None:
    import pty

    mine, its = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "top", "--interval", "0.1", "--target", server.target],
        stdout=its,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(its)
    seen = b""
    try:
        while seen.count(b"serving") < 3:
            seen += os.read(mine, 65536)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        seen += os.read(mine, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(mine)
    assert (process.returncode, errors) == (0, "")
    # It leaves the terminal as it was.
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1


def test_release(server: RunningServer) -> None:
    command = ("release", "polar", "--target", server.target)
    assert run(*command).stdout == "polar@1 is run.\n"
    done = run("release", "nothing", "--target", server.target, code=1)
    assert re.search(r"\(request [0-9a-f]{32}\)$", done.stderr.strip())


# The options of the connection, which all commands have.


def test_the_options_may_stand_before_the_command(server: RunningServer) -> None:
    for arguments in (
        ("--target", server.target, "functions"),
        ("functions", "--target", server.target),
        ("--target", "127.0.0.1:1", "functions", "--target", server.target),
        ("--target", server.target, "jobs", "list"),
    ):
        run(*arguments)
    run("--target", server.target, "functions", "--target", "127.0.0.1:1", code=1)
    several = ("--target", server.target, "--target", "127.0.0.1:1")
    assert "polar" in run("functions", *several).stdout


def test_a_token_is_read_from_a_file(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    run("functions", "--target", server.target, "--token-file", file)
    done = run("functions", "--target", "192.0.2.1:1", "--token-file", file, code=1)
    assert "without TLS" in done.stderr
    assert "secret" not in done.stderr
    done = run("functions", "--token-file", tmp_path / "none", code=1)
    assert "can't be read" in done.stderr
