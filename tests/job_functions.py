"""Functions for jobs that tests interrupt: they note what they compute, and wait.

Every function takes the number of each point as `row`, counted from a million times
the number of the job. Files steer all servers on one folder: `JOB_TEST_LOG` gets a line
for each batch computed, no job gets further than to the point in `JOB_TEST_GATE`, and
the one in `JOB_TEST_FATAL`, where there is such a file, kills whatever computes it.
"""

import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jacserve_server import Registry

registry = Registry()
FACTOR = float(os.environ.get("JOB_TEST_FACTOR", "1.0"))
# A first batch that takes so long is a chunk by itself: the sizes are always the same.
FIRST_BATCH_S = 0.3
JOB = 10**6
PACE_S = float(os.environ.get("JOB_TEST_PACE_S", "0.0"))
FAILING_ROW = int(os.environ.get("JOB_TEST_FAILING_ROW", "-1"))


def note(row: np.ndarray) -> np.ndarray:
    """Holds a batch up until the gate is open to it; returns zeros."""
    rows = np.asarray(row).ravel()
    if gate := os.environ.get("JOB_TEST_GATE"):
        while int(Path(gate).read_text()) <= (rows % JOB).max():
            time.sleep(0.005)
    fatal = Path(os.environ.get("JOB_TEST_FATAL", "none"))
    if fatal.exists() and int(fatal.read_text()) in rows % JOB:
        os.kill(os.getpid(), signal.SIGKILL)
    if FAILING_ROW in rows % JOB:
        raise RuntimeError(f"the pump is dry at row {FAILING_ROW}")
    if log := os.environ.get("JOB_TEST_LOG"):
        line = f"{os.getpid()} {rows.min()} {rows.max() + 1}\n".encode()
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line)
        os.close(descriptor)
    time.sleep(FIRST_BATCH_S if 0 in rows % JOB else PACE_S)
    return np.zeros(np.shape(row), np.int32)


def paced(x: Array, row: Array) -> Array:
    zero = jax.ShapeDtypeStruct(row.shape, jnp.int32)
    noted = jax.pure_callback(note, zero, row, vmap_method="expand_dims")
    return x + noted.astype(x.dtype)


@registry.function
def dense(x: Float[Array, "3"], row: Int[Array, ""]) -> Float[Array, "3"]:
    r, p, a = FACTOR * paced(x, row)
    return jnp.stack(
        [r * jnp.sin(p) * jnp.cos(a), r * jnp.sin(p) * jnp.sin(a), r * jnp.cos(p)]
    )


@registry.function
def stencil(u: Float[Array, "n"], row: Int[Array, ""]) -> Float[Array, "n"]:
    u = paced(u, row)
    return u * (jnp.roll(u, -1) - jnp.roll(u, 1)) / 2


@registry.function
def roots(x: Float[Array, "2"], row: Int[Array, ""]) -> Float[Array, "2"]:
    """NaN wherever an x is negative."""
    return jnp.sqrt(paced(x, row))


@registry.function
def large(x: Float[Array, "512"], row: Int[Array, ""]) -> Float[Array, "512"]:
    """A Jacobian of 2 MiB at each point."""
    y = paced(x, row)
    return y * jnp.sum(y)


@registry.function
def picky(x: Float[Array, "n"], row: Int[Array, ""]) -> Float[Array, "n"]:
    if x.size == 5:
        raise ValueError("there is no fifth pump")
    return paced(x, row)
