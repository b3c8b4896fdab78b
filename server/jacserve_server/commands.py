"""The server's command: `jacserve serve`."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pydantic import ValidationError


def serve(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE_OR_MODULE...",
            help="Python files, importable modules or MODULE:ATTRIBUTE that register "
            "functions.",
            show_default="all installed entry points of the group jacserve.functions",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="TCP port; 0 takes a free one.", show_default="50051"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, gpu or gpu:N.", show_default="auto"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of settings.", show_default="none"),
    ] = None,
) -> None:
    """Serve the functions of files and modules, until SIGTERM or Ctrl-C.

    Every setting of docs/serving.md can also come from the TOML file, or from the
    environment as JACSERVE_ and its name in capitals. Flags go before the
    environment, the environment before the file.
    """
    try:
        from pydantic import ValidationError

        from jacserve_server.config import Config
        from jacserve_server.executor import DeviceError
        from jacserve_server.loading import load_registries
        from jacserve_server.registration import build_catalog
        from jacserve_server.registry import RegistrationError
        from jacserve_server.server import AddressError, run, serve_until_signal
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is missing. Run: pip install "jacserve[server]"')
    try:
        settings = Config.load(config, host=host, port=port, device=device)
    except ValidationError as error:
        _fail("\n".join(_settings_problems(error)))
    except (OSError, ValueError) as error:
        _fail(f"{config} can't be read: {error}")
    for name in os.environ:
        setting = name.removeprefix("JACSERVE_").lower()
        if name.startswith("JACSERVE_") and setting not in {
            *Config.model_fields,
            "target",
        }:
            print(f"jacserve: {name} is not a setting; ignored.", file=sys.stderr)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("jacserve_server").setLevel(settings.log_level.upper())
    try:
        catalog = build_catalog(load_registries(targets or []))
    except RegistrationError as error:
        _fail(*error.problems, "Nothing is served until this is mended.")
    for spec in catalog.specs:
        print(f"  {spec.qualified_name}  {', '.join(spec.modes) or 'value only'}")

    def announce(address: str) -> None:
        count = len(catalog.specs)
        functions = "1 function" if count == 1 else f"{count} functions"
        print(f"Listening on {address} ({functions}).", flush=True)

    try:
        is_drained = run(serve_until_signal(catalog, settings, announce))
    except (AddressError, DeviceError) as error:
        _fail(str(error))
    print("Stopped." if is_drained else "Stopped while calls still ran.", flush=True)
    if not is_drained:
        # A running program can't be interrupted, and Python would wait for it.
        os._exit(1)


def _settings_problems(error: "ValidationError") -> list[str]:
    return [
        f"setting {'.'.join(map(str, problem['loc']))}: {problem['msg']} "
        f"(it is {problem['input']!r})"
        for problem in error.errors()
    ]


def _fail(*lines: str) -> NoReturn:
    for line in lines:
        print(f"jacserve: {line}", file=sys.stderr)
    raise typer.Exit(2)
