"""`jacserve jobs`: batch jobs from a shell."""

import json
import re
import sys
import typing
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from jacserve import array_files, job_files, job_report
from jacserve.array_files import ArrayTextError
from jacserve.command_line import (
    Cast,
    Cotangents,
    Dtype,
    MatrixLayout,
    Mode,
    Name,
    Quantities,
    Server,
    Tangents,
    Timeout,
    Wrt,
    calls_server,
    connected,
    stdout_console,
)
from jacserve.functions import FunctionInfo
from jacserve.job_messages import JobInfo, OnError
from jacserve.jobs import Job
from jacserve.queries import JobArray, JobInputs, JobOptions, Source
from jacserve.vocabulary import JOB_STATES, JobState, Quantity

_INTERRUPTED = 130
_CANCELLED = 3
_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}

Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
Owner = Annotated[
    str,
    typer.Option(
        help="Whose job, such as token:alice; for administrators.",
        show_default="one's own",
    ),
]

jobs = typer.Typer(
    help="Batch jobs: queries about millions of points.", no_args_is_help=True
)


@jobs.command()
@calls_server
def submit(
    server: Server,
    name: Name,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            help="Points that are sent: an .npy file, JSON text, or NAME= and one of "
            "these; or an .npz file of arrays by name. Once for each argument.",
            show_default="none",
        ),
    ] = None,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="NAME=PATH[:ARRAY]",
            help="Points that the server has: a path in one of its storage roots, such "
            "as x=data/points.zarr:x. Once for each argument.",
            show_default="none",
        ),
    ] = None,
    quantities: Quantities = None,
    id: Annotated[
        str | None,
        typer.Option(
            "--id",
            help="The job's id. The same job is not made twice under one id.",
            show_default="a new one",
        ),
    ] = None,
    wrt: Wrt = None,
    mode: Mode = "auto",
    layout: MatrixLayout = None,
    tangents: Tangents = None,
    cotangents: Cotangents = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Points to compute at once.", show_default="what is measured"
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Where the server puts the results: a storage root and the path of a "
            "new Zarr store in it, such as results/night-1.zarr.",
            show_default="the server's own",
        ),
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long it is kept after it has ended, such as 90min, 12h or 7d.",
            show_default="the server's",
        ),
    ] = None,
    on_error: Annotated[
        OnError,
        typer.Option(help="Count points that give NaN or Inf, or fail at the first."),
    ] = "record",
    dtype: Dtype = None,
    cast: Cast = False,
    detach: Annotated[
        bool,
        typer.Option("--detach/--watch", help="Don't wait for the job, or watch it."),
    ] = False,
    timeout: Timeout = None,
) -> None:
    """Submit a job: a function, at as many points as a file holds.

    Prints the job's id, and shows on stderr how far it is. Ctrl-C leaves it running.
    Example: jacserve jobs submit spherical -i x=points.npy -q jacobian --id night-1
    """
    options: JobOptions = {"wrt": wrt or (), "mode": mode, "cast": cast}
    if layout is not None:
        options["layout"] = layout
    with connected(server) as client:
        ttl_s = None if ttl is None else _parse_time(ttl)
        function = client.describe(name, timeout_s=timeout)
        if tangents:
            options["tangents"] = array_files.read_inputs(tangents, function, dtype)
        if cotangents:
            options["cotangents"] = array_files.read_cotangents(
                cotangents, function, dtype
            )
        points = _read_points(inputs or (), sources or (), function, dtype)
        id = uuid.uuid4().hex if id is None else id
        with _interrupted(
            f"Interrupted while the points were sent. The same command with --id {id} "
            "sends them again, or finds the job that there is."
        ):
            job = client.submit_job(
                name,
                points,
                # A word that does not exist is refused with the list of those that do.
                quantities=typing.cast(
                    "list[Quantity]", quantities or ["value", "jacobian"]
                ),
                id=id,
                batch_size=batch_size,
                output=output,
                ttl_s=ttl_s,
                on_error=on_error,
                timeout_s=timeout,
                **options,
            )
        print(job.id, flush=True)
        if not detach:
            _exit_with(_watched(job, server, sys.stderr))


def _read_points(
    inputs: Sequence[str],
    sources: Sequence[str],
    function: FunctionInfo,
    dtype: str | None,
) -> JobInputs:
    """Reads the points that are sent, and adds those that the server has."""
    arrays = array_files.read_inputs(inputs, function, dtype, mapped=True)
    found = list(map(parse_source, sources))
    if not found:
        return arrays
    if not arrays and not any(name for name, _ in found):
        return tuple(source for _, source in found)
    by_name = arrays if isinstance(arrays, dict) else {}
    if len(by_name) < len(arrays) or not all(name for name, _ in found):
        raise ArrayTextError("Give all inputs by name, or none.")
    given: dict[str, JobArray] = {**by_name, **dict(found)}
    if len(given) < len(by_name) + len(found):
        raise ArrayTextError("An input is given twice. Give each once.")
    return given


def parse_source(text: str) -> tuple[str, Source]:
    """Reads where points are.

    Args:
        text: PATH or PATH:ARRAY, with NAME= before it or without.

    Returns:
        The argument's name, or "", and the source.

    Raises:
        ArrayTextError: It names no path.
    """
    name, has_name, rest = text.partition("=")
    if not (has_name and name.isidentifier()):
        name, rest = "", text
    path, _, array = rest.partition(":")
    if not path:
        raise ArrayTextError(
            "--source takes NAME=PATH or NAME=PATH:ARRAY, such as x=data/points.npy, "
            f"not {text}."
        )
    return name, Source(path, array)


