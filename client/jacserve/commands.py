"""The command line: ask a running server from a shell.

Commands of other parts of jacserve join through entry points of the group
"jacserve.commands".
"""

import typing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jacserve import array_files, pictures
from jacserve.bench_command import bench
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
    parse_sizes,
    stdout_console,
)
from jacserve.functions import FunctionInfo, Sparsity
from jacserve.jobs_command import jobs
from jacserve.queries import EvaluateOptions
from jacserve.results import Result
from jacserve.tensors import format_shape
from jacserve.top_command import release, top
from jacserve.vocabulary import Quantity

app = typer.Typer(
    name="jacserve",
    help="Jacobians of registered functions, from a server.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line."""
    for command in entry_points(group="jacserve.commands"):
        loaded = command.load()
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=command.name)
        else:
            app.command(command.name)(loaded)
    app(prog_name="jacserve")


@app.callback()
@calls_server
def root(server: Server) -> None:
    """Jacobians of registered functions, from a server."""
    del server  # The command gets it.


@app.command("functions")
@calls_server
def list_functions(server: Server, timeout: Timeout = None) -> None:
    """List the functions that a server has."""
    with connected(server) as client:
        found = client.functions(timeout_s=timeout)
    table = Table(box=None, pad_edge=False)
    table.add_column("function", no_wrap=True, overflow="fold")
    table.add_column("version")
    table.add_column("signature")
    table.add_column("modes")
    table.add_column("documentation", no_wrap=True, overflow="ellipsis")
    for function in found:
        summary = function.documentation.partition("\n")[0]
        if function.quarantine_reason:
            summary = f"IN QUARANTINE. {summary}"
        table.add_row(
            function.name,
            str(function.version),
            escape(function.signature.removeprefix(function.name)),
            ", ".join(function.modes) or "none",
            escape(summary),
        )
    stdout_console().print(table)


@app.command()
@calls_server
def describe(
    server: Server,
    name: Name,
    sparsity: Annotated[
        bool, typer.Option("--sparsity", help="Show where J can be other than zero.")
    ] = False,
    hessian: Annotated[
        bool, typer.Option("--hessian", help="With --sparsity: H instead of J.")
    ] = False,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            "-s",
            metavar="NAME=SIZE",
            help="With --sparsity: size of a symbolic dimension; may be repeated.",
            show_default="32",
        ),
    ] = None,
    wrt: Annotated[
        list[str] | None,
        typer.Option(
            help="With --sparsity: an argument to differentiate with respect to; may "
            "be repeated.",
            show_default="all",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="With --sparsity: draw it into this file, such as pattern.png.",
            show_default="none",
        ),
    ] = None,
    timeout: Timeout = None,
) -> None:
    """Describe one function: arguments, results, modes and documentation.

    Example: jacserve describe burgers --sparsity --size n=100 --picture burgers.png
    """
    with connected(server) as client:
        function = client.describe(name, timeout_s=timeout)
        _print_description(function, stdout_console())
        if not sparsity:
            return
        found = client.sparsity(
            name,
            sizes=parse_sizes(sizes),
            wrt=wrt or (),
            quantity="hessian" if hessian else "jacobian",
            timeout_s=timeout,
        )
        _print_sparsity(found, stdout_console())
        if picture is not None:
            of = "Hessian" if hessian else "Jacobian"
            pictures.draw(found, f"{of} of {name}", picture)


def _print_sparsity(sparsity: Sparsity, console: Console) -> None:
    pattern = sparsity.pattern
    m, n = pattern.shape
    share = pattern.nnz / (m * n) if m * n else 0.0
    console.print(f"\n[bold]sparsity[/bold] at {escape(sparsity.inputs)}")
    console.print(
        f"  {m} x {n}, {pattern.nnz} entries ({share:.2%}), {sparsity.color_count} "
        f"colours, each a product ({sparsity.mode.replace('_', ' ')})"
    )
    lines = pictures.text_blocks(pattern)
    width = len(lines[0])
    console.print(f"  ┌{'─' * width}┐", markup=False)
    for line in lines:
        console.print(f"  │{line}│", markup=False, highlight=False)
    console.print(f"  └{'─' * width}┘", markup=False)


