"""Derivatives compared with differences: the right ones pass, the wrong are found."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float, Int

import jacserve
from jacserve.checking import ridders
from jacserve_server import Registry, serving
from zoo import ZOO, Animal

registry = Registry()


@jax.custom_vjp
def one_row_off(x):
    return jnp.sin(x)


one_row_off.defvjp(
    lambda x: (jnp.sin(x), x),
    lambda x, u: (u * jnp.cos(x) * jnp.where(jnp.arange(x.size) == 1, 1.001, 1.0),),
)


@registry.function
def wrong_vjp(x: Float[Array, "4"]) -> Float[Array, "4"]:
    return 2.0 * one_row_off(x)


@jax.custom_jvp
def forgetful(x):
    return x**2


forgetful.defjvp(lambda primals, tangents: (primals[0] ** 2, primals[0] * tangents[0]))


@registry.function
def wrong_jvp(A: Float[Array, "2 3"], b: Float[Array, "3"]) -> dict:
    return {"y": A @ forgetful(b), "z": jnp.sum(A)}


@registry.function
def stopped(x: Float[Array, ""]) -> Float[Array, ""]:
    return jax.lax.stop_gradient(x) * x


@registry.function
def not_holomorphic(z: Complex[Array, "2"]) -> Complex[Array, "2"]:
    return jnp.conj(z) * z


@registry.function
def domain(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.log(x) + jnp.sqrt(x)


@registry.function
def nowhere(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.log(-jnp.abs(x))


@registry.function
def counting(i: Int[Array, "3"]) -> Int[Array, "3"]:
    return i + 1


@registry.function
def staggered(x: Float[Array, "n"], faces: Float[Array, "n+1"]) -> Float[Array, "n"]:
    return x * (faces[1:] - faces[:-1])


@registry.function(max_batch=3)
def small_batches(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.sin(x)


@pytest.fixture(scope="module")
def own() -> Generator[jacserve.Client]:
    with serving(registry) as server, jacserve.Client(server.target) as client:
        yield client


ANIMALS = [
    pytest.param(animal, id=animal.name, marks=[pytest.mark.slow] if n % 4 else [])
    for n, animal in enumerate(ZOO)
]


@pytest.mark.parametrize("animal", ANIMALS)
def test_right_derivatives_pass(client: jacserve.Client, animal: Animal) -> None:
    # Herons's iteration has roots of positive numbers alone.
    inputs = np.array([0.5, 2.0, 3.0]) if animal.name == "heron_root" else None
    found = client.check(animal.name, inputs, points=2)
    assert {check.derivative for check in found} >= {
        f"jacobian ({mode})" for mode in animal.modes
    }
    assert all(check.ok for check in found), found
    for check in found:
        eps = float(np.finfo(check.dtype).eps)
        assert check.tolerance == pytest.approx(100 * eps ** (2 / 3))


def only(found: list[jacserve.Check], dtype: str) -> dict[str, jacserve.Check]:
    return {check.derivative: check for check in found if check.dtype == dtype}


def test_a_wrong_custom_vjp_is_found_and_located(own: jacserve.Client) -> None:
    found = only(own.check("wrong_vjp"), "float64")
    assert set(found) == {"jacobian (reverse)", "vjp"}
    assert not any(check.ok for check in found.values())
    assert found["jacobian (reverse)"].error == pytest.approx(1e-3, rel=0.9)
    assert "d f[1] / d x[1] is " in found["jacobian (reverse)"].detail


def test_a_wrong_custom_jvp_is_found_and_located(own: jacserve.Client) -> None:
    for dtype in ("float64", "float32"):
        found = only(own.check("wrong_jvp"), dtype)
        assert set(found) == {"jacobian (forward)", "jacobian (reverse)", "jvp", "vjp"}
        assert not any(check.ok for check in found.values())
        assert "d f['y'][" in found["jacobian (forward)"].detail
        assert " / d b[" in found["jacobian (forward)"].detail


def test_a_stopped_gradient_is_found(own: jacserve.Client) -> None:
    assert not any(
        check.ok for check in own.check("stopped") if check.derivative[0] in "jv"
    )


def test_a_function_that_is_not_holomorphic_is_found(own: jacserve.Client) -> None:
    found = only(own.check("not_holomorphic"), "complex128")
    assert not found["jacobian (forward)"].ok
    assert "holomorphic" in found["jacobian (forward)"].detail


def test_points_are_drawn_until_f_is_finite(own: jacserve.Client) -> None:
    assert all(check.ok for check in own.check("domain"))
    found = own.check("nowhere")
    assert found
    assert not any(check.was_compared or check.ok for check in found)
    assert "not finite" in found[0].detail


def test_sizes_expressions_batches_and_functions_without_derivatives(
    own: jacserve.Client,
) -> None:
    assert own.check("counting") == []
    for name, sizes in (("staggered", {"n": 6}), ("small_batches", {})):
        found = own.check(name, sizes=sizes, points=1)
        assert found
        assert all(check.ok for check in found)


def test_the_asyncio_client_checks_alike(own: jacserve.Client) -> None:
    async def check() -> list[jacserve.Check]:
        async with jacserve.AsyncClient(own._target) as client:
            return await client.check("wrong_vjp", points=1)

    assert asyncio.run(check()) == own.check("wrong_vjp", points=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("f", "slope"),
    [
        (lambda x: np.exp(x), np.exp(1.0)),
        (lambda x: np.sin(50 * x) * 1e6, 50e6 * np.cos(50.0)),
        (lambda x: 1e-6 * x**3 + 1, 3e-6),
        (lambda x: abs(x - 0.999), 1.0),
    ],
)
def test_ridders_knows_how_far_it_is_off(dtype: str, f, slope: float) -> None:
    steps = 0.1 * 0.5 ** np.arange(10)
    x = np.array(1.0, dtype)
    up, down = (f((x + sign * steps).astype(dtype))[:, None] for sign in (1, -1))
    best, doubt = ridders(up, down, steps)
    noise = float(np.finfo(dtype).eps) * float(np.max(np.abs(up)))
    assert abs(best[0] - slope) <= 10 * doubt[0] + 100 * noise


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jacserve", "check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
def test_the_command_passes_right_functions() -> None:
    file = Path(__file__).parents[2] / "examples" / "functions.py"
    done = run(file, "-f", "spherical", "-f", "circle_and_parabola", "--points", 1)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "spherical@1"
    assert lines.index("circle_and_parabola@1") == 9
    assert lines[1].split()[:4] == ["float64", "jacobian", "(forward)", "ok"]
    at_point = run(file, "-f", "spherical", "-i", "[2, 0.5, 1]")
    assert at_point.returncode == 0
    assert "float32" not in at_point.stdout


def test_the_command_fails_on_a_wrong_one_and_says_where(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("""
import jax
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@jax.custom_vjp
def double(x):
    return 2.0 * x

double.defvjp(lambda x: (2.0 * x, None), lambda _, u: (2.5 * u,))

@registry.function
def right(x: Float[Array, "2"]) -> Float[Array, "2"]:
    return 2.0 * x

@registry.function
def wrong(x: Float[Array, "2"]) -> Float[Array, "2"]:
    return double(x)
""")
    done = run(file)
    assert (done.returncode, done.stderr) == (1, "")
    assert "WRONG off by 2.0e-01" in done.stdout
    assert re.search(
        r"d f\[(\d)\] / d x\[\1\] is 2\.5, by differences 2\n", done.stdout
    )
    assert run(file, "--function", "right").returncode == 0
    unknown = run(file, "--function", "wrnog")
    assert unknown.returncode == 2
    assert "Did you mean wrong" in unknown.stderr
    assert "NAME=SIZE, such as n=100, not n." in run(file, "--size", "n").stderr
