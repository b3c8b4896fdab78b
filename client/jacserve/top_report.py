"""How servers look in `jacserve top`: as a frame for a terminal, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jacserve.errors import JacobianError
from jacserve.job_report import duration, si
from jacserve.server_status import DeviceStatus, FunctionStatus, ServerStatus

_BAR_WIDTH = 16
_NO_RATE = "-"


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of a server at some time.

    Attributes:
        target: Its address.
        time: When.
        status: How it was; None where it did not say.
        error: Why it did not.
    """

    target: str
    time: datetime
    status: ServerStatus | None
    error: JacobianError | None = None


@dataclass(frozen=True, slots=True)
class View:
    """A server now, beside what it was before, for rates.

    Attributes:
        now: It now.
        before: It at the look before, if it has been the same process since.
    """

    now: Look
    before: Look | None

    @staticmethod
    def of(now: Look, before: Look | None) -> "View":
        """Returns a server now and before; without before where it is another."""
        is_same = (
            now.status is not None
            and before is not None
            and before.status is not None
            and before.status.start_time == now.status.start_time
            and before.time < now.time
        )
        return View(now, before if is_same else None)

    def rate(self, after: float, before: float) -> float | None:
        """Returns the change for each second; None where it can't be told."""
        if self.before is None:
            return None
        return (after - before) / (self.now.time - self.before.time).total_seconds()


@dataclass(frozen=True, slots=True)
class FunctionRates:
    """A function on all servers.

    Attributes:
        name: Its name with its version.
        calls_per_s: Of late; None where it can't be told.
        errors_per_s: Likewise.
        points_per_s: Likewise.
        call_count: Since the servers started.
        p50_s: The longest of the servers; None where there were none.
        p99_s: Likewise.
        quarantine_reason: Why it is not run any more; empty where it is.
    """

    name: str
    calls_per_s: float | None
    errors_per_s: float | None
    points_per_s: float | None
    call_count: int
    p50_s: float | None
    p99_s: float | None
    quarantine_reason: str


def function_rates(views: Sequence[View]) -> list[FunctionRates]:
    """Adds up what was asked of each function, the busiest first.

    Args:
        views: The servers.

    Returns:
        The functions.
    """
    parts: dict[str, list[FunctionRates]] = {}
    for view in views:
        if view.now.status is None:
            continue
        earlier: Mapping[str, FunctionStatus] = {}
        if view.before is not None and view.before.status is not None:
            earlier = {each.name: each for each in view.before.status.functions}
        for each in view.now.status.functions:
            was = earlier.get(each.name)
            parts.setdefault(each.name, []).append(
                FunctionRates(
                    name=each.name,
                    calls_per_s=view.rate(
                        each.query_count, was.query_count if was else 0
                    ),
                    errors_per_s=view.rate(
                        each.error_count, was.error_count if was else 0
                    ),
                    points_per_s=view.rate(
                        each.point_count, was.point_count if was else 0
                    ),
                    call_count=each.query_count,
                    p50_s=each.p50_s,
                    p99_s=each.p99_s,
                    quarantine_reason=each.quarantine_reason,
                )
            )
    found = [_summed(name, of_name) for name, of_name in parts.items()]
    return sorted(
        found,
        key=lambda x: (not x.quarantine_reason, -(x.calls_per_s or 0), -x.call_count),
    )


