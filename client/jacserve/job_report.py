"""How jobs look in a shell: as a table, as JSON, as a bar, as lines."""

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn
from rich.table import Table
from rich.text import Text

from jacserve.job_messages import JobInfo, JobProgress

# Of those that nobody sees at once, as they are in a pipe.
_BETWEEN_LINES_S = 10.0
# So that all of it fits into 80 columns.
_BAR_WIDTH = 12
_COLORS = {
    "queued": "cyan",
    "running": "blue",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}


def print_jobs(jobs: Sequence[JobInfo], console: Console) -> None:
    """Prints jobs as a table.

    Args:
        jobs: The jobs.
        console: Where to.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("id", no_wrap=True, overflow="fold")
    has_owners = any(job.owner for job in jobs)
    if has_owners:
        table.add_column("owner")
    for heading in ("state", "function", "quantities"):
        table.add_column(heading)
    for heading in ("progress", "rate", "left", "created"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job in jobs:
        progress, color = job.progress, _COLORS[job.state]
        reason = f" ({job.error.reason or job.error.code})" if job.error else ""
        is_running = job.state == "running"
        table.add_row(
            escape(job.id),
            *([escape(job.owner or "nobody")] if has_owners else []),
            f"[{color}]{job.state}{escape(reason)}[/{color}]",
            escape(job.function),
            ", ".join(job.quantities),
            f"{progress.fraction:.1%}",
            f"{si(progress.points_per_s)}/s" if is_running else "",
            _left(progress) if is_running else "",
            _ago(job.created),
        )
    console.print(table)


def as_json(job: JobInfo) -> dict[str, Any]:
    """Returns a job in JSON's types.

    Args:
        job: The job.

    Returns:
        All that is known of it; times as ISO 8601 has them.
    """
    progress, error = job.progress, job.error
    return {
        "id": job.id,
        "owner": job.owner,
        "function": job.function,
        "quantities": list(job.quantities),
        "state": job.state,
        "error": error and {"reason": error.reason, "message": str(error)},
        "progress": {
            "point_count": progress.point_count,
            "done_count": progress.done_count,
            "ready_count": progress.ready_count,
            "non_finite_count": progress.non_finite_count,
            "first_non_finite": progress.first_non_finite,
            "points_per_s": progress.points_per_s,
            "estimated_end": _iso(progress.estimated_end),
            "execute_s": progress.execute_s,
            "fraction": progress.fraction,
            "remaining_s": progress.remaining_s,
        },
        "batch_size": job.batch_size,
        "chunk_size": job.chunk_size,
        "output": job.output,
        "created": _iso(job.created),
        "started": _iso(job.started),
        "updated": _iso(job.updated),
        "ended": _iso(job.ended),
        "expires": _iso(job.expires),
        "retries": _iso(job.retries),
    }


def _iso(time: datetime | None) -> str | None:
    return time and time.isoformat()


def follow(news: Iterable[JobInfo], stream: IO[str]) -> None:
    """Shows how far a job is, for as long as there is news of it.

    Args:
        news: What the server says of it, again and again.
        stream: Where to. A terminal gets a bar; a pipe a line now and then, and the
            last one.
    """
    if stream.isatty():
        _draw(news, Console(file=stream, highlight=False))
    else:
        _list(news, stream)


def _list(news: Iterable[JobInfo], stream: IO[str]) -> None:
    printed_s = -_BETWEEN_LINES_S + time.monotonic()
    for job in news:
        now_s = time.monotonic()
        if job.has_ended or now_s - printed_s >= _BETWEEN_LINES_S:
            print(one_line(job), file=stream, flush=True)
            printed_s = now_s


def _draw(news: Iterable[JobInfo], console: Console) -> None:
    waiting_for = ""
    with Progress(
        *(_State(), BarColumn(_BAR_WIDTH), TaskProgressColumn(), _Numbers()),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=None, job=None)
        last = None
        for last in news:
            counts = last.progress
            progress.update(
                task,
                total=counts.point_count or None,
                completed=counts.done_count,
                job=last,
            )
            # The bar has no room for it.
            if last.state == "queued" and str(last.error or "") != waiting_for:
                waiting_for = str(last.error or "")
                progress.console.print(waiting_for, style="dim", markup=False)
    if last is not None:
        console.print(one_line(last), style=_COLORS[last.state], markup=False)


class _State(ProgressColumn):
    """The job's state."""

    def render(self, task: Task) -> Text:
        job: JobInfo | None = task.fields["job"]
        if job is None:
            return Text("asking the server")
        return Text(_state(job), style=_COLORS[job.state], no_wrap=True)


class _Numbers(ProgressColumn):
    """The points, the rate, the time that is left, and what is not finite."""

    def render(self, task: Task) -> Text:
        job: JobInfo | None = task.fields["job"]
        if job is None:
            return Text("")
        counts = job.progress
        text = Text(
            f"{counts.done_count:,}/{counts.point_count:,} points", no_wrap=True
        )
        if job.state == "running":
            text.append(f"  {si(counts.points_per_s)}/s  {_left(counts)}")
        if counts.non_finite_count:
            text.append(f"  {counts.non_finite_count:,} NaN or Inf", style="yellow")
        return text


def one_line(job: JobInfo) -> str:
    """Returns what there is to say of a job, such as "night-1: running, 37.0% ...".

    Args:
        job: The job.

    Returns:
        One line, for people.
    """
    counts = job.progress
    if job.state == "succeeded":
        took = ""
        if job.started and job.ended:
            took = f" in {duration((job.ended - job.started).total_seconds())}"
        text = f"{job.id}: succeeded, {counts.point_count:,} points{took}"
    else:
        text = (
            f"{job.id}: {_state(job)}, {counts.fraction:.1%} "
            f"({counts.done_count:,} of {counts.point_count:,} points)"
        )
    if job.state == "running":
        text += f", {si(counts.points_per_s)} points/s, {_left(counts)}"
    elif job.state == "queued" and job.error:
        text += f": {job.error}"
    if counts.non_finite_count:
        text += f", {counts.non_finite_count:,} with NaN or Inf"
        if counts.first_non_finite is not None:
            text += f" (point {counts.first_non_finite:,} is one)"
    return text


def _state(job: JobInfo) -> str:
    if job.state == "queued" and job.error:
        return f"waiting: {job.error.reason or job.error.code}"
    return job.state


def _left(progress: JobProgress) -> str:
    left_s = progress.remaining_s
    return "" if left_s is None else f"{duration(left_s)} left"


def _ago(time: datetime | None) -> str:
    if time is None:
        return ""
    # Two clocks need not agree.
    age_s = max(0.0, (datetime.now(UTC) - time).total_seconds())
    return f"{duration(age_s)} ago"


def duration(seconds: float) -> str:
    """Returns a time as people say it, such as "3 min 20 s".

    Args:
        seconds: The time.

    Returns:
        Two units at most.
    """
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {s} s" if minutes else f"{s} s"


def si(number: float) -> str:
    """Returns a number with three digits and an SI prefix, such as "12.3 k".

    Args:
        number: Not negative.

    Returns:
        The number.
    """
    for prefix in ("", "k", "M", "G"):
        if number < 999.5 or prefix == "G":
            break
        number /= 1000
    digits = f"{number:#.3g}".rstrip(".") if prefix else f"{number:.3g}"
    return f"{digits} {prefix}".rstrip()
