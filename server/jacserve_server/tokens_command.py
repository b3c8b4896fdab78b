"""`jacserve tokens`: who may call a server, in a file."""

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from jacserve_server.command_line import fail, needing_server

tokens = typer.Typer(
    help="Make and revoke the tokens that clients of a server need.",
    no_args_is_help=True,
)

File = Annotated[
    Path,
    typer.Option(
        "--file",
        envvar="JACSERVE_TOKENS_FILE",
        show_envvar=False,
        help="The file of tokens, as the server's tokens_file names it. Else from "
        "JACSERVE_TOKENS_FILE.",
    ),
]
_DEFAULT_FILE = Path("tokens.json")
_UNITS = {"min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@tokens.command()
def create(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Whom it is for; jobs will be theirs.")
    ],
    scopes: Annotated[
        list[str],
        typer.Option(
            "--scope",
            help="read, compute, jobs or admin; may be repeated. None has another in "
            "it.",
        ),
    ],
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="For how long it holds, such as 90min, 12h, 90d or 8w.",
            show_default="for ever",
        ),
    ] = None,
    file: File = _DEFAULT_FILE,
) -> None:
    """Make a token, and print it: it is kept nowhere, and can't be shown again.

    A server that runs with this file takes it within a second. Several tokens may
    have one name: make the next, hand it out, and revoke the one before by its id.
    Example: jacserve tokens create ada --scope read --scope compute --expires 90d
    """
    with needing_server():
        from jacserve_server import tokens as stored
        from jacserve_server.callers import SCOPES
    wrong = sorted(set(scopes) - SCOPES)
    if wrong:
        fail(f"--scope takes {', '.join(sorted(SCOPES))}, not {wrong[0]!r}.")
    now = datetime.now(UTC).replace(microsecond=0)
    until = None if expires is None else now + _duration(expires)
    try:
        token, text = stored.create(
            file, name, [each for each in SCOPES if each in scopes], until
        )
    except (stored.TokenFileError, ValueError) as error:
        fail(str(error))
    # To a pipe goes the token and nothing else.
    print(text)
    how_long = "for ever" if until is None else f"until {until:%Y-%m-%d %H:%M} UTC"
    words = ", ".join(sorted(token.scopes))
    print(
        f"Token {token.id} of {name}: {words}; {how_long}. Its hash is in {file}; keep "
        "the token itself, it is not shown again.",
        file=sys.stderr,
    )


@tokens.command("list")
def list_tokens(file: File = _DEFAULT_FILE) -> None:
    """List the tokens of a file: ids, names and scopes, and until when they hold."""
    with needing_server():
        from rich.console import Console
        from rich.table import Table

        from jacserve_server import tokens as stored
    try:
        found = stored.read(file)
    except stored.TokenFileError as error:
        fail(str(error))
    table = Table(box=None, pad_edge=False)
    for heading in ("id", "name", "scopes", "created", "expires"):
        table.add_column(heading, no_wrap=True, overflow="fold")
    for each in found:
        until = "never" if each.expires is None else f"{each.expires:%Y-%m-%d %H:%M}"
        table.add_row(
            each.id,
            each.name,
            ", ".join(sorted(each.scopes)),
            f"{each.created:%Y-%m-%d}",
            f"{until} (expired)" if each.has_expired else until,
        )
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    console.print(table)


@tokens.command()
def revoke(
    name_or_id: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_ID", help="An id, for one token; or a name, for all of it."
        ),
    ],
    file: File = _DEFAULT_FILE,
) -> None:
    """Take tokens out of a file; a server that runs with it refuses them in a second.

    Their jobs stay. Streams that are open end.
    """
    with needing_server():
        from jacserve_server import tokens as stored
    try:
        revoked = stored.revoke(file, name_or_id)
    except stored.TokenFileError as error:
        fail(str(error))
    if not revoked:
        fail(f"{file} has no token {name_or_id}. List those that it has.")
    for each in revoked:
        print(f"Revoked {each.id} of {each.name}.")


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]+) ?(min|h|d|w)", text)
    if match is None:
        fail(f"--expires takes a time such as 90min, 12h, 90d or 8w, not {text!r}.")
    try:
        return timedelta(seconds=int(match[1]) * _UNITS[match[2]])
    except OverflowError:
        fail(f"--expires {text} is too long. Leave it out for a token without an end.")
