"""Functions that end what runs them, at points that are not positive."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jacserve_server import Registry, WarmUp

registry = Registry()
# Without any that is warmed up.
quiet = Registry()
# With one that dies and one that does not.
mortal = Registry()
# With one that takes as long for many points as for one.
patient = Registry()
ENDLESS = 13  # The size at which tracing never ends.


def unless_positive(deed: Callable[[], object]) -> Callable[[Array], Array]:
    """Returns the identity, which does something where x is not positive."""

    def call(x: np.ndarray) -> np.ndarray:
        if not (np.asarray(x) > 0).all():
            deed()
        return np.asarray(x)

    def identity(x: Array) -> Array:
        shape: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(call, shape, x, vmap_method="expand_dims")

    return identity


@registry.function
def segfault(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return unless_positive(lambda: ctypes.string_at(0))(x)


@registry.function
def leave(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return unless_positive(lambda: os._exit(3))(x)


@mortal.function(name="mortal")
@registry.function
def suicide(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return unless_positive(lambda: os.kill(os.getpid(), signal.SIGKILL))(x)


@registry.function
def late(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Dies when it has run for a second."""

    def die() -> None:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    return unless_positive(die)(x)


def babble() -> None:
    """Writes to every socket of the worker, as code may that closes or dups wrongly."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket"):
                os.write(int(name), b"\xff" * 64)


@registry.function
def mad(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Speaks in the worker's name, then waits for what comes of it."""
    return unless_positive(lambda: (babble(), time.sleep(60)))(x)


@registry.function
def spawning(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Has a child, and does not end."""

    def spawn() -> None:
        subprocess.Popen(["sleep", "86400.125"])
        time.sleep(1000)

    return unless_positive(spawn)(x)


@registry.function
def hog(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return unless_positive(lambda: bytearray(2**46))(x)


@registry.function
def raising(x: Float[Array, "n"]) -> Float[Array, "n"]:
    def fail() -> None:
        raise ValueError("the pump is dry")

    return unless_positive(fail)(x)


@registry.function
def exiting(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == ENDLESS:
        raise SystemExit(4)
    return x


@registry.function
def asleep(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return unless_positive(lambda: time.sleep(1000))(x)


@registry.function
def endless(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Halves x until it is below 1, which NaN never is."""
    return jax.lax.while_loop(lambda y: ~jnp.all(y < 1.0), lambda y: y / 2.0, x)


@registry.function(max_execute_s=1)
def hasty(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.lax.while_loop(lambda y: ~jnp.all(y < 1.0), lambda y: y / 2.0, x)


@registry.function
def untraceable(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Its tracing never ends at one size."""
    while x.size == ENDLESS:
        pass
    return jnp.sin(x)


@quiet.function(name="quiet_pid")
@registry.function
def pid(x: Float[Array, ""]) -> Float[Array, ""]:
    """The process that runs it."""
    shape: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(
        lambda x: np.full(np.shape(x), os.getpid(), x.dtype),
        shape,
        x,
        vmap_method="expand_dims",
    )


@mortal.function(name="immortal")
@registry.function
def gentle(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sin(x) * x


@quiet.function(name="quiet_large")
@registry.function
def large(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x * 2.0


@patient.function(warm_up=[WarmUp({"n": 3}, batch=16, quantities=("value",))])
def patient_one(x: Float[Array, "n"]) -> Float[Array, "n"]:
    def call(x: np.ndarray) -> np.ndarray:
        time.sleep(0.02)
        return np.asarray(x)

    shape: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(call, shape, x, vmap_method="expand_dims")