def _summed(name: str, parts: Sequence[FunctionRates]) -> FunctionRates:
    def total(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return FunctionRates(
        name=name,
        calls_per_s=total([part.calls_per_s for part in parts]),
        errors_per_s=total([part.errors_per_s for part in parts]),
        points_per_s=total([part.points_per_s for part in parts]),
        call_count=sum(part.call_count for part in parts),
        p50_s=max((part.p50_s or 0 for part in parts), default=0) or None,
        p99_s=max((part.p99_s or 0 for part in parts), default=0) or None,
        quarantine_reason=next(
            (part.quarantine_reason for part in parts if part.quarantine_reason), ""
        ),
    )


def frame(views: Sequence[View], height: int | None = None) -> RenderableType:
    """Draws how servers are.

    Args:
        views: The servers.
        height: The lines that there are; None for as many as it takes.

    Returns:
        What a console prints.
    """
    parts: list[RenderableType] = []
    used = 0
    for view in views:
        lines = _server(view)
        parts += [*lines, ""]
        used += len(lines) + 1
    devices = [
        (view.now.target, device)
        for view in views
        if view.now.status is not None
        for device in view.now.status.devices
    ]
    if devices:
        parts += [_devices(devices, has_targets=len(views) > 1), ""]
        used += len(devices) + 2
    ending = _jobs(views) + _workers(views)
    functions = function_rates(views)
    # The header of the table, and the line that says how many are left out.
    room = None if height is None else max(1, height - used - len(ending) - 3)
    if functions:
        parts += [_functions(functions[:room])]
        if room is not None and len(functions) > room:
            parts.append(f"[dim]and {len(functions) - room} more[/dim]")
        parts.append("")
    return Group(*parts, *ending)


def _server(view: View) -> list[Text]:
    now, status = view.now, view.now.status
    if status is None:
        lines = [_line(f"[bold]{escape(now.target)}[/bold]  [red]away[/red]")]
        text = str(now.error).partition("\n")[0]
        lines.append(_line(f"[dim]{escape(text)}[/dim]"))
        return lines
    state = (
        "[green]serving[/green]"
        if status.is_serving
        else "[yellow]not serving[/yellow]"
    )
    up = duration((now.time - status.start_time).total_seconds())
    load, programs = status.load, status.programs
    before = view.before.status if view.before else None
    calls = view.rate(status.call_count, before.call_count if before else 0)
    errors = view.rate(status.error_count, before.error_count if before else 0)
    asked = programs.hit_count + programs.miss_count
    hits = f", {programs.hit_count / asked:.0%} hits" if asked else ""
    background = f" + {load.background_count} of jobs" if load.background_count else ""
    memory = (
        f"  memory {_bytes(status.resident_bytes)}" if status.resident_bytes else ""
    )
    color = "red" if errors else "none"
    return [
        _line(
            f"[bold]{escape(now.target)}[/bold]  {state}  up {up}  "
            f"[dim]jacserve {escape(status.version)}[/dim]"
        ),
        _line(
            f"[bold]{_rate(calls)}[/bold] calls/s  [{color}]{_rate(errors)} errors/s"
            f"[/{color}]  in flight {load.query_count} of {si(load.max_query_count)}, "
            f"{_bytes(load.size_bytes)}  waiting {load.waiting_count}{background}"
        ),
        _line(
            f"programs {programs.count} of {programs.max_count}{hits}  "
            f"streams {load.stream_count}{memory}"
        ),
    ]


def _devices(
    devices: Sequence[tuple[str, DeviceStatus]], *, has_targets: bool
) -> Table:
    table = _table()
    if has_targets:
        table.add_column("server", no_wrap=True)
    for heading in ("device", "kind"):
        table.add_column(heading, no_wrap=True)
    table.add_column("running", justify="right", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    for target, device in devices:
        table.add_row(
            *([escape(target)] if has_targets else []),
            escape(device.name),
            escape(device.kind),
            f"{device.running_count} of {device.slot_count}",
            _memory(device),
        )
    return table


def _memory(device: DeviceStatus) -> str:
    if device.used_bytes is None:
        return "[dim]not known[/dim]"
    if device.limit_bytes is None:
        return _bytes(device.used_bytes)
    share = min(device.used_bytes / device.limit_bytes, 1.0)
    color = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    full = round(share * _BAR_WIDTH)
    return (
        f"[{color}]{'━' * full}[/{color}][dim]{'─' * (_BAR_WIDTH - full)}[/dim] "
        f"{_bytes(device.used_bytes)} of {_bytes(device.limit_bytes)}"
    )


def _functions(functions: Sequence[FunctionRates]) -> Table:
    table = _table()
    table.add_column("function", no_wrap=True, overflow="ellipsis")
    for heading in ("calls/s", "points/s", "errors/s", "p50", "p99", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for each in functions:
        errors = _rate(each.errors_per_s)
        table.add_row(
            escape(each.name),
            _rate(each.calls_per_s),
            _rate(each.points_per_s),
            f"[red]{errors}[/red]" if each.errors_per_s else errors,
            _seconds(each.p50_s),
            _seconds(each.p99_s),
            si(each.call_count),
            f"[red]quarantine: {escape(each.quarantine_reason)}[/red]"
            if each.quarantine_reason
            else "",
        )
    return table


def _jobs(views: Sequence[View]) -> list[Text]:
    counts: dict[str, int] = {}
    for status in (view.now.status for view in views):
        if status is not None:
            for state, count in status.jobs.items():
                counts[state] = counts.get(state, 0) + count
    words = [f"{count} {state}" for state, count in counts.items() if count]
    return [_line(f"[dim]jobs[/dim]  {', '.join(words)}")] if words else []


def _workers(views: Sequence[View]) -> list[Text]:
    lines: list[Text] = []
    for view in views:
        for worker in view.now.status.workers if view.now.status else ():
            process = (
                f"process {worker.process_id}" if worker.process_id else "starting"
            )
            memory = (
                f", {_bytes(worker.resident_bytes)}" if worker.resident_bytes else ""
            )
            restarts = worker.start_count - 1
            failure = (
                f"  [yellow]restarted {restarts} times: "
                f"{escape(worker.last_failure)}[/yellow]"
                if restarts > 0
                else ""
            )
            lines.append(
                _line(
                    f"[dim]worker[/dim]  {escape(worker.device)}  {process}{memory}"
                    f"{failure}"
                )
            )
    return lines


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))


def _line(markup: str) -> Text:
    """Makes a line that is cut off, not wrapped: frames keep their height."""
    text = Text.from_markup(markup)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _rate(value: float | None) -> str:
    if value is None:
        return _NO_RATE
    return si(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return _NO_RATE
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _bytes(count: int) -> str:
    """Writes a number of bytes as people do, in powers of 1000."""
    return f"{si(count)}B" if count >= 1000 else f"{count} B"


def as_json(view: View) -> dict[str, Any]:
    """Returns a server in JSON's types.

    Args:
        view: The server.

    Returns:
        All that is known of it; times as ISO 8601 has them, and rates where these can
        be told.
    """
    now, status = view.now, view.now.status
    before = view.before.status if view.before else None
    found: dict[str, Any] = {"target": now.target, "time": now.time.isoformat()}
    if status is None:
        error = now.error
        found["error"] = error and {"code": error.code, "message": str(error)}
        return found
    found["error"] = None
    found |= asdict(status)
    for name in ("devices", "functions", "identities", "workers"):
        found[name] = list(found[name])
    found["start_time"] = status.start_time.astimezone(UTC).isoformat()
    found["calls_per_s"] = before and view.rate(status.call_count, before.call_count)
    found["errors_per_s"] = before and view.rate(status.error_count, before.error_count)
    return found
