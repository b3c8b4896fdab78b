"""The server's commands: `jacserve serve`, `jacserve check` and `jacserve tune`."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jacserve_server.command_line import (
    DeviceName,
    Targets,
    fail,
    loaded,
    needing_server,
)

if TYPE_CHECKING:
    from pydantic import ValidationError

    from jacserve.checking import Check
    from jacserve_server.config import Config
    from jacserve_server.measurements import Measurement


Functions = Annotated[
    list[str] | None,
    typer.Option(
        "--function",
        "-f",
        help="A function, NAME or NAME@VERSION; may be repeated.",
        show_default="all",
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        "-s",
        metavar="NAME=SIZE",
        help="Size of a symbolic dimension; may be repeated.",
        show_default="one that works",
    ),
]

ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file of settings.", show_default="none")
]


def serve(
    targets: Targets = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="TCP port; 0 takes a free one.", show_default="50051"),
    ] = None,
    device: DeviceName = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="File of tokens, as `jacserve tokens` makes it; one of them must come "
            "with every call.",
            show_default="none",
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(help="PEM file of the server's certificate.", show_default="none"),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file of its key.", show_default="none")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the authorities whose certificates clients must have.",
            show_default="none",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Listen to a network with neither TLS nor tokens: all may call.",
        ),
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="TCP port for Prometheus; 0 takes a free one.", show_default="none"
        ),
    ] = None,
    open_telemetry: Annotated[
        bool | None,
        typer.Option(
            "--open-telemetry",
            help="Send spans, as the OTEL_ environment has it.",
            show_default="no",
        ),
    ] = None,
    isolation: Annotated[
        Literal["none", "process"] | None,
        typer.Option(
            help="process runs all functions in a worker process, which is ended when "
            "one of them does not end; none, those that say so themselves.",
            show_default="none",
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Serve the functions of files and modules, until SIGTERM or Ctrl-C.

    Every setting of docs/serving.md can also come from the TOML file, or from the
    environment as JACSERVE_ and its name in capitals. Flags go before the
    environment, the environment before the file. Example: jacserve serve functions.py
    """
    with needing_server():
        from jacserve.connection import VARIABLES
        from jacserve_server import logs
        from jacserve_server.config import Config
        from jacserve_server.executor import DeviceError, stay_on_cpu
        from jacserve_server.exposure import AddressError, ExposureError
        from jacserve_server.isolation.supervisor import StartError
        from jacserve_server.loading import load_registries
        from jacserve_server.registration import build_catalog
        from jacserve_server.registry import RegistrationError
        from jacserve_server.running import Ending, run, serve_until_signal
        from jacserve_server.server import WarmUpError
        from jacserve_server.telemetry import TelemetryError
        from jacserve_server.tls import CertificateError
        from jacserve_server.tokens import TokenFileError
    settings = _settings(
        config,
        host=host,
        port=port,
        device=device,
        isolation=isolation,
        tokens_file=tokens,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure or None,
        metrics_port=metrics_port,
        open_telemetry=open_telemetry,
    )
    _set_allocator(settings)
    if settings.isolation == "process":
        stay_on_cpu()  # The devices are the worker's.
    for name in os.environ:
        setting = name.removeprefix("JACSERVE_").lower()
        is_known = setting in Config.model_fields or name in VARIABLES
        if name.startswith("JACSERVE_") and not is_known:
            print(f"jacserve: {name} is not a setting; ignored.", file=sys.stderr)
    logs.configure(settings.log_format, settings.log_level)
    try:
        catalog = build_catalog(load_registries(targets or []))
    except RegistrationError as error:
        fail(*error.problems, "Nothing is served until this is mended.")
    for spec in catalog.specs:
        print(f"  {spec.qualified_name}  {', '.join(spec.modes) or 'value only'}")

    def announce(address: str) -> None:
        count = len(catalog.specs)
        functions = "1 function" if count == 1 else f"{count} functions"
        print(f"Listening on {address} ({functions}).", flush=True)

    try:
        ending = run(serve_until_signal(catalog, settings, announce))
    except (
        *(AddressError, CertificateError, DeviceError, StartError),
        *(TelemetryError, WarmUpError),
    ) as error:
        fail(str(error))
    except (ExposureError, TokenFileError) as error:
        fail(str(error), "Nothing is served until this is mended.")
    except RegistrationError as error:
        fail(*error.problems, "Nothing is served until this is mended.")
    print(ending.value, flush=True)
    # What runs or is compiled, perhaps for nobody any more, can't be interrupted, and
    # Python would wait for it or take its libraries down under it.
    logging.shutdown()
    os._exit(int(ending in {Ending.CUT_OFF, Ending.FAULT}))


