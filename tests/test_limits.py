"""What the server refuses to take on, and what it survives."""

import asyncio
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice

import grpc.aio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float, Inexact

import jacserve
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server import Registry, serving
from raw_calls import sender

registry = Registry()
release = threading.Event()
running = threading.Semaphore(0)


def wait_for_release(x: np.ndarray) -> np.ndarray:
    running.release()
    assert release.wait(30)
    return x


@registry.function
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2.0 * x


@registry.function
def patient(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Runs until it is told to stop."""
    return jax.pure_callback(wait_for_release, x, x, vmap_method="sequential")


def dry_pump(x: np.ndarray) -> np.ndarray:
    raise RuntimeError("the pump is dry")


@registry.function
def pump(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.pure_callback(dry_pump, x, x)


@registry.function
def empties(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    return x


class UnprintableError(BaseException):
    def __str__(self) -> str:
        raise ValueError("no words")


@registry.function
def odd(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 42:
        raise UnprintableError
    if x.size == 41:
        raise KeyboardInterrupt
    if x.size == 43:
        raise ValueError("月" * 3000 + "/srv/secret/a.py")
    return x


@registry.function
def greedy(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.linalg.det(jnp.outer(x, x))


@registry.function
def blends(z: Complex[Array, "2"], x: Float[Array, "2"]) -> Complex[Array, "2"]:
    return z**2 * x


@registry.function
def magnitude(z: Inexact[Array, "n"]) -> Inexact[Array, "n"]:
    return jnp.abs(z) ** 2


@registry.function
def unbatched_callback(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.pure_callback(np.sin, x, x)


@pytest.fixture
def client() -> Generator[jacserve.Client]:
    release.clear()
    with (
        serving(
            registry,
            device_threads=1,
            max_queries=5,
            max_queued_bytes=2**20,
            max_program_bytes=2**28,
        ) as server,
        jacserve.Client(server.target) as connected,
    ):
        yield connected
        release.set()


@pytest.fixture
def calls(client: jacserve.Client) -> Generator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool
        release.set()


def occupy(client: jacserve.Client, pool: ThreadPoolExecutor):
    """Keeps the only device thread busy until `release` is set."""
    call = pool.submit(client.value, "patient", np.ones(3))
    assert running.acquire(timeout=30)
    return call


def test_too_many_queries_are_refused_with_a_time_to_come_back(
    client: jacserve.Client, calls: ThreadPoolExecutor
) -> None:
    occupied = occupy(client, calls)
    # Two more find room in the queue: with them this client has more than are left.
    # The rest are turned away at once.
    asked = [calls.submit(client.value, "patient", np.ones(3)) for _ in range(5)]
    refused = [call.exception() for call in islice(as_completed(asked), 3)]
    release.set()
    for error in refused:
        assert isinstance(error, jacserve.OverloadedError)
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert error.retry_after_s == pytest.approx(0.1)
        assert error.metadata["max_queries"] == "5"
    occupied.result(timeout=30)
    assert sum(call.exception(timeout=30) is None for call in asked) == 2
    assert all(running.acquire(timeout=30) for _ in range(2))


def test_a_connection_has_no_more_calls_open_than_it_may() -> None:
    release.clear()
    pool = ThreadPoolExecutor(3)
    with (
        serving(registry, device_threads=3, max_streams=2) as server,
        jacserve.Client(server.target) as client,
        sender(server.target) as other,
    ):
        calls = [pool.submit(client.value, "patient", np.ones(3)) for _ in range(3)]
        try:
            assert all(running.acquire(timeout=30) for _ in range(2))
            # The third waits in its client, and another connection does not mind.
            assert not running.acquire(timeout=0.3)
            with pytest.raises(jacserve.InvalidRequestError):
                other(pb.Query())
        finally:
            release.set()
        assert all(call.result(timeout=30)[0] == 1.0 for call in calls)
        assert running.acquire(timeout=30)
    pool.shutdown()


def test_too_many_bytes_are_refused(
    client: jacserve.Client, calls: ThreadPoolExecutor
) -> None:
    client.value("double", np.ones(2**17))  # Alone, 1 MiB and a little more fits.
    occupied = occupy(client, calls)
    with pytest.raises(jacserve.OverloadedError, match="bytes are in flight"):
        client.value("double", np.ones(2**17))
    release.set()
    occupied.result(timeout=30)


def test_a_deadline_in_the_queue_spends_no_device_time(
    client: jacserve.Client, calls: ThreadPoolExecutor
) -> None:
    client.value("double", np.ones(3))
    occupied = occupy(client, calls)
    with pytest.raises(jacserve.DeadlineError):
        client.value("patient", np.ones(3), timeout_s=0.3)
    time.sleep(0.1)  # The server is told a moment after the client.
    release.set()
    occupied.result(timeout=30)
    assert client.value("double", np.ones(3))[0] == 2.0
    assert not running.acquire(blocking=False)


def test_a_program_that_would_not_fit_is_refused_before_it_runs(
    client: jacserve.Client,
) -> None:
    with pytest.raises(jacserve.CapacityError) as caught:
        client.value("greedy", np.ones(10_000))
    assert caught.value.reason == "DEVICE_OUT_OF_MEMORY"
    assert caught.value.metadata["max_program_bytes"] == str(2**28)
    assert client.value("greedy", np.ones(3)) == 0.0


def test_an_exception_while_running_reaches_its_caller(
    client: jacserve.Client,
) -> None:
    with pytest.raises(
        jacserve.ServerError, match="RuntimeError: the pump is dry"
    ) as e:
        client.value("pump", np.ones(3))
    assert e.value.reason == "EXECUTION_FAILED"
    assert "Traceback" not in str(e.value)
    assert client.value("double", np.ones(3))[0] == 2.0


def test_a_function_can_not_end_the_server(client: jacserve.Client) -> None:
    with pytest.raises(jacserve.InvalidRequestError, match="raised KeyboardInterrupt"):
        client.value("odd", np.ones(41))
    assert client.value("double", np.ones(3))[0] == 2.0


def test_an_exception_without_words(client: jacserve.Client) -> None:
    with pytest.raises(jacserve.InvalidRequestError, match="raised UnprintableError"):
        client.value("odd", np.ones(42))


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.value("odd", np.ones(43)),
        lambda c: c.value("x" * 20_000, np.ones(3)),
        lambda c: c.value("月" * 20_000, np.ones(3)),
        lambda c: c.value("double", {"月" * 20_000: np.ones(3)}),
        lambda c: c.jacobian("double", np.ones(3), wrt="月" * 20_000),
    ],
)
def test_long_texts_do_not_destroy_the_error(client: jacserve.Client, call) -> None:
    for _ in range(5):
        with pytest.raises(jacserve.JacobianError) as caught:
            call(client)
        assert caught.value.code in {"INVALID_ARGUMENT", "NOT_FOUND"}
        assert caught.value.reason
        assert " ... " in str(caught.value)
        assert "/srv" not in str(caught.value)


def test_absurd_shapes_without_bytes(client: jacserve.Client) -> None:
    # Rows of nothing still have a flag each, and axes of nothing a Jacobian.
    with pytest.raises(jacserve.CapacityError) as caught:
        client.value("double", np.empty((2**31 - 1, 0)))
    assert caught.value.reason == "RESULT_TOO_LARGE"
    with pytest.raises(jacserve.CapacityError) as caught:
        client.jacobian("double", np.empty((0, 2**31 - 1)))
    assert caught.value.reason == "RESULT_TOO_LARGE"
    assert client.jacobian("empties", np.empty((0, 2**31 - 1))).shape == (0, 0)
    assert client.value("empties", np.empty((0, 2**31 - 1))).shape == (0, 2**31 - 1)


def test_lists_of_absurd_length(client: jacserve.Client) -> None:
    with pytest.raises(jacserve.InvalidRequestError, match="wrt has 1001 entries"):
        client.jacobian("double", np.ones(3), wrt=["x"] * 1001)


def test_real_and_complex_arguments_can_each_be_differentiated(
    client: jacserve.Client,
) -> None:
    z, x = np.array([1 + 2j, 3j]), np.array([0.5, 2.0])
    by_z = client.evaluate("blends", (z, x), wrt="z")
    by_x = client.evaluate("blends", (z, x), wrt="x")
    np.testing.assert_allclose(by_z.jacobian, np.diag(2 * z * x))
    np.testing.assert_allclose(by_x.jacobian, np.diag(z**2))
    assert by_x.mode == "forward"
    with pytest.raises(jacserve.InvalidRequestError, match="mixes real and complex"):
        client.jacobian("blends", (z, x))
    with pytest.raises(jacserve.InvalidRequestError, match="Use forward mode") as e:
        client.jacobian("blends", (z, x), wrt="x", mode="reverse")
    assert e.value.reason == "MODE_UNSUPPORTED"


def test_what_is_not_holomorphic_has_a_derivative_by_reals_only(
    client: jacserve.Client,
) -> None:
    np.testing.assert_allclose(
        client.jacobian("magnitude", np.array([1.0, -2.0])), np.diag([2.0, -4.0])
    )
    with pytest.raises(jacserve.InvalidRequestError, match="holomorphic") as caught:
        client.jacobian("magnitude", np.array([1j, 2.0]))
    assert caught.value.reason == "MODE_UNSUPPORTED"


def test_a_function_that_can_not_be_vmapped_says_so(client: jacserve.Client) -> None:
    assert client.value("unbatched_callback", np.ones(2)).shape == (2,)
    with pytest.raises(jacserve.InvalidRequestError, match="batchable=False"):
        client.value("unbatched_callback", np.ones((2, 2)))


def test_a_fault_of_the_server_has_a_request_id(
    client: jacserve.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("jacserve_server.requests.decode_query", None)
    with pytest.raises(jacserve.ServerError) as caught:
        client.value("double", np.ones(3))
    assert (caught.value.code, caught.value.reason) == ("INTERNAL", "UNEXPECTED")
    assert caught.value.request_id in str(caught.value)
    assert f"request {caught.value.request_id} failed" in caplog.text
    assert "NoneType" not in str(caught.value)


def test_the_grace_bounds_a_shutdown() -> None:
    release.clear()
    pool = ThreadPoolExecutor(1)
    with serving(registry, grace_s=0.5) as server:
        client = jacserve.Client(server.target)
        call = occupy(client, pool)
        stopping = time.monotonic()
    took = time.monotonic() - stopping
    release.set()
    assert 0.5 <= took < 3.0
    assert isinstance(call.exception(timeout=30), jacserve.JacobianError)
    client.close()
    pool.shutdown()


def test_float32_and_float64_at_the_same_time(server, client) -> None:
    del client
    x = np.random.default_rng(0).uniform(0.5, 2.5, size=3)
    with jacserve.Client(server.target) as shared, ThreadPoolExecutor(8) as pool:
        expected = {t: shared.jacobian("spherical", x.astype(t)) for t in "fd"}
        dtypes = "fd" * 100
        for dtype, jac in zip(
            dtypes,
            pool.map(lambda t: shared.jacobian("spherical", x.astype(t)), dtypes),
            strict=True,
        ):
            assert jac.dtype == dtype
            np.testing.assert_array_equal(jac, expected[dtype])


def test_calls_at_the_limit_of_a_connection_wait_and_are_not_reset() -> None:
    async def ask(target: str) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            # Unlike ours, it is not called again when it fails.
            check = channel.unary_unary("/grpc.health.v1.Health/Check")

            async def caller() -> None:
                for _ in range(20):
                    await check(b"")

            await asyncio.gather(*(caller() for _ in range(64)))

    with serving(registry, max_streams=16) as server:
        asyncio.run(ask(server.target))
