"""What it costs to ask for several quantities at once. Run with `make bench-fusion`.

Each round times every set of quantities in turn, the compiled program by itself and
the whole call; ratios are medians over the rounds.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

import jacserve
from jacserve_server import Registry, serving

ROUNDS = 301
N, BATCH = 16, 64
SETS: tuple[tuple[jacserve.Quantity, ...], ...] = (
    ("value",),
    ("jacobian",),
    ("slogdet",),
    ("value", "jacobian", "slogdet"),
)
WEIGHTS = np.random.default_rng(0).normal(size=(3, N, N)) / np.sqrt(N)

registry = Registry()


@registry.function
def layers(x: Float[Array, "16"]) -> Float[Array, "16"]:
    """Three tanh layers."""
    for weights in WEIGHTS:
        x = jnp.tanh(jnp.asarray(weights, x.dtype) @ x)
    return x


@registry.function
def waves(x: Float[Array, "16"]) -> Float[Array, "16"]:
    """Elementwise, with a neighbour."""
    return jnp.sin(x) * jnp.exp(jnp.roll(x, 1))


@registry.function
def orbit(x: Float[Array, "16"]) -> Float[Array, "16"]:
    """Fifty steps of a coupled oscillator."""

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + 0.01 * jnp.sin(jnp.roll(x, 1) - x), None

    return jax.lax.scan(step, x, None, length=50)[0]


def main() -> None:
    """Measures, and prints a table."""
    random = np.random.default_rng(1)
    points = random.normal(size=(BATCH, N))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("function", "", *map(", ".join, SETS), "all/dearest"):
        is_text = heading in {"function", ""}
        table.add_column(heading, justify="left" if is_text else "right")
    with serving(registry) as server, jacserve.Client(server.target) as client:
        for function in ("layers", "waves", "orbit"):
            wire, program = np.zeros((2, ROUNDS, len(SETS)))
            for turn in range(-5, ROUNDS):
                for place in random.permutation(len(SETS)).tolist():
                    start = time.perf_counter()
                    result = client.evaluate(function, points, quantities=SETS[place])
                    wire[turn, place] = (time.perf_counter() - start) * 1e3
                    program[turn, place] = result.timing.execute_s * 1e3
            for label, times in (("program", program), ("over the wire", wire)):
                medians = np.median(times, axis=0)
                ratio = np.median(times[:, -1] / times[:, np.argmax(medians[:-1])])
                milliseconds = [f"{ms:.2f} ms" for ms in medians]
                table.add_row(function, label, *milliseconds, f"{ratio:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"n = m = {N}, batch {BATCH}; medians of {ROUNDS} rounds")
    console.print(table)


if __name__ == "__main__":
    main()
