"""`jacserve top` and `jacserve release`: how a server is, for whoever runs it."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from jacserve.client import Client
from jacserve.command_line import (
    Name,
    Server,
    Timeout,
    calls_server,
    connected,
    plainly,
    stdout_console,
)
from jacserve.errors import DeadlineError, UnavailableError
from jacserve.top_report import Look, View, as_json, frame

# A server that has said nothing for so long is away.
_TIMEOUT_S = 3.0


@calls_server
def top(
    server: Server,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600.0, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="Print one frame, with the rates of one interval, and end."
        ),
    ] = False,
    as_lines: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: a line for each server and look."),
    ] = False,
) -> None:
    """Show how servers are, again and again. Ctrl-C ends it.

    Needs the scope "admin" where there are tokens. In a pipe it prints frame after
    frame. Example: jacserve top --target gpu-1:50051,gpu-2:50051
    """
    with plainly(), ExitStack() as stack:
        targets = server.connection().targets
        clients = [
            stack.enter_context(replace(server, targets=(target,)).client())
            for target in targets
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(clients)))
        looks = _views(targets, clients, pool, interval)
        try:
            if once:
                next(looks)
                _end(_print(next(looks), as_lines=as_lines))
            elif as_lines or not sys.stdout.isatty():
                for count, views in enumerate(looks):
                    if count and not as_lines:
                        print()
                    _print(views, as_lines=as_lines)
            else:
                _draw(looks)
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:
            # Who read it has seen enough; Python would complain at its own end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _views(
    targets: Sequence[str],
    clients: Sequence[Client],
    pool: ThreadPoolExecutor,
    interval_s: float,
) -> Iterator[list[View]]:
    """Looks at all servers at once, again and again."""
    before: Sequence[Look | None] = [None] * len(clients)
    while True:
        start = time.monotonic()
        now = list(pool.map(_look, targets, clients))
        yield list(map(View.of, now, before))
        before = now
        time.sleep(max(0.0, start + interval_s - time.monotonic()))


def _look(target: str, client: Client) -> Look:
    try:
        status = client.status(timeout_s=_TIMEOUT_S)
    except (UnavailableError, DeadlineError) as error:
        return Look(target, datetime.now(UTC), None, error)
    return Look(target, datetime.now(UTC), status)


def _print(views: list[View], *, as_lines: bool) -> list[View]:
    if as_lines:
        for view in views:
            print(json.dumps(as_json(view)), flush=True)
    else:
        console = stdout_console()
        console.print(frame(views))
        console.file.flush()
    return views


def _end(views: list[View]) -> None:
    if any(view.now.status is None for view in views):
        raise typer.Exit(1)


def _draw(looks: Iterator[list[View]]) -> None:
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for views in looks:
            live.update(frame(views, console.height), refresh=True)


@calls_server
def release(server: Server, name: Name, timeout: Timeout = None) -> None:
    """Have a function run again that is in quarantine.

    Needs the scope "admin" where there are tokens. Example: jacserve release slow@1
    """
    with connected(server) as client:
        function = client.release(name, timeout_s=timeout)
    print(f"{function.name}@{function.version} is run.")
