"""Small calls beside an empty one on the same server. Run with `make bench-latency`.

The floor is a health check: a gRPC call with next to no message and no work. Client and
server are processes of their own. Each round makes every call once, in an order of its
own; ratios are medians over the rounds.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

import jacserve

ROUNDS = 2000
CALLERS, CALLS, TURNS = 16, 1500, 5

FUNCTIONS = '''
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32
from jacserve_server import Registry

registry = Registry()

def weights(n):
    return np.random.default_rng(n).normal(size=(n, n)).astype("f4") / np.sqrt(n)

@registry.function
def layer(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """tanh(W x)."""
    return jnp.tanh(jnp.asarray(weights(x.size)) @ x)
'''


@contextmanager
def running_server(folder: Path) -> Generator[str]:
    """Serves FUNCTIONS in a process; yields its address."""
    file = folder / "functions.py"
    file.write_text(FUNCTIONS)
    command = [sys.executable, "-m", "jacserve", "serve", str(file), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        yield next(x for x in lines if x.startswith("Listening on ")).split()[2]
    finally:
        process.terminate()
        process.wait()


def timed(call: Callable[[], object]) -> float:
    """Returns the microseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def rate(call: Callable[[], object]) -> float:
    """Returns calls per second of CALLERS threads."""
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda _: call(), range(CALLERS)))
        start = time.perf_counter()
        list(pool.map(lambda _: call(), range(CALLS)))
        return CALLS / (time.perf_counter() - start)


def main() -> None:
    """Measures, and prints two tables."""
    random = np.random.default_rng(0)
    folder = Path("build/bench-latency")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    with (
        running_server(folder) as target,
        jacserve.Client(target) as client,
        grpc.insecure_channel(target) as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        inputs = {n: random.normal(size=n).astype("f4") for n in (3, 128)}
        batch = random.normal(size=(512, 3)).astype("f4")
        calls: dict[str, Callable[[], object]] = {
            "empty": lambda: health.Check(health_pb2.HealthCheckRequest()),
            "n = 3": lambda: client.jacobian("layer", inputs[3]),
            "n = 128": lambda: client.jacobian("layer", inputs[128]),
            "n = 3, 512 points": lambda: client.jacobian("layer", batch),
        }
        names = list(calls)
        times = np.zeros((ROUNDS, len(calls)))
        for turn in range(-20, ROUNDS):
            for place in random.permutation(len(calls)).tolist():
                times[turn, place] = timed(calls[names[place]])
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("call", "p50", "p90", "p99", "over empty"):
            justify = "left" if heading == "call" else "right"
            table.add_column(heading, justify=justify)
        for place, name in enumerate(names):
            each = np.percentile(times[:, place], (50, 90, 99))
            ratio = np.median(times[:, place] / times[:, 0])
            table.add_row(name, *(f"{us:.0f} us" for us in each), f"{ratio:.2f}")
        console.print(table)
        rates = np.array(
            [[rate(calls["empty"]), rate(calls["n = 3"])] for _ in range(TURNS)]
        )
        empty, ours = np.median(rates, axis=0)
        ratio = np.median(rates[:, 1] / rates[:, 0])
        console.print(
            f"{CALLERS} callers: empty {empty:.0f}/s, n = 3 {ours:.0f}/s, "
            f"ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