def check(
    targets: Targets = None,
    functions: Functions = None,
    sizes: Sizes = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            help="The point to compare at, as `jacserve eval` takes it; for one "
            "function.",
            show_default="random points",
        ),
    ] = None,
    points: Annotated[
        int, typer.Option(min=1, help="Random points for each function and dtype.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
) -> None:
    """Compare every derivative of functions with differences of their values.

    Each Jacobian in each mode, and each product, is compared in random directions at
    random points, by extrapolated central differences. Ends with status 1 where a
    derivative is off by more than rounding explains, or none of a function's could be
    compared. Example: jacserve check functions.py --function spherical
    """
    with needing_server():
        from jacserve import array_files
        from jacserve.client import Client
        from jacserve.command_line import parse_sizes
        from jacserve.errors import JacobianError
        from jacserve_server.running import serving
    registries = loaded(targets)
    is_wrong = False
    try:
        given_sizes = parse_sizes(sizes)
        with serving(*registries) as server, Client(server.target) as client:
            wanted = [client.describe(name) for name in functions or ()]
            for info in wanted or client.functions():
                name = f"{info.name}@{info.version}"
                given = inputs and array_files.read_inputs(inputs, info, None)
                found = client.check(
                    name, given or None, sizes=given_sizes, points=points, seed=seed
                )
                is_wrong |= any(c.was_compared and not c.ok for c in found)
                is_wrong |= bool(found) and not any(c.was_compared for c in found)
                _print_checks(name, found)
    except (JacobianError, array_files.ArrayTextError, ValueError) as error:
        fail(str(error))
    raise typer.Exit(int(is_wrong))


def _print_checks(name: str, found: "list[Check]") -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    if not found:
        console.print(f"[bold]{name}[/bold]  [dim]has no derivatives[/dim]")
        return
    console.print(f"[bold]{name}[/bold]")
    for each in found:
        label = f"  {each.dtype:<11}{each.derivative:<20}"
        if not each.was_compared:
            console.print(
                f"{label} [yellow]not compared[/yellow]: {escape(each.detail)}"
            )
            continue
        verdict = "[green]ok[/green]   " if each.ok else "[red bold]WRONG[/red bold]"
        detail = "" if each.ok else f"  {escape(each.detail)}"
        console.print(
            f"{label} {verdict} off by {each.error:.1e} of {each.tolerance:.0e}{detail}"
        )


def tune(
    targets: Targets = None,
    functions: Functions = None,
    sizes: Sizes = None,
    batches: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            "-b",
            min=0,
            help="Points at once; 0 is one point without a batch axis. May be "
            "repeated.",
            show_default="0 and 64",
        ),
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            "-d",
            help="Dtype of the inputs; may be repeated.",
            show_default="float32 and float64, where they are accepted",
        ),
    ] = None,
    device: DeviceName = None,
    config: ConfigFile = None,
) -> None:
    """Measure the fastest way to each Jacobian, and keep it for servers to use.

    Forward, reverse and sparse mode, all at once and in chunks, are timed in turn.
    What is found is kept in the cache_dir of the settings; servers that start later
    take it where a call leaves the mode open, for inputs of the same shapes and
    dtypes. Ends with status 1 where a function could not be measured. Example:
    jacserve tune functions.py --size n=1000
    """
    with needing_server():
        from jacserve.array_files import ArrayTextError
        from jacserve.command_line import parse_sizes
        from jacserve_server.errors import ServiceError
        from jacserve_server.executor import DeviceError, find_device, memory_budget
        from jacserve_server.measurements import Measurements
        from jacserve_server.programs import Limits
        from jacserve_server.registration import build_catalog
        from jacserve_server.registry import RegistrationError
        from jacserve_server.tuning import keys_to_measure, measure
    settings = _settings(config, device=device)
    _set_allocator(settings)
    try:
        given_sizes = parse_sizes(sizes)
        catalog = build_catalog(loaded(targets))
        found_device = find_device(settings.device)
        chosen = [catalog.find(name) for name in functions or ()]
    except (ArrayTextError, RegistrationError, DeviceError, ServiceError) as error:
        fail(str(error))
    limits = Limits(
        result_bytes=2**62,
        program_bytes=settings.max_program_bytes or memory_budget([found_device]),
    )
    rows = [batch or None for batch in batches or (0, 64)]
    measured, is_complete = [], True
    for function in chosen or catalog.functions:
        try:
            keys = keys_to_measure(function.spec, given_sizes, dtypes, rows)
            for key in keys:
                measured.append(measure(function, key, found_device, limits))
                _print_measurement(measured[-1])
        except (ServiceError, ValueError) as error:
            is_complete = False
            print(f"jacserve: {function.spec.qualified_name}: {error}", file=sys.stderr)
    try:
        earlier = Measurements.load(settings.cache_dir)
        path = earlier.updated(measured).save(settings.cache_dir)
    except OSError as error:
        fail(f"{settings.cache_dir} can't be written: {error.strerror}")
    print(f"Kept in {path}. Servers that start from now on use it.")
    raise typer.Exit(int(not is_complete))


