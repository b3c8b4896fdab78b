"""What the server's commands share: options, loading, and how they end."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from jacserve_server.registry import Registry

Targets = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE_OR_MODULE...",
        help="Python files, importable modules or MODULE:ATTRIBUTE that register "
        "functions.",
        show_default="all installed entry points of the group jacserve.functions",
    ),
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        help="auto, a platform such as cpu or gpu, or devices, gpu:1 or gpu:0,1.",
        show_default="auto: all GPUs, else the CPU",
    ),
]


@contextmanager
def needing_server() -> Generator[None]:
    """Says what to install where an import of the block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f'{error.name} is missing. Run: pip install "jacserve[server]"')


def loaded(targets: list[str] | None) -> "list[Registry]":
    """Returns the registries of files and modules; ends the program without.

    Args:
        targets: As a user has named them; all entry points where there is none.

    Raises:
        typer.Exit: They can't be loaded, and it was said why.
    """
    from jacserve_server import xla_threads
    from jacserve_server.loading import load_registries
    from jacserve_server.registry import RegistrationError

    xla_threads.spare()  # Before a file of functions makes arrays.
    try:
        return load_registries(targets or [])
    except RegistrationError as error:
        fail(*error.problems)


def fail(*lines: str) -> NoReturn:
    """Ends the program with some words and status 2."""
    for line in lines:
        print(f"jacserve: {line}", file=sys.stderr)
    raise typer.Exit(2)
