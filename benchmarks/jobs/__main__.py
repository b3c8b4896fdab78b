"""Puts the benchmarks of batch jobs together: `python -m benchmarks.jobs`."""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.fast_path import machine, report
from benchmarks.fast_path.processes import ROOT
from benchmarks.fast_path.rounds import Effort, Section
from benchmarks.jobs import latency, memory, resume, throughput
from benchmarks.jobs.setting import Scale, Setting

SECTIONS: Mapping[str, Callable[[Setting], Section]] = {
    "throughput": throughput.measure,
    "memory": memory.measure,
    "latency": latency.measure,
    "resume": resume.measure,
}
_MANY = Effort(rounds=3, calls=0, seconds=2.0)
_FEW = Effort(rounds=1, calls=0, seconds=0.3)
_NORMAL = Scale(
    points=1_000_000,
    heavy_points=200_000,
    memory_points=(100_000, 1_000_000, 10_000_000),
    load_points=400_000,
    resume_points=100_000,
    disk_bytes=10 * 10**9,
)
_FULL = replace(_NORMAL, heavy_points=1_000_000, disk_bytes=24 * 10**9)
_QUICK = Scale(
    points=100_000,
    heavy_points=10_000,
    memory_points=(10_000, 100_000, 1_000_000),
    load_points=100_000,
    resume_points=20_000,
    disk_bytes=3 * 10**9,
)
_GB = 10**9

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few points: whether it works, no figures.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="A million points also where each gives 16 KiB."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(SECTIONS)}; may be repeated."),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where jobs are kept meanwhile: the disk to measure.")
    ] = ROOT / "build",
    output: Annotated[Path, typer.Option(help="The folder for the figures.")] = ROOT
    / "build"
    / "bench",
) -> None:
    """Measure batch jobs beside loops in one process.

    The status is 0 also where a target is missed.
    """
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(f"there is no section {', '.join(sorted(unknown))}")
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    effort = _FEW if quick else _MANY
    scale = _QUICK if quick else _FULL if full else _NORMAL
    console = Console(width=None if sys.stdout.isatty() else 160)
    folder.mkdir(parents=True, exist_ok=True)
    described = {**machine.describe(), "disk": _free_disk(folder, scale)}
    report.print_machine(described, console)
    sections: dict[str, Section] = {}
    with tempfile.TemporaryDirectory(prefix="jacserve-bench-", dir=folder) as made:
        setting = Setting(effort, scale, np.random.default_rng(0), Path(made).resolve())
        for name in only or SECTIONS:
            start = time.perf_counter()
            print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
            sections[name] = SECTIONS[name](setting)
            print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    rows = [row for section in sections.values() for row in section.rows]
    report.print_rows(rows, effort, console)
    for section in sections.values():
        for grid in section.grids:
            report.print_grid(grid, console)
    if "throughput" in sections and scale.heavy_points < scale.points:
        console.print(
            f"\nThe Jacobians and determinants of n = 64 are of {scale.heavy_points:,} "
            "points; with --full of a million, which takes 24 GB of disk.",
            highlight=False,
        )
    output.mkdir(parents=True, exist_ok=True)
    file = output / "jobs.json"
    report.write_json(file, described, effort, sections)
    console.print(f"\nWritten: {file}", highlight=False)
    verdicts = [row.is_met for row in rows if row.target is not None]
    console.print(f"{verdicts.count(False)} of {len(verdicts)} targets missed.")


def _free_disk(folder: Path, scale: Scale) -> str:
    """Says how much disk is free, which must be enough."""
    free = shutil.disk_usage(folder).free
    said = f"{free / _GB:.0f} GB free, of which {scale.disk_bytes / _GB:.0f} are needed"
    if free < scale.disk_bytes:
        raise typer.BadParameter(f"{folder} has {said}. Free some, or name another.")
    return said


if __name__ == "__main__":
    app()
