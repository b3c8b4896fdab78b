"""Jacobians all at once and in chunks, beside jacfwd and jacrev of this process.

Run it with `make bench-chunks`. Every round times all ways in turn; ratios to the way
that makes all products at once are medians over the rounds.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32
from rich.console import Console
from rich.table import Table

from jacserve.vocabulary import DIRECTIONS
from jacserve_server import Registry
from jacserve_server.executor import find_device
from jacserve_server.programs import Limits, compile_program
from jacserve_server.registration import build_catalog
from jacserve_server.strategies import Decision
from jacserve_server.tuning import keys_to_measure
from jacserve_server.work import Strategy

ROUNDS = 5
SIZES = (256, 512, 1024, 2048)
CHUNKS = (None, 32, 128, 512)

registry = Registry()


def matrix(n: int) -> np.ndarray:
    """Returns weights that neither grow nor shrink what they multiply."""
    return np.random.default_rng(n).normal(size=(n, n)).astype("f4") / np.sqrt(n)


@registry.function
def layers(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """Three tanh layers."""
    for _ in range(3):
        x = jnp.tanh(jnp.asarray(matrix(x.size)) @ x)
    return x


@registry.function
def waves(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """Elementwise, and a cumulative sum."""
    return jnp.sin(x) * jnp.exp(x) * jnp.cumsum(x)


@registry.function
def orbit(x: Float32[Array, "n"]) -> Float32[Array, "n"]:
    """Twenty steps with a dense product each."""
    weights = jnp.asarray(matrix(x.size))

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + 0.01 * jnp.tanh(weights @ x), None

    return jax.lax.scan(step, x, None, length=20)[0]


def timed(call: Callable[[], object]) -> float:
    """Returns the milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measures, and prints a table."""
    catalog = build_catalog([registry])
    device = find_device("cpu")
    limits = Limits(result_bytes=2**34, program_bytes=2**34)
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, pad_edge=False, header_style="bold")
    headings = [f"by {size}" if size else "all at once" for size in CHUNKS]
    for heading in ("function", "mode", "n = m", "in process", *headings):
        is_text = heading in {"function", "mode"}
        table.add_column(heading, justify="left" if is_text else "right")
    for spec in catalog.specs:
        function = catalog.find(spec.qualified_name)
        for direction in DIRECTIONS:
            transform = {"forward": jax.jacfwd, "reverse": jax.jacrev}[direction]
            for n in SIZES:
                if (spec.name, n) == ("orbit", 2048):
                    continue
                x = np.random.default_rng(0).normal(size=n).astype("f4")
                [key] = keys_to_measure(spec, {"n": n}, ["float32"], [None])
                base = Strategy(jacobian=direction)
                compiled = jax.jit(transform(function.call)).lower(x).compile()
                calls: list[Callable[[], object]] = [
                    lambda run=compiled, x=x: np.asarray(run(x))
                ]
                for size in CHUNKS:
                    decision = Decision(replace(base, chunk_size=size))
                    program = compile_program(function, key, decision, device, limits)
                    calls.append(lambda run=program.run, x=x: run([x]))
                for call in calls:
                    call()
                times = np.array([[timed(c) for c in calls] for _ in range(ROUNDS)])
                ratios = np.median(times / times[:, 1:2], axis=0)
                table.add_row(
                    spec.name,
                    direction,
                    str(n),
                    f"{np.median(times[:, 0]):.2f} ms",
                    f"{np.median(times[:, 1]):.2f} ms",
                    *(f"{ratio:.2f} x" for ratio in ratios[2:]),
                )
    console.print(table)


if __name__ == "__main__":
    main()
