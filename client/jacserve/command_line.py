"""What the commands share: options, the connection, the console."""

import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from jacserve.array_files import ArrayTextError
from jacserve.benching import BenchError
from jacserve.client import Client
from jacserve.connection import (
    Connection,
    ConnectionOptionError,
    ConnectOptions,
    connection,
    split_targets,
)
from jacserve.errors import JacobianError
from jacserve.pictures import PictureError
from jacserve.vocabulary import QUANTITIES, Layout, ModeOption

Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", help="Seconds to wait for the answer.", show_default="no limit"
    ),
]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The function: NAME or NAME@VERSION.")
]
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
    sizes: dict[str, int] = {}
    for text in texts or ():
        name, _, size = text.partition("=")
        if not name.isidentifier() or not size.isdecimal():
            raise ArrayTextError(f"--size takes NAME=SIZE, such as n=100, not {text}.")
        sizes[name] = int(size)
    return sizes


def stdout_console() -> Console:
    """Returns a console that wraps lines for a terminal, and for nobody else."""
    return Console() if sys.stdout.isatty() else Console(width=1000)


@dataclass(frozen=True, slots=True)
class Server:
    """Which server a command calls, by its options; the environment has the rest.

    Attributes:
        targets: Its address, or those of several; none for that of the environment.
        options: How to connect.
    """

    targets: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def client(self) -> Client:
        """Returns a client of it; raises as `connection` does."""
        options = cast("ConnectOptions", self.options)
        return Client(self.targets or None, **options)

    def connection(self) -> Connection:
        """Finds out where to connect to, and how; raises as `connection` does."""
        return connection(self.targets or None, cast("ConnectOptions", self.options))

    def arguments(self) -> str:
        """Returns the options for another command line, a space before each."""
        words = [word for target in self.targets for word in ("--target", target)]
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return "".join(f" {shlex.quote(word)}" for word in words)

    def narrowed(self, given: Mapping[str, Any]) -> "Server":
        """Returns it with further options, which overrule those that it has."""
        targets = tuple(
            x for text in given["target"] or () for x in split_targets(text)
        )
        options = {n: x for n, x in given.items() if n != "target" and x is not None}
        return Server(targets or self.targets, {**self.options, **options})


def _option(flag: str, help: str, variable: str, default: str, **more: Any) -> Any:
    return typer.Option(
        flag,
        help=f"{help} Else from {variable}.",
        show_default=default,
        rich_help_panel="Connection",
        **more,
    )


_CONNECTION = {
    "target": Annotated[
        list[str] | None,
        _option(
            "--target",
            "Address of the server, HOST:PORT. May be repeated, or have several with "
            "commas between.",
            "JACSERVE_TARGET",
            "localhost:50051",
        ),
    ],
    "token_file": Annotated[
        Path | None,
        _option(
            "--token-file",
            "A file with the token. The token itself is no option: all users of a "
            "machine see the command lines on it.",
            "JACSERVE_TOKEN, or the file JACSERVE_TOKEN_FILE",
            "none",
        ),
    ],
    "ca": Annotated[
        Path | None,
        _option(
            "--ca",
            "Certificates of the authorities to trust, PEM; has TLS used.",
            "JACSERVE_TLS_CA",
            "the system's",
        ),
    ],
    "certificate": Annotated[
        Path | None,
        _option(
            "--certificate",
            "The client's own certificate, PEM, for mutual TLS.",
            "JACSERVE_CLIENT_CERTIFICATE",
            "none",
        ),
    ],
    "key": Annotated[
        Path | None,
        _option("--key", "Its private key, PEM.", "JACSERVE_CLIENT_KEY", "none"),
    ],
    "server_name": Annotated[
        str | None,
        _option(
            "--server-name",
            "The name that the server's certificate must have.",
            "JACSERVE_TLS_SERVER_NAME",
            "that of the target",
        ),
    ],
    "tls": Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Use TLS, or don't. Else from JACSERVE_TLS.",
            show_default="with any of --ca, --certificate and --server-name",
            rich_help_panel="Connection",
        ),
    ],
}


def calls_server(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of the connection.

    They may also stand before the command, as in `jacserve --target HOST:PORT list`.

    Args:
        command: The command. Its first argument becomes a `Server`.

    Returns:
        It, for Typer.
    """
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())[1:]

    def run(context: typer.Context, **given: Any) -> None:
        named = {name: given.pop(name) for name in _CONNECTION}
        context.obj = (context.obj or Server()).narrowed(named)
        command(context.obj, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(parameter.replace(kind=keyword) for parameter in own),
        *(
            inspect.Parameter(name, keyword, default=None, annotation=annotation)
            for name, annotation in _CONNECTION.items()
        ),
    ]
    functools.update_wrapper(run, command)
    delattr(run, "__wrapped__")  # Typer would read its annotations.
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@contextmanager
def connected(server: Server) -> Generator[Client]:
    """Connects; ends the program with a plain message when a call fails.

    Args:
        server: Which server.

    Yields:
        The client.

    Raises:
        typer.Exit: Something failed, and was said.
    """
    with plainly(), server.client() as client:
        yield client


@contextmanager
def plainly() -> Generator[None]:
    """Ends the program with a plain message when a call fails.

    Raises:
        typer.Exit: Something failed, and was said.
    """
    try:
        yield
    # An ImportError says what to install for what was asked.
    except (
        *(JacobianError, ArrayTextError, BenchError, PictureError, ImportError),
        ConnectionOptionError,
    ) as error:
        id_ = error.request_id if isinstance(error, JacobianError) else ""
        request = f" (request {id_})" if id_ else ""
        print(f"jacserve: {error}{request}", file=sys.stderr)
        raise typer.Exit(1) from error
