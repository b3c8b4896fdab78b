"""What the commands share: options, the connection, the console."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from jacserve.array_files import ArrayTextError
from jacserve.benching import BenchError
from jacserve.client import Client
from jacserve.errors import JacobianError
from jacserve.pictures import PictureError

Target = Annotated[
    str,
    typer.Option(
        "--target", envvar="JACSERVE_TARGET", help="Address of the server, HOST:PORT."
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", help="Seconds to wait for the answer.", show_default="no limit"
    ),
]


def parse_sizes(texts: Sequence[str] | None) -> dict[str, int]:
    """Reads sizes of symbolic dimensions.

    Args:
        texts: Such as ["n=100"].

    Returns:
        The sizes by name.

    Raises:
        ArrayTextError: A text is not of this form.
    """
    pairs = [text.partition("=") for text in texts or ()]
    for name, _, size in pairs:
        if not name.isidentifier() or not size.isdecimal():
            raise ArrayTextError("--size takes NAME=SIZE, such as n=100.")
    return {name: int(size) for name, _, size in pairs}


def stdout_console() -> Console:
    """Returns a console that wraps lines for a terminal, and for nobody else."""
    return Console() if sys.stdout.isatty() else Console(width=1000)


@contextmanager
def connected(target: str) -> Generator[Client]:
    """Connects; ends the program with a plain message when a call fails.

    Args:
        target: The server's address.

    Yields:
        The client.

    Raises:
        typer.Exit: Something failed, and was said.
    """
    try:
        with Client(target) as client:
            yield client
    except (JacobianError, ArrayTextError, BenchError, PictureError) as error:
        print(f"jacserve: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
