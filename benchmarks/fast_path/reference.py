"""A process that calls compiled functions itself: the floor without a server.

Run as `python -m benchmarks.fast_path.reference DEVICE`. For each line of JSON with
`function`, `n`, `batch` (or null) and `repeats` it writes the seconds of each call. It
does nothing while nobody asks, so that it can stay beside what it is compared with.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.fast_path import functions


@functools.cache
def compiled(name: str, n: int, batch: int | None, device: str) -> Callable[[], Any]:
    """Compiles a function's Jacobian ahead of time, and calls it once.

    Args:
        name: The function.
        n: The length of its input.
        batch: Points at once; None for one without a batch axis.
        device: Where it runs.

    Returns:
        A call that returns when the Jacobian is in host memory.
    """
    jacobian = jax.jacfwd(getattr(functions, name))
    if batch is not None:
        jacobian = jax.vmap(jacobian)
    shape = (n,) if batch is None else (batch, n)
    x = np.random.default_rng(0).normal(size=shape).astype("f4")
    with jax.default_device(jax.devices(device)[0]):
        program = jax.jit(jacobian).lower(x).compile()

    def call() -> Any:
        return np.asarray(program(x))

    call()
    return call


def main() -> None:
    """Answers until stdin ends."""
    [device] = sys.argv[1:]
    for line in sys.stdin:
        request = json.loads(line)
        repeats = request.pop("repeats")
        name = request.pop("function")
        call = compiled(name, device=device, **request)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
