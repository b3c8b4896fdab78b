"""Functions in a worker process beside the same in the server's own.

Run it with `make bench-isolation`. One file of functions is served twice, by two
processes; every round asks both in turn. Then workers are killed, and it is timed until
another is ready.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from jacserve import Client
from jacserve.errors import JacobianError
from jacserve_server import Registry

ROUNDS, KILLS = 7, 5
BUDGET_S = 2.0

registry = Registry()


@registry.function
def waves(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Elementwise, and a cumulative sum."""
    return jnp.sin(x) * jnp.cumsum(x)


@registry.function
def pid(x: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the process that runs it."""
    shape: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.full_like(x, os.getpid()), shape, x)


@registry.function
def endless(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Halves x until it is below 1, which NaN never is."""
    return jax.lax.while_loop(lambda y: ~jnp.all(y < 1.0), lambda y: y / 2.0, x)


@contextmanager
def served(isolation: str) -> Iterator[Client]:
    """Serves this file in a process of its own."""
    command = [sys.executable, "-m", "jacserve", "serve", __file__, "--port", "0"]
    options = ["--device", "cpu", "--isolation", isolation]
    environment = {
        **os.environ,
        "JACSERVE_MAX_EXECUTE_S": str(BUDGET_S),
        "JACSERVE_LOG_LEVEL": "critical",  # Workers are killed here, which it tells.
    }
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        ready = next(line for line in lines if line.startswith("Listening on "))
        with Client(ready.split()[2]) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def milliseconds(call: Callable[[], object], times: int) -> float:
    """Returns the median of the milliseconds that calls take."""
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def compare(table: Table, clients: list[Client]) -> None:
    """Times both servers, and adds a row for each kind of call."""
    random = np.random.default_rng(0)
    cases = {
        "one point, n = 3: 72 bytes": (random.normal(size=3), 300),
        "64 points, n = 128: 8 MiB": (random.normal(size=(64, 128)), 15),
        "one point, n = 2896: 64 MiB": (random.normal(size=2896), 5),
    }
    for label, (x, times) in cases.items():
        for client in clients:
            client.jacobian("waves", x)
        rounds = [
            [
                milliseconds(lambda c=c, x=x: c.jacobian("waves", x), times)
                for c in clients
            ]
            for _ in range(ROUNDS)
        ]
        own, isolated = np.median(rounds, axis=0)
        ratio = np.median([b / a for a, b in rounds])
        table.add_row(
            label, f"{own:.3g} ms", f"{isolated:.3g} ms", f"{ratio:.2f} x",
            f"{isolated - own:+.3g} ms",
        )  # fmt: skip


def recoveries(client: Client) -> tuple[float, float]:
    """Returns seconds from a worker's end to an answer: it was killed, or overdue."""
    x = np.linspace(0.0, 1.0, 3)
    killed: list[float] = []
    for _ in range(KILLS):
        worker = int(client.value("pid", 1.0))
        client.jacobian("waves", x)
        os.kill(worker, signal.SIGKILL)
        start = time.perf_counter()
        client.jacobian("waves", x)
        killed.append(time.perf_counter() - start)
    client.value("endless", x)
    try:
        client.value("endless", np.nan * x)
    except JacobianError:
        start = time.perf_counter()
    else:
        raise RuntimeError("it has ended")
    client.jacobian("waves", x)
    return statistics.median(killed), time.perf_counter() - start


def main() -> None:
    """Measures, and prints."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Jacobian of", "in the server", "in a worker", "ratio", "more"):
        table.add_column(heading, justify="left" if heading[0] == "J" else "right")
    with served("none") as own, served("process") as isolated:
        compare(table, [own, isolated])
        killed, overdue = recoveries(isolated)
    console.print(table)
    console.print(
        f"A call that a kill of the worker meets is answered after {killed:.1f} s; one "
        f"after an execution over its budget of {BUDGET_S:g} s, {overdue:.1f} s later."
    )


if __name__ == "__main__":
    main()