def _parse_time(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d*)?) ?(s|min|h|d|w)?", text)
    if match is None:
        raise ArrayTextError(
            f"--ttl takes a time such as 90min, 12h or 7d, not {text}."
        )
    return float(match[1]) * _SECONDS[match[2] or ""]


@jobs.command("list")
@calls_server
def list_jobs(
    server: Server,
    states: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            help=f"Only jobs in this state: {', '.join(JOB_STATES)}. May be repeated.",
            show_default="all",
        ),
    ] = None,
    owner: Annotated[
        str,
        typer.Option(
            help="Whose jobs, such as token:alice; for administrators.",
            show_default="one's own",
        ),
    ] = "",
    everybodys: Annotated[
        bool, typer.Option("--all", help="Everybody's jobs; for administrators.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout: Timeout = None,
) -> None:
    """List the jobs of a server, the newest first.

    Example: jacserve jobs list --state running --state queued
    """
    with connected(server) as client:
        # A word that does not exist is refused with the list of those that do.
        asked = typing.cast("list[JobState]", states or [])
        whose = "-" if everybodys else owner
        found = client.jobs(asked, owner=whose, timeout_s=timeout)
    if as_json:
        print(json.dumps(list(map(job_report.as_json, found)), indent=2))
    else:
        job_report.print_jobs(found, stdout_console())


@jobs.command()
@calls_server
def watch(server: Server, id: Id, owner: Owner = "", timeout: Timeout = None) -> None:
    """Show how far a job is, until it ends. Ctrl-C leaves it running.

    Ends with status 0 when the job has succeeded, 1 when it has failed and 3 when it
    was cancelled. Example: jacserve jobs watch night-1
    """
    with connected(server) as client:
        job = client.job(id, owner=owner, timeout_s=timeout)
        _exit_with(_watched(job, server, sys.stdout))


@jobs.command()
@calls_server
def cancel(server: Server, id: Id, owner: Owner = "", timeout: Timeout = None) -> None:
    """Stop a job. What is computed can be fetched with --ready.

    Example: jacserve jobs cancel night-1
    """
    with connected(server) as client:
        print(
            job_report.one_line(client.job(id, owner=owner, timeout_s=timeout).cancel())
        )


@jobs.command()
@calls_server
def fetch(
    server: Server,
    id: Id,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A file .npz; .npy for one array; or .parquet for small ones, a row "
            "for each point.",
        ),
    ],
    quantities: Annotated[
        list[str] | None,
        typer.Option(
            "--quantity",
            "-q",
            help="A quantity to fetch; may be repeated.",
            show_default="all of the job's",
        ),
    ] = None,
    ready: Annotated[
        bool,
        typer.Option(
            "--ready",
            help="Don't wait for the job: fetch the points before the first that is "
            "not computed.",
        ),
    ] = False,
    owner: Owner = "",
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds to look the job up, and not to wait for it or its results.",
            show_default="no limit",
        ),
    ] = None,
) -> None:
    """Write the results of a job to a file; wait for the job if need be.

    Example: jacserve jobs fetch night-1 -o night-1.npz
    """
    with connected(server) as client:
        job_files.check_path(output)  # Before the minutes that it would waste.
        job = client.job(id, owner=owner, timeout_s=timeout)
        if not ready and not job.done():
            ended = _watched(job, server, sys.stderr)
            if ended.state != "succeeded":
                _exit_with(ended)
        count = job.progress().ready_count if ready else None
        if count == 0:
            raise ArrayTextError(f"job {id} has computed no points yet.")
        console = Console(stderr=True)
        with (
            _interrupted(f"Interrupted. {output} is not written."),
            Progress(
                *(TextColumn("writing {task.fields[path]}"), BarColumn()),
                TaskProgressColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ) as progress,
        ):
            task = progress.add_task("", path=output.name)
            job.save(
                output,
                typing.cast("list[Quantity] | None", quantities or None),
                count=count,
                on_progress=lambda done, total: progress.update(
                    task, completed=done, total=total
                ),
            )


@jobs.command()
@calls_server
def delete(server: Server, id: Id, owner: Owner = "", timeout: Timeout = None) -> None:
    """Stop a job and delete it. Results that were put into an --output stay.

    Example: jacserve jobs delete night-1
    """
    with connected(server) as client:
        client.job(id, owner=owner, timeout_s=timeout).delete()
    print(f"{id} is deleted.")


def _watched(job: Job, server: Server, stream: IO[str]) -> JobInfo:
    """Watches a job to its end; Ctrl-C ends the program, and not the job."""
    with _interrupted(
        "Detached. The job goes on; come back with: "
        f"jacserve jobs watch {job.id}{server.arguments()}"
    ):
        job_report.follow(job.watch(), stream)
    return job.wait()


def _exit_with(job: JobInfo) -> None:
    if job.state == "failed":
        print(f"jacserve: job {job.id} has failed: {job.error}", file=sys.stderr)
        raise typer.Exit(1)
    if job.state == "cancelled":
        raise typer.Exit(_CANCELLED)


@contextmanager
def _interrupted(text: str) -> Generator[None]:
    """Ends the program with some words where Ctrl-C interrupts the block."""
    try:
        yield
    except KeyboardInterrupt:
        print(text, file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None
