"""A function that a test holds up, and a large one; for servers that are killed."""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jacserve_server import Registry

registry = Registry()


def _wait(x: np.ndarray) -> np.ndarray:
    folder = Path(os.environ["FAULT_FOLDER"])
    (folder / "begun").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return x


@registry.function
def held(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Returns its argument, once the file `go` is there."""
    return jax.pure_callback(_wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Squares each number: J is diagonal, with 2 x."""
    return jnp.square(x)
