"""A device without memory: what can be computed in parts is, and the server goes on."""

import resource
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import jacserve
import memory_functions
from server_process import server_process

FUNCTIONS = Path(memory_functions.__file__)
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits memory as Linux"
)


def memory_of(pid: int, field: str) -> int:
    """A line of a process's status, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


@contextmanager
def left_with(pid: int, size_bytes: int) -> Generator[None]:
    """Leaves a process that much more memory than it has."""
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    most = memory_of(pid, "VmSize") + size_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)


def test_a_batch_too_large_for_the_memory_is_computed_in_parts() -> None:
    points = np.random.default_rng(0).uniform(1.0, 2.0, (100, 1000))
    expected = np.stack([np.sin(np.outer(x, x)) @ x for x in points])
    with (
        server_process(FUNCTIONS, "--device", "cpu") as server,
        jacserve.Client(server.target, timeout_s=100) as client,
    ):
        client.value("waves", points[:2])
        # 128 rows take 1 GiB of sines at least, and 32 do 256 MiB.
        with left_with(server.process.pid, 700 * 2**20):
            result = client.evaluate("waves", points, quantities=["value"])
            assert result.bucket in {64 + 64, 3 * 32 + 4, 6 * 16 + 4}
            np.testing.assert_allclose(result.value, expected, rtol=1e-9)
            assert client.value("double", np.ones(3))[0] == 2.0
            # Parts may round otherwise, so exact ones are not divided.
            for array, wanted in (
                (points, 8 * 128 * 1000**2),
                (np.ones(10_000), 8 * 10_000**2),
            ):
                with pytest.raises(jacserve.CapacityError) as caught:
                    client.value("waves", array, exact=True)
                error = caught.value
                assert error.code == "RESOURCE_EXHAUSTED"
                assert error.reason == "DEVICE_OUT_OF_MEMORY"
                assert error.metadata["wanted"] == f"{wanted} bytes"
            assert client.value("double", np.ones(3))[0] == 2.0


@pytest.mark.slow
def test_a_worker_without_memory_is_asked_for_parts_and_goes_on() -> None:
    points = np.random.default_rng(0).uniform(1.0, 2.0, (100, 1000))
    expected = np.stack([np.sin(np.outer(x, x)) @ x for x in points])
    with (
        server_process(
            FUNCTIONS, "--device", "cpu", JACSERVE_ISOLATION="process"
        ) as server,
        jacserve.Client(server.target, timeout_s=100) as client,
    ):
        client.value("waves", points[:2])
        [worker] = client.status().workers
        assert worker.process_id is not None
        with left_with(worker.process_id, 700 * 2**20):
            result = client.evaluate("waves", points, quantities=["value"])
            np.testing.assert_allclose(result.value, expected, rtol=1e-9)
            with pytest.raises(jacserve.CapacityError) as caught:
                client.value("waves", np.ones(10_000), exact=True)
            assert caught.value.reason == "DEVICE_OUT_OF_MEMORY"
            assert client.value("double", np.ones(3))[0] == 2.0
        assert client.status().workers[0].start_count == 1
        assert client.describe("waves").quarantine_reason == ""


@pytest.mark.slow
def test_a_point_too_large_for_the_memory_is_computed_in_chunks() -> None:
    x = np.random.default_rng(0).uniform(1.0, 2.0, 400)
    with (
        server_process(FUNCTIONS, "--device", "cpu") as server,
        jacserve.Client(server.target, timeout_s=100) as client,
    ):
        whole = client.evaluate("waves", x, quantities=["jacobian"], mode="forward")
        assert whole.chunk_size is None
        # All products at once take 490 MiB, and 64 of them 82.
        with left_with(server.process.pid, 300 * 2**20):
            result = client.evaluate(
                "waves", x, quantities=["jacobian"], mode="forward"
            )
        assert result.chunk_size == 64
        np.testing.assert_allclose(result.jacobian, whole.jacobian, rtol=1e-13)
        assert client.value("double", np.ones(3))[0] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 128])
def test_a_job_goes_on_with_less_memory(batch_size: int | None) -> None:
    points = np.random.default_rng(0).uniform(1.0, 2.0, (256, 1000))
    expected = np.stack([np.sin(np.outer(x, x)) @ x for x in points])
    with (
        server_process(FUNCTIONS, "--device", "cpu") as server,
        jacserve.Client(server.target, timeout_s=100) as client,
    ):
        client.value("waves", points[:2])
        # A batch takes more; and with less, now and then, gRPC gets none and aborts.
        with left_with(server.process.pid, 1000 * 2**20):
            job = client.submit_job(
                "waves", points, quantities=["value"], batch_size=batch_size
            )
            result = job.result(timeout_s=100)
        np.testing.assert_allclose(result.value, expected, rtol=1e-9)
        job.delete()
