"""`jacserve bench`, over the wire; and the load that it is made of."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

import jacserve
from jacserve import benching, load
from jacserve.commands import app
from jacserve.connection import connection
from jacserve.v1 import jacobian_pb2 as pb
from server_process import server_process

FUNCTIONS = Path(__file__).parents[2] / "examples" / "functions.py"
BENCH = (sys.executable, "-m", "jacserve", "bench")


@pytest.fixture(scope="module")
def target() -> Generator[str]:
    with server_process(FUNCTIONS) as server:
        yield server.target


def environment(target: str) -> dict[str, str]:
    return {**os.environ, "JACSERVE_TARGET": target, "COLUMNS": "160"}


@pytest.fixture
def bench(target: str, tmp_path: Path):
    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*BENCH, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=environment(target),
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def test_the_figures_agree_with_each_other(bench, tmp_path: Path) -> None:
    done = bench(
        "rosenbrock", "-s", "n=5", "-d", "float32", "-q", "gradient", "-q", "hvp",
        "-q", "vjp", "-b", 4, "-c", "1,3", "--seconds", 0.4, "--json", "all.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "all.json").read_text(), parse_constant=pytest.fail)
    assert report["function"] == "rosenbrock@1"
    assert report["inputs"] == "x: float32[4, 5]"
    assert report["quantities"] == ["gradient", "hvp", "vjp"]
    assert report["complete"]
    assert report["empty_call"] == "health check"
    assert [level["callers"] for level in report["levels"]] == [1, 3]
    for level in report["levels"]:
        for figures in (level, level["empty"]):
            assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"]
            assert figures["errors"] == 0
            # Four turns of 0.1 s, and the last call of each caller beyond.
            seconds = figures["calls"] / figures["calls_per_s"]
            assert 0.4 <= seconds < 5.0
            # In a closed loop, callers = rate x mean latency; no median is above
            # twice the mean.
            mean_ms = level["callers"] / figures["calls_per_s"] * 1e3
            assert figures["p50_ms"] <= 2 * mean_ms
        assert level["points_per_s"] == pytest.approx(4 * level["calls_per_s"])
        server = level["server"]
        assert 0 < server["execute_ms"] < level["p99_ms"]
        assert server["compile_ms"] == 0
        assert server["coalesced_count"] >= 1
    lines = done.stdout.splitlines()
    assert lines[0] == "rosenbrock@1 x: float32[4, 5]: gradient, hvp, vjp"
    assert lines[2].split()[:6] == [
        "callers", "calls/s", "points/s", "p50", "p90", "p99"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[3:5]] == ["1", "3"]
    # A pipe gets a line for each level, and no bars.
    assert [line.split(",")[0] for line in done.stderr.splitlines()] == [
        "callers: 1", "callers: 3"
    ]  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr


def test_arguments_may_be_shared(bench, tmp_path: Path) -> None:
    bench(
        "classifier", "-b", 2, "--shared", "weights", "-c", 1, "--seconds", 0.05,
        "--json", "shared.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "shared.json").read_text())
    assert report["inputs"] == "pixels: float64[2, 784], weights: float64[10, 785]"


def test_calls_may_share_one_session(bench, tmp_path: Path) -> None:
    done = bench(
        "spherical", "--session", "-c", 2, "--seconds", 0.2, "--json", "session.json"
    )
    report = json.loads((tmp_path / "session.json").read_text())
    assert report["session"]
    assert "one session" in done.stdout
    [level] = report["levels"]
    assert level["errors"] == 0
    assert level["calls"] > level["callers"]


def test_interrupted_it_prints_what_was_measured(target: str, tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    levels = ",".join(["1"] * 200)
    with subprocess.Popen(
        [*BENCH, "spherical", "-c", levels, "--seconds", "0.4", "--json", file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(target),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("callers: 1")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in stderr
    assert "Interrupted: this is what was measured." in stdout
    report = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert not report["complete"]
    assert 1 <= len(report["levels"]) < 200
    assert report["levels"][0]["calls"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sphericl"], "Did you mean spherical?"),
        (["spherical", "-s", "n=3"], "has no dimension n by name; it has none."),
        (["rosenbrock", "-s", "m=3"], "has no dimension m by name; it has n."),
        (["rosenbrock", "-s", "n"], "NAME=SIZE"),
        (["rosenbrock", "-d", "int8"], "takes int8. Take one of float64, float32"),
        (["spherical", "-q", "jacobi"], "'jacobi'"),
        (["spherical", "-q", "gradient"], "gradient"),
        (["spherical", "-c", "0,2"], "numbers from 1 to 1024"),
        (["spherical", "-c", "two"], "not two."),
        (["spherical", "--shared", "y"], "Take one of x."),
        (["spherical", "--json", "no/folder.json"], "can't be written"),
        (["spherical", "--target", "127.0.0.1:1"], "No server answers"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(target: str, arguments, words: str) -> None:
    # Here, since a dozen processes would only start, and end.
    done = CliRunner().invoke(app, ["bench", *arguments], env=environment(target))
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_calls_that_fail_are_counted_and_shown(bench, tmp_path: Path) -> None:
    with server_process(FUNCTIONS, JACSERVE_MAX_QUERIES="1") as server:
        done = bench(
            "rosenbrock", "-s", "n=300", "-q", "hessian", "-c", 8, "--seconds", 0.4,
            "--target", server.target, "--json", "failed.json", code=1,
        )  # fmt: skip
    [level] = json.loads((tmp_path / "failed.json").read_text())["levels"]
    assert level["errors"] > 0
    assert "failed" in done.stdout.splitlines()[2].split()
    assert f"failed: {level['error_messages'][0]}" in done.stdout


def test_a_server_without_health_is_compared_with_its_cheapest_call() -> None:
    describe = grpc.unary_unary_rpc_method_handler(
        lambda request, context: pb.Function(name=request.name),
        pb.GetFunctionRequest.FromString,
        pb.Function.SerializeToString,
    )
    service = pb.DESCRIPTOR.services_by_name["JacobianService"].full_name
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {"GetFunction": describe})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with benching.empty_call(connection(f"127.0.0.1:{port}", {}), "f@1") as empty:
        assert empty.name == "GetFunction"
        assert pb.Function.FromString(empty.make()).name == "f@1"  # pyright: ignore[reportArgumentType]
    server.stop(None).wait()


def test_load_counts_calls_and_callers() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    found = load.run(call, callers=3, seconds=0.2)
    assert (found.callers, most) == (3, 3)
    assert found.error_count == 0
    assert found.server_time is None
    assert 3 <= len(found.latencies_s) <= 60
    assert found.latency_s(0) >= 0.01
    assert found.elapsed_s >= 0.2
    assert found.calls_per_s == len(found.latencies_s) / found.elapsed_s


def test_load_gives_up_on_a_server_that_is_gone() -> None:
    def call() -> None:
        raise jacserve.UnavailableError("nobody there")

    found = load.run(call, callers=2, seconds=60.0)
    assert (found.error_count, found.errors) == (20, ("nobody there",))
    assert found.calls_per_s == 0
    assert np.isnan(found.latency_s(50))


def test_load_ends_with_an_error_that_is_no_answer() -> None:
    def call() -> None:
        raise TypeError("a bug")

    start = time.perf_counter()
    with pytest.raises(TypeError, match="a bug"):
        load.run(call, callers=2, seconds=60.0)
    assert time.perf_counter() - start < 10


def test_loads_join() -> None:
    turns = [load.run(lambda: None, callers=1, seconds=0.01) for _ in range(2)]
    joined = load.joined(turns)
    assert len(joined.latencies_s) == sum(len(turn.latencies_s) for turn in turns)
    assert joined.elapsed_s == sum(turn.elapsed_s for turn in turns)
