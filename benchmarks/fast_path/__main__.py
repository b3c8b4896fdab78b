"""Puts the benchmarks of the fast path together: `python -m benchmarks.fast_path`."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.fast_path import (
    batches,
    coalescing,
    concurrency,
    large_answers,
    machine,
    pipelines,
    plots,
    report,
    restarts,
    small_calls,
    transfers,
)
from benchmarks.fast_path.processes import ROOT
from benchmarks.fast_path.rounds import Effort, Section
from benchmarks.fast_path.setting import Setting, prepared

SECTIONS: Mapping[str, Callable[[Setting], Section]] = {
    "small-calls": small_calls.measure,
    "pipelines": pipelines.measure,
    "batches": batches.measure,
    "transfers": transfers.measure,
    "large-answers": large_answers.measure,
    "concurrency": concurrency.measure,
    "coalescing": coalescing.measure,
    "restarts": restarts.measure,
}
FULL = Effort(rounds=7, calls=150, seconds=0.5)
QUICK = Effort(rounds=2, calls=50, seconds=0.2)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two rounds: whether it works, no figures.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where functions run: cpu or gpu.")
    ] = "cpu",
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(SECTIONS)}; may be repeated."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="The folder for the figures and plots.")
    ] = ROOT / "build" / "bench",
) -> None:
    """Measure the fast path beside its floors.

    The status is 0 also where a target is missed.
    """
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(f"there is no section {', '.join(sorted(unknown))}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not _has_device(device):
        console.print(f"Skipped: JAX finds no {device} here.")
        return
    effort = QUICK if quick else FULL
    described = {"device": device, **machine.describe()}
    report.print_machine(described, console)
    sections: dict[str, Section] = {}
    with (
        tempfile.TemporaryDirectory(prefix="jacserve-bench-") as cache_dir,
        prepared(effort, device, Path(cache_dir)) as setting,
    ):
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
    output.mkdir(parents=True, exist_ok=True)
    file = output / "fast-path.json"
    report.write_json(file, described, effort, sections)
    drawn = plots.draw(report.curves(sections), output)
    console.print(f"\nWritten: {', '.join(map(str, [file, *drawn]))}", highlight=False)
    verdicts = [row.is_met for row in rows if row.target is not None]
    console.print(f"{verdicts.count(False)} of {len(verdicts)} targets missed.")


def _has_device(device: str) -> bool:
    """Asks another process: JAX is not started in this one, nor what it would hold."""
    code = f"import jax; jax.devices({device!r})"
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT
    )
    return asked.returncode == 0


if __name__ == "__main__":
    app()
