"""Prints what was measured, and writes it as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.fast_path.rounds import Effort, Grid, Row, Section


def print_machine(machine: Mapping[str, str], console: Console) -> None:
    """Prints what the figures are measured on."""
    for name, value in machine.items():
        console.print(f"[dim]{name}:[/dim] {escape(value)}", highlight=False)


def print_rows(rows: Sequence[Row], effort: Effort, console: Console) -> None:
    """Prints one line for each figure: its floor, the ratio and the target."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "figure", "floor", "", "ratio", "of rounds", "target", ""):
        is_number = heading in {"figure", "floor", "ratio", "of rounds", "target"}
        table.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        ratio = "" if row.ratio is None else number(row.ratio)
        table.add_row(
            row.name,
            f"{number(row.figure)} {row.unit}".strip(),
            f"{number(row.floor)} {row.unit}" if row.floor is not None else "",
            row.floor_name,
            ratio,
            f"{number(row.least)} - {number(row.most)}",
            "" if row.target is None else str(row.target),
            _verdict(row),
        )
    console.print()
    console.print(table)
    console.print(
        f"[dim]Medians of {effort.rounds} rounds; of rounds: the least and the most of "
        "their ratios, or of the figures where there is no floor.[/dim]",
        highlight=False,
    )


def _verdict(row: Row) -> str:
    if row.is_met is None:
        return ""
    return "[green]met[/green]" if row.is_met else "[red bold]MISSED[/red bold]"


def print_grid(grid: Grid, console: Console) -> None:
    """Prints a table of curves."""
    table = Table(box=None, pad_edge=False)
    for heading in grid.headings:
        table.add_column(heading, justify="right")
    for line in grid.lines:
        table.add_row(*line)
    console.print()
    console.print(f"[bold]{grid.title}[/bold]", highlight=False)
    console.print(table)


def number(value: float) -> str:
    """Returns a number of three digits, or of all that it has before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def write_json(
    path: Path,
    machine: Mapping[str, str],
    effort: Effort,
    sections: Mapping[str, Section],
) -> None:
    """Writes everything.

    Args:
        path: The file.
        machine: What it was measured on.
        effort: How much was measured.
        sections: What was measured, by name.
    """
    report: dict[str, Any] = {
        "machine": dict(machine),
        "effort": asdict(effort),
        "rows": [
            {"section": name, **asdict(row), "is_met": row.is_met}
            for name, section in sections.items()
            for row in section.rows
        ],
        "curves": curves(sections),
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def curves(sections: Mapping[str, Section]) -> dict[str, Any]:
    """Returns the curves of all sections by name."""
    return {
        name: curve
        for section in sections.values()
        for name, curve in section.curves.items()
    }