def _print_measurement(measurement: "Measurement") -> None:
    from rich.console import Console
    from rich.markup import escape

    bucket, fastest = measurement.bucket, measurement.timings[0]
    points = "one point" if bucket is None else f"a batch of {bucket}"
    ways = [f"{each.label} {each.seconds * 1e3:.3g} ms" for each in measurement.timings]
    Console(highlight=False, soft_wrap=True).print(
        f"[bold]{measurement.function}[/bold] {escape(', '.join(measurement.inputs))}, "
        f"{points}: [green]{fastest.label}[/green], {measurement.speedup:.2f} times as "
        f"fast as the rule by shape\n  [dim]{', '.join(ways)}[/dim]"
    )


def _settings(path: Path | None, **arguments: Any) -> "Config":
    from pydantic import ValidationError

    from jacserve_server.config import Config

    try:
        return Config.load(path, **arguments)
    except ValidationError as error:
        fail("\n".join(_settings_problems(error)))
    except (OSError, ValueError) as error:
        fail(f"{path} can't be read: {error}")


def _set_allocator(settings: "Config") -> None:
    """Says how memory is taken and given back; XLA looks when JAX is first used."""
    from jacserve_server import allocator, xla_threads

    allocator.share_arenas()
    allocator.trim_for_ever()
    xla_threads.spare()
    if settings.gpu_memory_fraction is not None:
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(settings.gpu_memory_fraction)
        # Its old name, which XLA does not take beside the new one.
        os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    if settings.gpu_preallocate is not None:
        preallocates = "true" if settings.gpu_preallocate else "false"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = preallocates


def _settings_problems(error: "ValidationError") -> list[str]:
    from jacserve_server.config import Config

    problems: list[str] = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"])) or "tls"
        field = Config.model_fields.get(name)
        # What has another name may be a password, and some settings have one in them.
        shown = f" (it is {problem['input']!r})" if field and field.repr else ""
        problems.append(f"setting {name}: {problem['msg']}{shown}")
    return problems
