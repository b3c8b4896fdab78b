"""What one client may hold, keep open and have compiled, beside others."""

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server import Registry, WarmUp, serving
from raw_calls import sender

traced: list[int] = []
registry = Registry()


@registry.function(warm_up=[WarmUp({"n": 3})])
def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return 2.0 * x


@registry.function
def noted(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Takes down the sizes that it is traced at."""
    traced.append(x.shape[0])
    return jnp.sin(x)


@registry.function
def awkward(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Takes long to be traced."""
    time.sleep(0.05)
    return x


@contextmanager
def clients(target: str, count: int) -> Generator[list[jacserve.Client]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(jacserve.Client(target, timeout_s=60))
            for _ in range(count)
        ]


def refusal(call: Callable[[int], object]) -> jacserve.JacobianError:
    """Calls with ever new sizes until it is refused."""
    for size in range(1, 100):
        try:
            call(size)
        except jacserve.JacobianError as error:
            return error
    pytest.fail("it never was")


def test_ever_new_shapes_do_not_drive_out_what_others_have() -> None:
    with (
        serving(registry, max_programs=8, max_identity_programs=2) as server,
        jacserve.Client(server.target) as client,
    ):
        for size in range(4, 24):
            client.value("noted", np.ones(size))
        traced.clear()
        # The last two are still there, and so is what the server has warmed up.
        client.value("noted", np.ones(23))
        client.value("noted", np.ones(22))
        assert not traced
        assert client.evaluate("double", np.ones(3)).timing.compile_s == 0
        client.value("noted", np.ones(21))
        assert traced


def test_who_compiles_ever_new_shapes_is_refused_with_the_numbers() -> None:
    with serving(registry, compile_budget_s=0.5) as server:
        with clients(server.target, 1) as [client]:
            client.value("double", np.ones(3))
            error = refusal(lambda n: client.value("awkward", np.ones(n)))
            assert error.reason == "COMPILE_BUDGET_SPENT"
            assert error.code == "RESOURCE_EXHAUSTED"
            assert error.metadata["compile_budget_s"] == "0.5"
            assert float(error.metadata["spent_s"]) >= 0.5
            # What is compiled already is still served.
            assert client.value("awkward", np.ones(1))[0] == 1.0
            assert client.value("double", np.ones(3))[0] == 2.0
        # Whoever connects again is the same.
        with sender(server.target) as ask:
            query = pb.Query(function="noted", quantities=[pb.QUANTITY_VALUE])
            tensor = query.inputs.add().tensor
            tensor.dtype, tensor.data = pb.DTYPE_FLOAT64, np.ones(99).tobytes()
            tensor.shape.append(99)
            with pytest.raises(jacserve.JacobianError) as caught:
                ask(query)
            assert caught.value.reason == "COMPILE_BUDGET_SPENT"


def test_a_flood_is_refused_as_soon_as_the_budget_is_spent() -> None:
    settings = {"compile_budget_s": 0.5, "compile_threads": 1}
    with serving(registry, **settings) as server, clients(server.target, 1) as [client]:
        with client.session() as session:
            asked = [session.submit("awkward", np.ones(n)) for n in range(1, 60)]
            errors = [each.exception(timeout=60) for each in asked]
        reasons = [error.reason for error in errors if error is not None]  # pyright: ignore[reportAttributeAccessIssue]
        assert set(reasons) == {"COMPILE_BUDGET_SPENT"}
        assert len(reasons) > 40


def test_patterns_spend_the_budget_too() -> None:
    with (
        serving(registry, compile_budget_s=0.2) as server,
        jacserve.Client(server.target) as client,
    ):
        error = refusal(lambda n: client.sparsity("awkward", sizes={"n": n}))
        assert error.reason == "COMPILE_BUDGET_SPENT"


def test_a_client_has_no_more_queries_in_flight_than_it_may() -> None:
    with (
        serving(registry, max_identity_queries=2) as server,
        sender(server.target) as ask,
        ThreadPoolExecutor(4) as pool,
        jacserve.Client(server.target) as client,
    ):
        query = pb.Query(function="awkward", quantities=[pb.QUANTITY_VALUE])
        tensor = query.inputs.add().tensor
        tensor.dtype, tensor.data = pb.DTYPE_FLOAT64, np.ones(3).tobytes()
        tensor.shape.append(3)
        calls = [pool.submit(ask, query) for _ in range(4)]
        errors = [call.exception(timeout=30) for call in calls]
        refused = [error for error in errors if error is not None]
        assert len(refused) == 2
        for error in refused:
            assert isinstance(error, jacserve.OverloadedError)
            assert "takes 2 of each" in str(error)
        assert client.value("double", np.ones(3))[0] == 2.0


@pytest.mark.parametrize("rank", [17, 40, 100_000])
def test_arrays_have_no_more_axes_than_they_may(rank: int) -> None:
    with serving(registry) as server, sender(server.target) as ask:
        query = pb.Query(function="double", quantities=[pb.QUANTITY_VALUE])
        tensor = query.inputs.add().tensor
        tensor.dtype, tensor.data = pb.DTYPE_FLOAT64, b"12345678"
        tensor.shape.extend([1] * rank)
        with pytest.raises(jacserve.InvalidRequestError) as caught:
            ask(query)
        assert caught.value.reason == "MALFORMED_TENSOR"
        assert caught.value.metadata == {"rank": str(rank), "max_rank": "16"}
