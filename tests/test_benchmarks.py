"""The benchmarks run, whatever their figures are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: object, package: str = "benchmarks.fast_path") -> str:
    done = subprocess.run(
        [sys.executable, "-m", package, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_fast_path(tmp_path: Path) -> None:
    printed = run("--quick", "--output", tmp_path)
    report = json.loads(
        (tmp_path / "fast-path.json").read_text(), parse_constant=pytest.fail
    )
    assert {row["section"] for row in report["rows"]} == {
        "small-calls", "pipelines", "transfers", "large-answers", "concurrency",
        "coalescing", "restarts",
    }  # fmt: skip
    for row in report["rows"]:
        assert row["name"] in printed
        assert row["least"] <= (row["ratio"] or row["figure"]) <= row["most"]
        assert (row["is_met"] is None) == (row["target"] is None)
    [failed] = [row for row in report["rows"] if "failed" in row["name"]]
    assert failed["figure"] == 0
    assert set(report["curves"]) == {"batch", "transfer", "concurrency"}
    for curve in report["curves"]:
        assert (tmp_path / f"{curve}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_is_not_there_is_skipped(tmp_path: Path) -> None:
    printed = run("--device", "tpu", "--output", tmp_path / "nothing")
    assert printed == "Skipped: JAX finds no tpu here.\n"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_batch_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    printed = run(
        "--quick", "--folder", folder, "--output", tmp_path, package="benchmarks.jobs"
    )
    report = json.loads(
        (tmp_path / "jobs.json").read_text(), parse_constant=pytest.fail
    )
    rows = report["rows"]
    assert {row["section"] for row in rows} == {
        "throughput", "memory", "latency", "resume",
    }  # fmt: skip
    for row in rows:
        assert row["name"] in printed
        assert (row["is_met"] is None) == (row["target"] is None)
    [lost] = [row for row in rows if "lost" in row["name"]]
    assert lost["figure"] == 0
    assert not list(folder.iterdir())
