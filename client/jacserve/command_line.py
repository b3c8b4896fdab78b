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
from jacserve.vocabulary import QUANTITIES, Layout, ModeOption

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
Name = Annotated[str, typer.Argument(help="The function: NAME or NAME@VERSION.")]
Quantities = Annotated[
    list[str] | None,
    typer.Option(
        "--quantity",
        "-q",
        help=f"What to compute: {', '.join(QUANTITIES)}. May be repeated.",
        show_default="value and jacobian",
    ),
]
Wrt = Annotated[
    list[str] | None,
    typer.Option(
        "--wrt",
        help="An argument to differentiate with respect to; may be repeated.",
        show_default="all",
    ),
]
Mode = Annotated[ModeOption, typer.Option("--mode", help="How to differentiate.")]
MatrixLayout = Annotated[
    Layout | None,
    typer.Option(
        "--layout",
        help="Shape of derivatives.",
        show_default="matrix, or csr in sparse mode",
    ),
]
Tangents = Annotated[
    list[str] | None,
    typer.Option(
        "--tangent",
        help="v of jvp and hvp, as an input is given.",
        show_default="none",
    ),
]
Cotangents = Annotated[
    list[str] | None,
    typer.Option(
        "--cotangent",
        help="u of vjp: an array as an input is given, or PATH= and one, where "
        "PATH is a key or index of the result, or several joined by dots.",
        show_default="none",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Dtype of JSON numbers.",
        show_default="the widest the function takes",
    ),
]
Cast = Annotated[
    bool,
    typer.Option("--cast", help="Let the server convert inputs of a dtype it refuses."),
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
    # An ImportError says what to install for what was asked.
    except (
        *(JacobianError, ArrayTextError, BenchError, PictureError, ImportError),
    ) as error:
        print(f"jacserve: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
