"""`jacserve bench`: a function of a running server under load, as a table or JSON."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jacserve import benching
from jacserve.bench_report import Report, as_json, print_report
from jacserve.benching import TURNS, BenchError, Level, Settings
from jacserve.command_line import (
    Name,
    Server,
    Timeout,
    calls_server,
    connected,
    parse_sizes,
    stdout_console,
)
from jacserve.results import Result
from jacserve.vocabulary import QUANTITIES, ModeOption, Quantity

_CONCURRENCY = "1,2,4,8,16,32,64"
_MOST_CALLERS = 1024


@calls_server
def bench(
    server: Server,
    name: Name,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            "-s",
            metavar="NAME=SIZE",
            help="Size of a symbolic dimension; may be repeated.",
            show_default="one that works",
        ),
    ] = None,
    quantities: Annotated[
        list[str] | None,
        typer.Option(
            "--quantity",
            "-q",
            help=f"What to compute: {', '.join(QUANTITIES)}. May be repeated.",
            show_default="jacobian",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", "-b", min=1, help="Points in one call.", show_default="one point"
        ),
    ] = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            help="With --batch: an argument that all points share; may be repeated.",
            show_default="none",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            "-d",
            help="Dtype of the inputs.",
            show_default="the widest the function takes",
        ),
    ] = None,
    mode: Annotated[ModeOption, typer.Option(help="How to differentiate.")] = "auto",
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-c", help="Callers at each level.")
    ] = _CONCURRENCY,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=3600.0,
            help="Seconds of each level, and as many for the empty calls.",
        ),
    ] = 2.0,
    session: Annotated[
        bool, typer.Option("--session", help="Send all calls over one open stream.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Also write the figures here.",
            show_default="none",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    timeout: Timeout = None,
) -> None:
    """Measure a function under load, beside an empty call on the same server.

    Callers in threads of this process call again as soon as they have their answer,
    taking turns with as many callers of an empty call. Ctrl-C ends it with what was
    measured. Example: jacserve bench spherical --batch 64 --concurrency 1,8,64
    """
    # What the server refuses is a figure, too.
    server = replace(server, options={**server.options, "retries": 0})
    with connected(server) as client, ExitStack() as stack:
        at = server.connection()
        counts = _parse_concurrency(concurrency)
        settings = Settings(
            # A word that does not exist is refused with the list of those that do.
            quantities=tuple(cast("list[Quantity]", quantities or ["jacobian"])),
            sizes=parse_sizes(sizes),
            dtype=dtype,
            batch=batch,
            shared=tuple(shared or ()),
            mode=mode,
            timeout_s=timeout,
            seed=seed,
        )
        if json_file is not None:
            _check_writable(json_file)  # Before the minutes that it would waste.
        function = client.describe(name, timeout_s=timeout)
        question = benching.random_question(client, function, settings)
        caller = stack.enter_context(client.session()) if session else client

        def call() -> Result:
            return caller.evaluate(
                question.function,
                question.inputs,
                quantities=question.quantities,
                **question.options,
            )

        start = time.perf_counter()
        first = call()
        first_s = time.perf_counter() - start
        empty = stack.enter_context(benching.empty_call(at, question.function))
        with _stopped_by_interrupt() as stop:
            found = _measured(call, empty.make, counts, seconds, stop)
        report = Report(
            target=at.name,
            question=question,
            batch=batch,
            has_session=session,
            seconds=seconds,
            first_s=first_s,
            device=first.device,
            mode=first.mode,
            empty_name=empty.name,
            levels=found,
            is_complete=not stop.is_set(),
        )
        print_report(report, stdout_console())
        if json_file is not None:
            json_file.write_text(json.dumps(as_json(report), indent=2) + "\n")
    if any(level.calls.error_count for level in found):
        raise typer.Exit(1)


def _parse_concurrency(text: str) -> list[int]:
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= _MOST_CALLERS for count in counts):
        raise BenchError(
            f"--concurrency takes numbers from 1 to {_MOST_CALLERS} with commas "
            f"between, such as 1,8,64, not {text}."
        )
    return counts


def _check_writable(path: Path) -> None:
    try:
        path.open("a").close()
    except OSError as error:
        raise BenchError(f"{path} can't be written: {error.strerror}") from error


def _measured(
    call: Callable[[], object],
    empty: Callable[[], object],
    concurrency: Sequence[int],
    seconds: float,
    stop: threading.Event,
) -> list[Level]:
    """Measures all levels, and shows on stderr how far it is."""
    console = Console(stderr=True)
    found: list[Level] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        # Bars are for terminals; a pipe gets a line for each level.
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=2 * TURNS * len(concurrency))

        def on_turn(callers: int) -> None:
            progress.advance(task)
            progress.update(task, description=f"callers: {callers}")

        for level in benching.levels(
            call,
            empty,
            concurrency=concurrency,
            seconds=seconds,
            stop=stop,
            on_turn=on_turn,
        ):
            found.append(level)
            if not console.is_terminal:
                rate = level.calls.calls_per_s
                line = f"callers: {level.calls.callers}, {rate:.0f} calls/s"
                print(line, file=sys.stderr, flush=True)
    return found


@contextmanager
def _stopped_by_interrupt() -> Generator[threading.Event]:
    """Yields an event that Ctrl-C sets; a second Ctrl-C ends the process."""
    stop = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
