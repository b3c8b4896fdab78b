"""On a GPU, where there is one: run by `make test-gpu`."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

import jacserve
import zoo
from jacserve_server import serving
from jacserve_server.executor import default_threads, find_devices, memory_budget

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpus() -> list[Any]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        pytest.skip(f"there is no GPU: JAX found {jax.devices()}")


@pytest.fixture(scope="module")
def client(gpus: list[Any]) -> Generator[jacserve.Client]:
    del gpus
    with serving(zoo.registry, device="gpu") as server:
        with jacserve.Client(server.target) as connected:
            yield connected


@pytest.fixture(scope="module")
def cpu_client() -> Generator[jacserve.Client]:
    with serving(zoo.registry, device="cpu") as server:
        with jacserve.Client(server.target) as connected:
            yield connected


def test_auto_takes_all_gpus(gpus: list[Any]) -> None:
    assert find_devices("auto") == gpus
    assert find_devices("gpu") == gpus[:1]
    assert default_threads(gpus) == 2
    assert 0 < memory_budget(gpus) <= gpus[0].memory_stats()["bytes_limit"]


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_agrees_with_the_cpu(client, cpu_client, dtype: str, mode: Any) -> None:
    x = np.random.default_rng(0).uniform(0.5, 2.5, size=(100, 3)).astype(dtype)
    for points in (x[0], x):
        found = client.evaluate("spherical", points, mode=mode)
        expected = cpu_client.evaluate("spherical", points, mode=mode)
        assert found.device.startswith("gpu:")
        assert found.jacobian.dtype == dtype
        tolerance = 100 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(found.value, expected.value, rtol=tolerance)
        np.testing.assert_allclose(
            found.jacobian, expected.jacobian, rtol=tolerance, atol=tolerance
        )


def test_a_brief_program_runs_in_a_thread_there(client: jacserve.Client) -> None:
    x = np.full(3, 1.0)
    client.jacobian("spherical", x)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: client.evaluate("spherical", x), range(64)))
    assert all(result.device.startswith("gpu:") for result in found)
    for result in found[1:]:
        np.testing.assert_array_equal(result.jacobian, found[0].jacobian)