def _print_description(function: FunctionInfo, console: Console) -> None:
    console.print(
        f"[bold]{escape(function.signature)}[/bold]  version {function.version}"
    )
    if function.documentation:
        console.print(f"\n{escape(function.documentation)}")
    if function.quarantine_reason:
        reason = escape(function.quarantine_reason)
        console.print(f"\n[bold red]in quarantine[/bold red]: {reason}")
    console.print("\n[bold]arguments[/bold]")
    for argument in function.arguments:
        constant = "" if argument.differentiable else "  (no derivative)"
        console.print(
            f"  {argument.name} {escape(format_shape(argument.shape))}  "
            f"{', '.join(argument.dtypes)}{constant}"
        )
    console.print("\n[bold]modes[/bold]")
    for mode in function.modes:
        console.print(f"  {mode}")
    for mode, reason in function.missing_modes.items():
        console.print(f"  [dim]no {mode}: {escape(reason)}[/dim]")
    if function.preferred_mode != "auto":
        console.print(f"  auto means {function.preferred_mode}")
    if function.max_batch:
        console.print(f"\nat most {function.max_batch} points in one call")
    if function.isolation == "process":
        console.print("\nruns in a process of its own, which may be ended")
    if function.measured_strategies:
        console.print("\n[bold]measured: what auto means[/bold]")
    for each in function.measured_strategies:
        points = "one point" if each.bucket is None else f"batches near {each.bucket}"
        chunk = f" by {each.chunk_size}" if each.chunk_size else ""
        console.print(
            f"  {escape(each.inputs)}, {points}: {each.mode}{chunk}, "
            f"{each.speedup:.2f} times as fast as by shape"
        )


@app.command("eval")
@calls_server
def evaluate(
    server: Server,
    name: Name,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            help="An array: JSON text, an .npy file, or NAME= and one of these; or an "
            ".npz file of arrays by name. Once for each argument.",
        ),
    ],
    quantities: Quantities = None,
    wrt: Wrt = None,
    mode: Mode = "auto",
    layout: MatrixLayout = None,
    tangents: Tangents = None,
    cotangents: Cotangents = None,
    dtype: Dtype = None,
    cast: Cast = False,
    require_finite: Annotated[
        bool, typer.Option("--require-finite", help="Fail on NaN and Inf.")
    ] = False,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="table, json, or a file .npy or .npz."),
    ] = "table",
    timeout: Timeout = None,
) -> None:
    """Evaluate a function and its derivatives at a point or a batch of points.

    Example: jacserve eval spherical -i points.npy -q jacobian -q determinant
    """
    # A word that does not exist is refused with the list of those that do.
    asked = typing.cast("list[Quantity]", quantities or ["value", "jacobian"])
    options: EvaluateOptions = {
        "wrt": wrt or (),
        "mode": mode,
        "cast": cast,
        "require_finite": require_finite,
        "timeout_s": timeout,
    }
    if layout is not None:
        options["layout"] = layout
    with connected(server) as client:
        function = client.describe(name, timeout_s=timeout)
        if tangents:
            options["tangents"] = array_files.read_inputs(tangents, function, dtype)
        if cotangents:
            options["cotangents"] = array_files.read_cotangents(
                cotangents, function, dtype
            )
        result = client.evaluate(
            name,
            array_files.read_inputs(inputs, function, dtype),
            quantities=asked,
            **options,
        )
        if output not in {"table", "json"}:
            array_files.write_result(result, Path(output))
    if output == "json":
        print(array_files.to_json(result))
    elif output == "table":
        _print_result(result, stdout_console())


def _print_result(result: Result, console: Console) -> None:
    for label, array in array_files.flat(result):
        console.print(
            f"[bold]{escape(label)}[/bold] "
            f"[dim]{array.dtype} {escape(format_shape(array.shape))}[/dim]"
        )
        text = np.array2string(
            array, precision=6, max_line_width=min(console.width, 100) - 2
        )
        console.print("  " + text.replace("\n", "\n  "), markup=False, highlight=False)
    timing = result.timing
    console.print(
        f"[dim]{result.function} on {result.device}, mode {result.mode or 'none'}; "
        f"queued {timing.queue_s * 1e3:.3g} ms, compiled {timing.compile_s * 1e3:.3g} "
        f"ms, executed {timing.execute_s * 1e3:.3g} ms[/dim]"
    )
    if not result.finite:
        console.print("[yellow]The answer has NaN or Inf.[/yellow]")


app.command()(bench)
app.command()(top)
app.command()(release)
app.add_typer(jobs, name="jobs")
