"""Sparse Jacobians against dense ones, and against asdex called in this process.

Run it with `make bench-sparse`. Every round times all ways one after another, and
ratios are medians over the rounds: a busy machine slows them all alike.
"""

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import asdex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

import jacserve
from jacserve_server import Registry, serving
from jacserve_server.executor import Executor, find_device
from jacserve_server.planning import plan
from jacserve_server.programs import Limits, Program
from jacserve_server.query import Query
from jacserve_server.registration import build_catalog
from jacserve_server.work import ProgramKey

ROUNDS = 21
RESULTS = Path("build/bench-sparse.json")

registry = Registry()


@registry.function
def burgers(u: Float[Array, "n"]) -> Float[Array, "n"]:
    """The periodic 1-D Burgers residual u u_x - nu u_xx."""
    right, left = jnp.roll(u, -1), jnp.roll(u, 1)
    return u * (right - left) / 2 - 0.1 * (right - 2 * u + left)


@registry.function(sizes={"n": 8})
def brusselator(w: Float[Array, "n"]) -> Float[Array, "n"]:
    """The right-hand side of the 2-D Brusselator on a periodic grid."""
    p = math.isqrt(w.size // 2)
    u, v = w.reshape(2, p, p)

    def laplacian(x: jax.Array) -> jax.Array:
        shifts = [jnp.roll(x, step, axis) for step in (-1, 1) for axis in (0, 1)]
        return sum(shifts) - 4 * x

    reaction = u * u * v
    return jnp.stack(
        [
            1.0 + reaction - 4.4 * u + 0.1 * laplacian(u),
            3.4 * u - reaction + 0.1 * laplacian(v),
        ]
    ).ravel()


@dataclass(frozen=True)
class Row:
    """One size of one function; times in milliseconds.

    Attributes:
        function: Its name.
        n: The variables, and results.
        colors: The products that its pattern takes.
        find_ms: Finding, colouring, checking the pattern and compiling, once.
        wire_ms: A call of the client.
        program_ms: The compiled program of it.
        asdex_ms: The same by asdex in this process.
        to_asdex: The program's time over that of asdex.
        dense_ms: The program of the dense Jacobian, where it fits.
        dense_to_sparse: Its time over that of the sparse program.
    """

    function: str
    n: int
    colors: int
    find_ms: float
    wire_ms: float
    program_ms: float
    asdex_ms: float
    to_asdex: float
    dense_ms: float | None = None
    dense_to_sparse: float | None = None


def timed(call: Callable[[], Any]) -> float:
    """Returns the milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def rounds(calls: Sequence[Callable[[], Any]], count: int = ROUNDS) -> np.ndarray:
    """Returns the milliseconds of each call in each round, [count, calls].

    Each round has an order of its own: whoever comes after a call that leaves the
    cache cold must not always be the same.
    """
    random = np.random.default_rng(0)
    for call in calls:
        call()
    times = np.zeros((count, len(calls)))
    for turn in range(count):
        for place in random.permutation(len(calls)).tolist():
            times[turn, place] = timed(calls[place])
    return times


class Programs:
    """Compiles the programs that a server would run."""

    def __init__(self) -> None:
        self.catalog = build_catalog([registry])
        self.executor = Executor(
            self.catalog.find,
            find_device("cpu"),
            threads=1,
            compile_threads=1,
            max_programs=100,
            limits=Limits(result_bytes=2**34, program_bytes=2**34),
        )

    def compiled(self, function: str, x: np.ndarray, mode: Any) -> Program:
        """Returns the program of one function's Jacobian."""
        layout = "csr" if mode == "sparse" else "matrix"
        query = Query(function, (("", x),), ("jacobian",), mode=mode, layout=layout)
        work = plan(query, self.catalog.find(function).spec)
        return asyncio.run(self.executor.prepare(ProgramKey(work.computation, None)))


def measure(
    client: jacserve.Client,
    programs: Programs,
    function: Callable[..., Any],
    x: np.ndarray,
    *,
    with_dense: bool,
) -> Row:
    """Measures one function at one point."""
    name = function.__name__
    find_ms = timed(lambda: client.jacobian(name, x, mode="sparse"))
    program = programs.compiled(name, x, "sparse")
    with jax.enable_x64(True):
        coloring = asdex.jacobian_coloring(function, x)
        in_process = jax.jit(asdex.jacobian_from_coloring(function, coloring))

    def by_asdex() -> None:
        with jax.enable_x64(True):
            np.asarray(in_process(x).data)

    calls = [
        lambda: client.jacobian(name, x, mode="sparse"),
        lambda: program.run([x]),
        by_asdex,
    ]
    times = rounds(calls)
    wire_ms, program_ms, asdex_ms = np.median(times, axis=0)
    row = Row(
        function=name,
        n=x.size,
        colors=coloring.num_colors,
        find_ms=find_ms,
        wire_ms=wire_ms,
        program_ms=program_ms,
        asdex_ms=asdex_ms,
        to_asdex=float(np.median(times[:, 1] / times[:, 2])),
    )
    if not with_dense:
        return row
    dense = programs.compiled(name, x, "forward")
    times = rounds([lambda: program.run([x]), lambda: dense.run([x])], count=5)
    return Row(
        **{
            **asdict(row),
            "dense_ms": float(np.median(times[:, 1])),
            "dense_to_sparse": float(np.median(times[:, 1] / times[:, 0])),
        }
    )


def exponent(rows: Sequence[Row], attribute: str) -> float:
    """Returns the slope of log time over log n."""
    sizes = [row.n for row in rows]
    times = [getattr(row, attribute) for row in rows]
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def main() -> None:
    """Measures, prints tables, and writes the figures."""
    random = np.random.default_rng(0)
    console = Console(width=None if sys.stdout.isatty() else 120)
    programs = Programs()
    rows: list[Row] = []
    with serving(registry) as server, jacserve.Client(server.target) as client:
        for n in (1_000, 3_000, 10_000, 30_000, 100_000):
            x = random.normal(size=n)
            dense = n <= 10_000
            rows.append(measure(client, programs, burgers, x, with_dense=dense))
        for p in (16, 64, 160, 224):
            x = random.uniform(0.5, 2.0, size=2 * p * p)
            dense = x.size <= 10_000
            rows.append(measure(client, programs, brusselator, x, with_dense=dense))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (
        "function", "n", "colours", "first call", "over the wire", "program",
        "asdex here", "program/asdex", "dense program", "dense/sparse",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "function" else "right")
    for row in rows:
        table.add_row(
            row.function,
            f"{row.n:,}",
            str(row.colors),
            f"{row.find_ms:,.0f} ms",
            f"{row.wire_ms:.2f} ms",
            f"{row.program_ms:.3f} ms",
            f"{row.asdex_ms:.3f} ms",
            f"{row.to_asdex:.2f}",
            "does not fit" if row.dense_ms is None else f"{row.dense_ms:,.1f} ms",
            "" if row.dense_to_sparse is None else f"{row.dense_to_sparse:,.0f}",
        )
    console.print(table)
    exponents = {}
    for name in ("burgers", "brusselator"):
        mine = [row for row in rows if row.function == name]
        exponents[name] = {
            attribute: exponent(mine, attribute)
            for attribute in ("program_ms", "wire_ms")
        }
        console.print(
            f"{name}: time grows as n^{exponents[name]['program_ms']:.2f} "
            f"(program), n^{exponents[name]['wire_ms']:.2f} (over the wire)"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    report = {"rows": [asdict(row) for row in rows], "exponents": exponents}
    RESULTS.write_text(json.dumps(report, indent=2))
    console.print(f"[dim]{ROUNDS} rounds, medians; written to {RESULTS}[/dim]")


if __name__ == "__main__":
    main()
