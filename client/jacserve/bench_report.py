"""What `jacserve bench` measured, as a table and as JSON."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jacserve.benching import Level, Question
from jacserve.load import Load, ServerTime

# A narrower console gets two tables.
_WIDE = 110


@dataclass(frozen=True, slots=True)
class _Column:
    """A heading, and what stands below it for each level."""

    heading: str
    cell: Callable[[Level], str]


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """All that was measured.

    Attributes:
        target: The server's address.
        question: What was asked.
        batch: Points in one call; None for one point without a batch axis.
        has_session: Whether the calls went over one session's stream.
        seconds: Seconds of each level.
        first_s: Seconds of the first call, which no level counts: it may compile.
        device: The device that answered it.
        mode: The mode that ran; None where none did, or several.
        empty_name: What the empty call is.
        levels: What each number of callers measured.
        is_complete: Whether nobody interrupted it.
    """

    target: str
    question: Question
    batch: int | None
    has_session: bool
    seconds: float
    first_s: float
    device: str
    mode: str | None
    empty_name: str
    levels: Sequence[Level]
    is_complete: bool

    @property
    def points(self) -> int:
        """Points in one call."""
        return 1 if self.batch is None else self.batch


def as_json(report: Report) -> dict[str, Any]:
    """Returns everything as JSON takes it, NaN as null.

    Args:
        report: What was measured.

    Returns:
        Rates per second, latencies and the server's times in milliseconds.
    """
    question = report.question
    return {
        "target": report.target,
        "function": question.function,
        "inputs": question.inputs_text,
        "quantities": list(question.quantities),
        "batch": report.batch,
        "session": report.has_session,
        "seconds": report.seconds,
        "first_call_ms": report.first_s * 1e3,
        "device": report.device,
        "mode": report.mode,
        "empty_call": report.empty_name,
        "complete": report.is_complete,
        "levels": [_level(level, report.points) for level in report.levels],
    }


def _level(level: Level, points: int) -> dict[str, Any]:
    calls = level.calls
    server = calls.server_time
    return {
        "callers": calls.callers,
        **_figures(calls),
        "points_per_s": calls.calls_per_s * points,
        "errors": calls.error_count,
        "error_messages": list(calls.errors),
        "server": server
        and {
            "queue_ms": server.queue_s * 1e3,
            "compile_ms": server.compile_s * 1e3,
            "execute_ms": server.execute_s * 1e3,
            "coalesced_count": server.coalesced_count,
        },
        "empty": {**_figures(level.empty), "errors": level.empty.error_count},
    }


def _figures(load: Load) -> dict[str, Any]:
    figures = {
        "calls_per_s": load.calls_per_s,
        **{f"p{p}_ms": load.latency_s(p) * 1e3 for p in (50, 90, 99)},
    }
    known = {name: x if math.isfinite(x) else None for name, x in figures.items()}
    return {"calls": len(load.latencies_s), **known}


def print_report(report: Report, console: Console) -> None:
    """Prints a table with a line for each level.

    Args:
        report: What was measured.
        console: Where to.
    """
    question = report.question
    console.print(
        f"[bold]{question.function}[/bold] {escape(question.inputs_text)}: "
        f"{', '.join(question.quantities)}",
        highlight=False,
    )
    route = "one session" if report.has_session else "a call each"
    console.print(
        f"[dim]{report.target}, {report.device}, mode {report.mode or 'none'}; "
        f"{route}, {report.seconds:g} s a level; the first call took "
        f"{report.first_s * 1e3:.3g} ms[/dim]",
        highlight=False,
    )
    if report.levels:
        calls, server = _columns(report)
        if console.width >= _WIDE:
            console.print(_table(report, [*calls, *server]))
        else:
            console.print(_table(report, calls))
            console.print(_table(report, [calls[0], *server]))
        console.print(
            "[dim]Times in ms. queue, compile, execute: the server's own, means. "
            f"empty: a {report.empty_name}, by as many callers in turn.[/dim]",
            highlight=False,
        )
    for message in dict.fromkeys(m for x in report.levels for m in x.calls.errors):
        console.print(f"[red]failed:[/red] {escape(message)}")
    if not report.is_complete:
        console.print("[yellow]Interrupted: this is what was measured.[/yellow]")


def _columns(report: Report) -> tuple[list[_Column], list[_Column]]:
    """Returns the columns of the calls, and those of the server's own time."""
    calls = [
        _Column("callers", lambda level: str(level.calls.callers)),
        _Column("calls/s", lambda level: _rate(level.calls.calls_per_s)),
    ]
    if report.batch is not None:
        calls.append(
            _Column(
                "points/s", lambda level: _rate(level.calls.calls_per_s * report.points)
            )
        )
    calls += [
        _Column("p50", lambda level: _ms(level.calls.latency_s(50))),
        _Column("p90", lambda level: _ms(level.calls.latency_s(90))),
        _Column("p99", lambda level: _ms(level.calls.latency_s(99))),
        _Column("empty/s", lambda level: _rate(level.empty.calls_per_s)),
        _Column("empty p50", lambda level: _ms(level.empty.latency_s(50))),
        _Column("p50 over empty", _over_empty),
    ]
    if any(level.calls.error_count for level in report.levels):
        calls.append(_Column("failed", lambda level: str(level.calls.error_count)))
    server = [
        _Column("queue", _of_server(lambda time: _ms(time.queue_s))),
        _Column("compile", _of_server(lambda time: _ms(time.compile_s))),
        _Column("execute", _of_server(lambda time: _ms(time.execute_s))),
        _Column("coalesced", _of_server(lambda time: f"{time.coalesced_count:.1f}")),
    ]
    return calls, server


def _of_server(show: Callable[[ServerTime], str]) -> Callable[[Level], str]:
    def cell(level: Level) -> str:
        time = level.calls.server_time
        return "-" if time is None else show(time)

    return cell


def _over_empty(level: Level) -> str:
    ratio = level.calls.latency_s(50) / level.empty.latency_s(50)
    return "-" if math.isnan(ratio) else f"{ratio:.2f} x"


def _table(report: Report, columns: Sequence[_Column]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.heading, justify="right")
    for level in report.levels:
        table.add_row(*(column.cell(level) for column in columns))
    return table


def _rate(per_s: float) -> str:
    if math.isnan(per_s):
        return "-"
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"


def _ms(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.3g}"
