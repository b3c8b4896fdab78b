"""Several devices behind one queue: four of a CPU, in a process of their own."""

import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

import jacserve
from jacserve_server import Config
from jacserve_server.executor import (
    DeviceError,
    default_threads,
    find_device,
    find_devices,
)
from server_process import server_process

FUNCTIONS = """
import os
import jax, jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def pairs(x: Float[Array, "n"], k: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sin(k * x) * jnp.roll(x, 1)

@registry.function
def long(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.lax.fori_loop(0, 20_000, lambda _, y: jnp.sin(y) + 1e-3, x)

def allocator(x: Float[Array, ""]) -> Float[Array, ""]:
    return x

allocator.__doc__ = " ".join(
    f"{name.removeprefix('XLA_')}={value}"
    for name, value in sorted(os.environ.items())
    if name.startswith(("XLA_CLIENT_", "XLA_PYTHON_CLIENT_"))
)
registry.function(allocator)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture(scope="module")
def target(functions: Path) -> Generator[str]:
    with server_process(
        functions,
        "--device",
        "cpu:0,1,3",
        JACSERVE_SHARD_ROWS="64",
        JACSERVE_GPU_MEMORY_FRACTION="0.5",
        JACSERVE_GPU_PREALLOCATE="false",
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.9",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    ) as server:
        yield server.target


def test_single_calls_run_on_all_devices(target: str) -> None:
    xs = np.random.default_rng(0).normal(size=(24, 3))
    with jacserve.Client(target) as client, ThreadPoolExecutor(12) as pool:
        first = client.evaluate("long", xs[0])
        assert first.device == "cpu:0"
        found, end = [first], time.monotonic() + 60
        while time.monotonic() < end and len({r.device for r in found}) < 3:
            found = list(pool.map(lambda x: client.evaluate("long", x), xs))
        assert {result.device for result in found} == {"cpu:0", "cpu:1", "cpu:3"}
        assert all(result.timing.compile_s == 0 for result in found)
        for result, x in zip(found, xs, strict=True):
            # The same program on the same kind of device.
            expected = client.evaluate("long", x)
            np.testing.assert_array_equal(result.jacobian, expected.jacobian)


def test_a_large_batch_is_divided_among_devices(target: str) -> None:
    random = np.random.default_rng(1)
    x, k = random.normal(size=(300, 4)), random.normal(size=4)
    x[200, 1] = np.nan
    with jacserve.Client(target) as client:
        whole = [
            client.evaluate("pairs", (x[i : i + 60], k)) for i in range(0, 300, 60)
        ]
        assert all(result.device == "cpu:0" for result in whole)
        result, end = whole[0], time.monotonic() + 60
        while result.device.count("cpu:") < 3 and time.monotonic() < end:
            result = client.evaluate("pairs", (x, k))
    assert result.device == "cpu:0, cpu:1, cpu:3"
    assert result.bucket == 3 * 128
    assert not result.finite
    for name in ("value", "jacobian"):
        parts = [getattr(part, name) for part in whole]
        np.testing.assert_allclose(
            getattr(result, name), np.concatenate(parts), rtol=1e-13, atol=1e-15
        )


def test_the_allocator_is_set_before_jax_is_used(target: str) -> None:
    with jacserve.Client(target) as client:
        text = client.describe("allocator").documentation
    assert text == "CLIENT_MEM_FRACTION=0.5 PYTHON_CLIENT_PREALLOCATE=false"


def test_devices_by_name() -> None:
    [cpu] = find_devices("cpu")
    assert find_devices("cpu:0") == [cpu]
    assert find_device("cpu") is cpu
    with pytest.raises(DeviceError, match=r"cpu:0,7 is not there; JAX found cpu:0"):
        find_devices("cpu:0,7")
    with pytest.raises(DeviceError, match=r"cpu:0,0 has a device twice"):
        find_devices("cpu:0,0")
    with pytest.raises(DeviceError, match=r"tpu is not there"):
        find_devices("tpu")


def test_devices_of_a_cpu_share_its_cores() -> None:
    [cpu] = find_devices("cpu")
    assert default_threads([cpu]) >= default_threads([cpu] * 2) >= 1
    assert default_threads([cpu] * 100) == 1


@pytest.mark.parametrize("name", ["GPU", "gpu:", "gpu:0,", "gpu:0 1", "gpu,cpu", ""])
def test_a_device_that_is_none_is_refused_in_words(name: str) -> None:
    with pytest.raises(ValidationError, match="pass auto, a platform such as cpu"):
        Config.load(device=name)
