"""When programs are compiled, kept and shared, as callers see it."""

import gc
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float

import jacserve
from jacserve_server import Registry, serving
from server_process import server_process

registry = Registry()
traces: Counter[str] = Counter()
gate = threading.Event()


@registry.function
def counted(x: Float[Array, "n"]) -> Float[Array, "n"]:
    traces["counted"] += 1
    return jnp.sin(x)


@registry.function
def slow_to_trace(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 42:
        traces["slow_to_trace"] += 1
        assert gate.wait(timeout=30)
    return x**2


@registry.function
def fails_once(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 42:
        traces["fails_once"] += 1
        if traces["fails_once"] == 1:
            raise RuntimeError("not yet")
    return x**2


@pytest.fixture
def client():
    traces.clear()
    gate.clear()
    with serving(registry, max_programs=4, compile_threads=2) as server:
        traces.clear()
        with jacserve.Client(server.target) as connected:
            yield connected
    gate.set()


def test_the_same_key_compiles_once(client: jacserve.Client) -> None:
    x = np.ones(6)
    first = client.evaluate("counted", x, mode="forward")
    again = client.evaluate("counted", x + 1, mode="forward")
    assert traces["counted"] == 1
    assert first.timing.compile_s > 0
    assert again.timing.compile_s == 0


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (np.ones(7), {}),
        (np.ones(6, "f"), {}),
        (np.ones((1, 6)), {}),
        (np.ones((2, 6)), {}),
        (np.ones(6), {"mode": "reverse"}),
        (np.ones(6), {"layout": "blocks"}),
        (np.ones(6), {"quantities": ("value",)}),
        (np.ones(6), {"quantities": ("jacobian",)}),
    ],
)
def test_another_key_is_another_program(client: jacserve.Client, x, options) -> None:
    base = {"mode": "forward", "quantities": ("value", "jacobian")}
    client.evaluate("counted", np.ones(6), **base)
    first = traces["counted"]
    client.evaluate("counted", x, **{**base, **options})
    both = traces["counted"]
    assert both > first
    client.evaluate("counted", x, **{**base, **options})
    client.evaluate("counted", np.ones(6), **base)
    assert traces["counted"] == both


def test_the_same_computation_in_other_words_shares_the_program(
    client: jacserve.Client,
) -> None:
    x = np.ones(6)
    client.evaluate("counted", x, quantities=("value", "determinant"), mode="forward")
    again = client.evaluate(
        "counted@1",
        {"x": x},
        quantities=("determinant", "value"),
        mode="forward",
        wrt="x",
        layout="blocks",
    )
    assert list(again.quantities) == ["determinant", "value"]
    assert traces["counted"] == 1


def test_batches_share_the_program_of_their_bucket(client: jacserve.Client) -> None:
    for batch in (5, 6, 7, 8):
        result = client.evaluate("counted", np.ones((batch, 6)), mode="forward")
        assert result.bucket == 8
        assert result.jacobian.shape == (batch, 6, 6)
    assert traces["counted"] == 1


def test_what_auto_chooses_shares_the_program(client: jacserve.Client) -> None:
    client.evaluate("counted", np.ones(6), mode="forward")
    result = client.evaluate("counted", np.ones(6))
    assert result.mode == "forward"
    assert traces["counted"] == 2  # One to compile, one to learn m.
    client.evaluate("counted", np.ones(6))
    assert traces["counted"] == 2


def test_however_many_ask_at_once_one_compiles(client: jacserve.Client) -> None:
    x = np.ones(42)
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(client.jacobian, "slow_to_trace", x, mode="forward")
            for _ in range(8)
        ]
        time.sleep(0.3)
        # Neither a compile nor those who wait for it hold up other calls.
        assert client.evaluate("counted", np.ones(3), timeout_s=10).finite
        gate.set()
        for answer in asked:
            np.testing.assert_array_equal(answer.result(), 2 * np.eye(42))
    assert traces["slow_to_trace"] == 1


def test_a_deadline_during_a_compile_leaves_the_program_for_the_next(
    client: jacserve.Client,
) -> None:
    x = np.ones(42)
    with pytest.raises(TimeoutError) as caught:
        client.jacobian("slow_to_trace", x, mode="forward", timeout_s=0.3)
    assert isinstance(caught.value, jacserve.DeadlineError)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    gate.set()
    np.testing.assert_array_equal(
        client.jacobian("slow_to_trace", x, mode="forward"), 2 * np.eye(42)
    )
    assert traces["slow_to_trace"] == 1


def test_a_failure_is_not_kept(client: jacserve.Client) -> None:
    with pytest.raises(jacserve.InvalidRequestError, match="not yet"):
        client.jacobian("fails_once", np.ones(42), mode="forward")
    assert client.jacobian("fails_once", np.ones(42), mode="forward").shape == (42, 42)


def test_the_least_recently_used_program_goes_first(client: jacserve.Client) -> None:
    sizes = (2, 3, 4, 5)
    for n in sizes:
        client.jacobian("counted", np.ones(n), mode="forward")
    client.jacobian("counted", np.ones(2), mode="forward")
    client.jacobian("counted", np.ones(6), mode="forward")  # Drops n = 3.
    assert traces["counted"] == 5
    client.jacobian("counted", np.ones(2), mode="forward")
    assert traces["counted"] == 5
    client.jacobian("counted", np.ones(3), mode="forward")
    assert traces["counted"] == 6


RIPPLED = """
import jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def rippled(x: Float[Array, "8"]) -> Float[Array, "8"]:
    return x + jnp.sin(jnp.roll(x, 1) * x)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "quantities"),
    [("2", ("slogdet",)), ("10", ("slogdet", "newton_step", "singular_values"))],
)
def test_factorisations_of_several_callers_do_not_wait_for_each_other(
    tmp_path: Path, threads: str, quantities: tuple[jacserve.Quantity, ...]
) -> None:
    """Batches that LAPACK divides among XLA's threads, as many as these or more."""
    (tmp_path / "functions.py").write_text(RIPPLED)
    points = np.random.default_rng(0).random((2**14, 8))
    with (
        server_process(tmp_path / "functions.py", NPROC=threads) as server,
        jacserve.Client(server.target, timeout_s=45.0) as client,
        ThreadPoolExecutor(4) as pool,
    ):

        def ask(_: int) -> bool:
            return client.evaluate("rippled", points, quantities=quantities).finite

        assert all(pool.map(ask, range(24)))


def test_nothing_is_kept_of_programs_that_are_not_kept(client: jacserve.Client) -> None:
    """JAX by itself keeps the traces of thousands."""

    def traces_kept(sizes: range) -> int:
        for size in sizes:
            client.jacobian("counted", np.ones(size))
        gc.collect()
        return sum(isinstance(each, JaxprEqn) for each in gc.get_objects())

    most = max(traces_kept(range(n, n + 4)) for n in (50, 54, 58))
    assert traces_kept(range(62, 102)) <= most
