"""Both clients, against a server in its own process."""

import asyncio
import inspect
import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import jacserve
from server_process import server_process

FUNCTIONS = Path(__file__).parents[2] / "examples" / "functions.py"
X = np.array([2.0, 0.5, 1.0])


@pytest.fixture(scope="module")
def target() -> Generator[str]:
    with server_process(FUNCTIONS) as server:
        yield server.target


def test_the_clients_have_the_same_methods() -> None:
    def public(client: type) -> dict[str, list[tuple[object, ...]]]:
        return {
            name: [
                (parameter.name, parameter.kind, parameter.default)
                for parameter in inspect.signature(
                    getattr(client, name)
                ).parameters.values()
            ]
            for name in dir(client)
            if not name.startswith("_")
        }

    blocking = public(jacserve.Client)
    # Tasks have a stream of their own already, and SciPy does not wait for them.
    del blocking["session"], blocking["fun_and_jac"]
    assert blocking == public(jacserve.AsyncClient)


def test_the_async_client_answers_as_the_blocking_one(target: str) -> None:
    async def ask() -> dict[str, object]:
        async with jacserve.AsyncClient(target, timeout_s=60.0) as client:
            jacobians = await asyncio.gather(
                *(client.jacobian("spherical", X) for _ in range(20))
            )
            assert all((jac == jacobians[0]).all() for jac in jacobians)
            with pytest.raises(LookupError, match="Did you mean spherical"):
                await client.describe("sphericl")
            with pytest.raises(ValueError, match="takes \\[3\\]"):
                await client.value("spherical", X[:2])
            return {
                "functions": await client.functions(),
                "describe": await client.describe("spherical"),
                "value": await client.value("spherical", X),
                "jacobian": jacobians[0],
                "value_and_jacobian": await client.value_and_jacobian("spherical", X),
                "gradient": await client.gradient("rosenbrock", X),
                "value_and_gradient": await client.value_and_gradient("rosenbrock", X),
                "determinant": await client.determinant("spherical", X),
                "abs_determinant": await client.abs_determinant("spherical", X),
                "slogdet": await client.slogdet("spherical", X),
            }

    answers = asyncio.run(ask())
    with jacserve.Client(target, timeout_s=60.0) as client:
        for name, answer in answers.items():
            method = getattr(client, name)
            scalar = "gradient" in name
            if name == "functions":
                arguments = ()
            elif name == "describe":
                arguments = ("spherical",)
            else:
                arguments = ("rosenbrock" if scalar else "spherical", X)
            expected = method(*arguments)
            if isinstance(expected, np.ndarray | tuple):
                np.testing.assert_equal(answer, expected)
            else:
                assert answer == expected


def test_one_client_serves_many_threads(target: str) -> None:
    with jacserve.Client(target) as client, ThreadPoolExecutor(8) as pool:
        points = np.random.default_rng(0).uniform(0.5, 2.5, size=(200, 3))
        single = list(pool.map(lambda x: client.jacobian("spherical", x), points))
        batch = client.jacobian("spherical", points)
        np.testing.assert_allclose(np.stack(single), batch, rtol=1e-13, atol=1e-13)


def test_cancelling_an_async_call_leaves_the_client_usable(target: str) -> None:
    async def scenario() -> None:
        async with jacserve.AsyncClient(target) as client:
            task = asyncio.create_task(client.jacobian("rosenbrock", np.ones(1000)))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.jacobian("spherical", X)).shape == (3, 3)

    asyncio.run(scenario())


def test_a_timeout_of_the_client_holds_for_all_calls(target: str) -> None:
    x = np.ones(321)  # Compiling for a new shape takes longer than 5 ms.
    with jacserve.Client(target, timeout_s=0.005) as client:
        with pytest.raises(TimeoutError, match="larger timeout_s"):
            client.gradient("rosenbrock", x)
        assert client.gradient("rosenbrock", x, timeout_s=60.0).shape == (321,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"argnums": 0}, "no option argnums; there are wrt, mode"),
        ({"timeout": 1.0, "requires_finite": True}, "no option requires_finite, tim"),
        ({"wrt": [0]}, "wrt is 0; pass a str"),
        ({"cast": "yes"}, "cast is 'yes'; pass a bool"),
    ],
)
def test_a_misspelt_option_is_not_ignored(target: str, options, words: str) -> None:
    with jacserve.Client(target) as client, pytest.raises(TypeError, match=words):
        client.jacobian("spherical", X, **options)


def test_names_must_be_text(target: str) -> None:
    with jacserve.Client(target) as client:
        with pytest.raises(TypeError, match="function is None; pass a str"):
            client.jacobian(None, X)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="a name of inputs is 0; pass a str"):
            client.jacobian("spherical", {0: X})  # pyright: ignore


def test_an_infinite_timeout_overrides_the_clients(target: str) -> None:
    x = np.ones(322)
    with jacserve.Client(target, timeout_s=0.005) as client:
        assert client.gradient("rosenbrock", x, timeout_s=math.inf).shape == (322,)


def test_a_result_shows_shapes_not_numbers(target: str) -> None:
    with jacserve.Client(target) as client:
        result = client.evaluate("spherical", X)
    assert repr(result) == (
        "<Result spherical@1 value=float64[3], jacobian=float64[3, 3] "
        "mode=forward on cpu:0>"
    )
    assert result.timing.execute_s > 0
    assert result.device == "cpu:0"


def test_a_function_is_described(target: str) -> None:
    with jacserve.Client(target) as client:
        info = client.describe("classifier@1")
    assert info.signature == "classifier(pixels: [784], weights: [10, 785]) -> [10]"
    assert info.documentation.startswith("Probabilities of the ten digits")
    assert info.modes == ("forward", "reverse")
    assert info.arguments[0].differentiable
    assert "float32" in info.arguments[0].dtypes
