"""A minute of everything at once; and that the soak would notice what is wrong."""

import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jacserve
from benchmarks.soak import closed_forms, functions
from benchmarks.soak.__main__ import faults_in
from benchmarks.soak.activities import check_complete
from benchmarks.soak.closed_forms import WrongAnswerError
from benchmarks.soak.roles import calls_in
from benchmarks.soak.server import Absence, Sample, within
from benchmarks.soak.verdict import MIB, Line, flat_lines, print_verdict
from jacserve_server import serving

ROOT = Path(__file__).parents[1]
X = np.array([1.0, 2.0, 3.0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_everything_at_once_holds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--seconds", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-5_000:]
    for activity in ("calls", "jobs", "isolated", "WORKER_DIED", "wrong answers"):
        assert activity in done.stdout


def samples(grown_bytes: int = 0, threads: int = 0, files: int = 0) -> list[Sample]:
    """Ten minutes of a server that takes ever more, or not."""
    return [
        Sample(
            at=float(second),
            memory_bytes=500 * MIB + (second % 7) * MIB + second * grown_bytes,
            threads=60 + second * threads // 60,
            files=30 + second * files // 60,
        )
        for second in range(600)
    ]


def test_a_worker_that_grows_is_noticed() -> None:
    both = zip(samples(), samples(grown_bytes=MIB // 2), strict=True)
    lines = flat_lines([replace(one, worker=other) for one, other in both])
    assert [line.what for line in lines if not line.holds] == ["MiB of the worker"]


def test_a_flat_server_is_flat() -> None:
    assert all(line.holds for line in flat_lines(samples()))


@pytest.mark.parametrize(
    "growth", [{"grown_bytes": MIB // 8}, {"threads": 2}, {"files": 4}]
)
def test_a_server_that_grows_is_noticed(growth: dict[str, int]) -> None:
    assert [line.holds for line in flat_lines(samples(**growth))].count(False) == 1


def test_the_table_says_what_does_not_hold() -> None:
    console = Console(record=True, width=100)
    lines = [Line("lost", "3", "0", False), Line("clients killed", "2")]
    assert not print_verdict(lines, console)
    assert "NO" in console.export_text()
    assert print_verdict(lines[1:], console)


def test_every_quantity_is_asked_for() -> None:
    check_complete()


def test_an_answer_of_another_point_is_noticed() -> None:
    with serving(functions.registry) as server:
        with jacserve.Client(server.target) as client:
            names = ("value", "jacobian", "slogdet", "newton_step")
            result = client.evaluate("cycle", X, quantities=names)
            assert closed_forms.check(result, "cycle", X) == 5
            with pytest.raises(WrongAnswerError, match="value of cycle"):
                closed_forms.check(result, "cycle", X + 1e-3)
            with pytest.raises(WrongAnswerError, match="answered for cubes"):
                closed_forms.check(result, "cubes", X)


def test_faults_are_found_in_a_log() -> None:
    provoked = '{"level": "error", "logger": "jax._src.callback", "message": "failed"}'
    failing = '{"level": "error", "message": "call", "reason": "EXECUTION_FAILED"}'
    fault = '{"level": "error", "logger": "asyncio", "message": "never retrieved"}'
    warning = '{"level": "warning", "logger": "jacserve_server", "message": "slow"}'
    broken = "Exception ignored in: <function>"
    lines = [provoked, failing, fault, warning, broken, "Fatal Python error: Segment"]
    assert faults_in("\n".join(lines)) == [fault, broken]


def test_calls_are_found_in_metrics() -> None:
    with serving(functions.registry, metrics_port=0) as server:
        with jacserve.Client(server.target) as client:
            for _ in range(3):
                client.value("witnessed", X)
            with pytest.raises(jacserve.InvalidRequestError):
                client.value("witnessed", X[:2])
            client.value("cycle", X)
        assert server.metrics_url is not None
        with urllib.request.urlopen(server.metrics_url) as answer:
            text = answer.read().decode()
    assert calls_in(text, "witnessed@1") == {"OK": 3, "INVALID_ARGUMENT": 1}


def test_an_absence_explains_what_fell_into_it() -> None:
    absences = [Absence(10.0, 15.0, "SIGKILL")]
    moments = [9.0, 10.0, 14.0, 16.0, 21.0]
    found = [within(at, absences, slack_s=5.0) for at in moments]
    assert found == [False, True, True, True, False]
