"""Which programs are brief enough to run where a call arrives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from jacserve_server import Registry
from jacserve_server.executor import find_device
from jacserve_server.programs import Limits, compile_program
from jacserve_server.registration import build_catalog
from jacserve_server.strategies import Decision
from jacserve_server.tuning import keys_to_measure
from jacserve_server.work import Strategy

registry = Registry()


@registry.function
def small(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sin(x) * x[0]


@registry.function
def short_scan(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.lax.scan(lambda y, _: (y * 0.5 + 1.0, None), x, None, length=5)[0]


@registry.function
def long_scan(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.lax.scan(lambda y, _: (y * 0.5 + 1.0, None), x, None, length=1000)[0]


@registry.function
def until(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Brief at the points where it would be timed, endless at others."""
    return jax.lax.while_loop(lambda y: y[0] < 0.0, lambda y: y * 1.0, x)


@registry.function
def branch_with_a_loop(x: Float[Array, "n"]) -> Float[Array, "n"]:
    def loop(y):
        return jax.lax.while_loop(lambda z: z[0] < 0.0, lambda z: z * 1.0, y)

    return jax.lax.cond(x[0] > 0.0, jnp.sin, loop, x)


@registry.function
def called_back(x: Float[Array, "n"]) -> Float[Array, "n"]:
    @jax.custom_jvp
    def call(y):
        return jax.pure_callback(np.sin, y, y, vmap_method="expand_dims")

    call.defjvp(lambda xs, vs: (call(*xs), jnp.cos(xs[0]) * vs[0]))
    return call(x)


@registry.function
def heavy(x: Float[Array, "n"]) -> Float[Array, "n"]:
    square = jnp.outer(jnp.tile(x, 100), jnp.tile(x, 100))
    return jnp.tanh(square @ square)[0, :3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("small", True),
        ("short_scan", True),
        ("long_scan", False),
        ("until", False),
        ("branch_with_a_loop", False),
        ("called_back", False),
        ("heavy", False),
    ],
)
def test_a_program_is_brief_if_it_always_is(name: str, *, expected: bool) -> None:
    function = build_catalog([registry]).find(name)
    [key] = keys_to_measure(function.spec, {"n": 3}, ["float32"], [None])
    program = compile_program(
        function,
        key,
        Decision(Strategy(jacobian="forward")),
        find_device("cpu"),
        Limits(result_bytes=2**30, program_bytes=2**30),
    )
    assert program.is_brief == expected
