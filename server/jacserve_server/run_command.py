"""`jacserve run`: a batch job on this machine, without a server to ask."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jacserve.command_line import (
    Cast,
    Cotangents,
    Dtype,
    MatrixLayout,
    Mode,
    Name,
    Quantities,
    Tangents,
    Wrt,
)
from jacserve_server.command_line import DeviceName, fail, loaded, needing_server

if TYPE_CHECKING:
    from jacserve.client import Client
    from jacserve.job_messages import JobInfo
    from jacserve.jobs import Job
    from jacserve.queries import Source

_INTERRUPTED = 130
# Of the one job in the folder beside the results.
_ID = "run"


def run(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_MODULE",
            help="A Python file, an importable module or MODULE:ATTRIBUTE that "
            "registers functions.",
        ),
    ],
    name: Name,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="A file of points: .npy, .npz, .zarr or .parquet, with :ARRAY where "
            "it has several, and NAME= before it where the function has several "
            "arguments.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The Zarr store to make of the results."),
    ],
    quantities: Quantities = None,
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
    on_error: Annotated[
        Literal["record", "fail"],
        typer.Option(help="Count points that give NaN or Inf, or fail at the first."),
    ] = "record",
    dtype: Dtype = None,
    cast: Cast = False,
    device: DeviceName = None,
) -> None:
    """Compute a function at all points of a file, here, and go on where it stopped.

    What is computed is kept chunk by chunk. If it is interrupted, by Ctrl-C or a power
    failure, the same command goes on; until it has ended, what it needs for that is in
    a folder beside the results, OUTPUT.job. Ends with status 0, 1 where it has failed
    or is held up, or 130 where it was interrupted. Example: jacserve run functions.py
    spherical points.npy -o jacobians.zarr -q jacobian
    """
    with needing_server():
        from jacserve import array_files
        from jacserve.array_files import ArrayTextError
        from jacserve.client import Client
        from jacserve.errors import JacobianError
        from jacserve_server.errors import ServiceError
        from jacserve_server.jobs.database import TableError
        from jacserve_server.registration import build_catalog
        from jacserve_server.registry import RegistrationError
        from jacserve_server.running import serving
    output = output.absolute()
    folder = output.with_name(f"{output.name}.job")
    if output.suffix != ".zarr":
        fail(f"{output.name} is no name of a Zarr store. Let it end in .zarr.")
    if not output.parent.is_dir():
        fail(f"{output.parent} is no folder. Make it first.")
    if output.exists() and not folder.exists():
        fail(f"{output.name} is there already. Name another, or remove it.")
    registries = loaded([target])
    options: dict[str, Any] = {"wrt": wrt or (), "mode": mode, "cast": cast}
    if layout is not None:
        options["layout"] = layout
    roots: dict[str, str] = {}
    settings: dict[str, Any] = {
        "jobs_dir": folder,
        "jobs_database": f"sqlite:///{folder / 'jobs.sqlite'}",
        "storage_roots": roots,
        "result_roots": {"output": str(output.parent)},
        "device": device,
    }
    try:
        points = _sources(inputs, roots)
        build_catalog(registries)  # Its problems are the user's, not a server's.
        if folder.exists():
            _forget_hold_up(settings["jobs_database"])
        with (
            serving(*registries, **settings) as server,
            Client(server.target) as client,
        ):
            _forget_failed(client, folder, settings["jobs_database"], output)
            function = client.describe(name)
            if tangents:
                options["tangents"] = array_files.read_inputs(
                    tangents, function, dtype, mapped=True
                )
            if cotangents:
                options["cotangents"] = array_files.read_cotangents(
                    cotangents, function, dtype
                )
            job = client.submit_job(
                name,
                points,
                quantities=quantities or ("value", "jacobian"),  # pyright: ignore[reportArgumentType]
                id=_ID,
                batch_size=batch_size,
                output=f"output/{output.name}",
                on_error=on_error,
                **options,
            )
            ended = _followed(job)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None
    except RegistrationError as error:
        fail(*error.problems)
    except JacobianError as error:
        if error.reason != "JOB_ALREADY_EXISTS":
            fail(str(error))
        fail(
            f"{folder.name} is of a run with other options or other points. Repeat "
            f"that one, name another output, or remove {folder.name} and {output.name}."
        )
    except (ArrayTextError, ServiceError, TableError) as error:
        fail(str(error))
    if ended.state == "succeeded":
        shutil.rmtree(folder, ignore_errors=True)
        return
    print(f"jacserve: {ended.error or ended.state}", file=sys.stderr)
    if ended.state == "queued":
        print("The same command goes on from here.", file=sys.stderr)
    raise typer.Exit(1)


def _sources(
    texts: Sequence[str], roots: dict[str, str]
) -> "tuple[Source, ...] | dict[str, Source]":
    """Reads which files to read; names their folders as storage roots."""
    from jacserve.array_files import ArrayTextError
    from jacserve.jobs_command import parse_source

    in_order: list[Source] = []
    named: dict[str, Source] = {}
    for place, text in enumerate(texts):
        name, source = parse_source(text)
        # Nothing may lead out of a storage root by a link, so that its end is named.
        path = Path(source.path).resolve()
        if not path.exists():
            raise ArrayTextError(f"{source.path} is not there.")
        if path.suffix.lower() != Path(source.path).suffix.lower():
            raise ArrayTextError(
                f"{source.path} is a link to {path.name}, whose name does not tell its "
                "format. Name a copy of it, or link to a file with the same ending."
            )
        root = f"{path.parent.name or 'root'}-{place}"
        roots[root] = str(path.parent)
        found = type(source)(f"{root}/{path.name}", source.array)
        if name in named:
            raise ArrayTextError(f"{name} is given twice. Give each input once.")
        if name:
            named[name] = found
        else:
            in_order.append(found)
    if named and in_order:
        raise ArrayTextError("Give all inputs by name, or none.")
    return named or tuple(in_order)


def _forget_hold_up(database: str) -> None:
    """Has the job tried at once: it is for that that the command is given again."""
    from sqlalchemy import update

    from jacserve_server.jobs import schema
    from jacserve_server.jobs.database import Database

    jobs = schema.jobs
    with closing(Database(database)) as opened, opened.writing() as connection:
        schema.prepare(connection)  # The last run may have ended before it did.
        is_held_up = jobs.c.state == "queued"
        connection.execute(
            update(jobs).where(is_held_up).values(error=None, retry_at=None)
        )


def _forget_failed(client: "Client", folder: Path, database: str, output: Path) -> None:
    """Makes room for a new attempt where the last one has failed for good."""
    from jacserve.errors import NotFoundError
    from jacserve_server.jobs import results
    from jacserve_server.jobs.folder import JobFolder
    from jacserve_server.jobs.storage import Location
    from jacserve_server.jobs.table import JobTable

    try:
        job = client.job(_ID)
    except NotFoundError:
        return
    if job.info().state not in {"failed", "cancelled"}:
        return
    with closing(JobFolder(folder)) as own:
        with closing(JobTable(database, own.id)) as table:
            record = table.find(_ID)
    if record is not None:
        # What is there now may be the user's own.
        location = Location(str(output.parent), output.name, f"output/{output.name}")
        results.remove(location, record.uid)
    job.delete()


def _followed(job: "Job") -> "JobInfo":
    """Shows how far the job is, until it has ended or is held up."""
    from jacserve import job_report

    last = job.info()

    def news() -> "Iterator[JobInfo]":
        nonlocal last
        for last in job.watch():
            yield last
            if last.state == "queued" and last.error is not None:
                return

    job_report.follow(news(), sys.stderr)
    return last
