"""What Prometheus is told over HTTP, and administrators over gRPC, of real calls."""

import asyncio
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from prometheus_client.parser import text_string_to_metric_families

import jacserve
from jacserve.v1 import admin_pb2, admin_pb2_grpc
from jacserve_server import Registry, RunningServer, serving
from jacserve_server.config import Config
from jacserve_server.tallies import SECONDS, Histogram, quantile
from server_process import server_process

ROOT = Path(__file__).parents[2]
Labels = frozenset[tuple[str, str]]
ZOO_FUNCTION = """
import jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x ** 2
"""


def registry_of_two() -> Registry:
    registry = Registry()

    @registry.function
    def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return x**2

    @registry.function
    def slow(x: Float[Array, "n"]) -> Float[Array, "n"]:
        def wait(value: np.ndarray) -> np.ndarray:
            time.sleep(0.3)
            return value

        return jax.pure_callback(
            wait, jax.ShapeDtypeStruct(x.shape, x.dtype), jnp.sin(x)
        )

    return registry


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    jobs_dir = tmp_path / "jobs"  # Where there has never been a job.
    with serving(registry_of_two(), metrics_port=0, jobs_dir=jobs_dir) as running:
        yield running


def scraped(server: RunningServer) -> dict[tuple[str, Labels], float]:
    with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: dict[tuple[str, Labels], float], name: str, **labels: str) -> float:
    return found[f"jacserve_{name}", frozenset(labels.items())]


def calls(found: dict[tuple[str, Labels], float]) -> dict[tuple[str, ...], float]:
    """Counts of calls by method, function, code and reason."""
    return {
        tuple(
            dict(labels)[each] for each in ("method", "function", "code", "reason")
        ): n
        for (name, labels), n in found.items()
        if name == "jacserve_calls_total"
    }


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def admin(server: RunningServer) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def test_every_call_is_counted_once(server: RunningServer) -> None:
    x = np.ones(3)
    with jacserve.Client(server.target) as client:
        for _ in range(3):
            client.jacobian("square", x)
        client.jacobian("square", np.ones((5, 3)))  # A batch.
        with pytest.raises(ValueError, match="shape"):
            client.jacobian("square", 1.0)
        for name in ("nothing", "../etc/passwd", "no such function " * 9):
            with pytest.raises(LookupError):
                client.jacobian(name, x)
        client.functions()
        client.value("square", np.ones(400_000))  # By stream.
        with client.session() as session:
            session.jacobian("square", x)
            with pytest.raises(ValueError, match="shape"):
                session.jacobian("square", 1.0)
            with pytest.raises(jacserve.JacobianError):
                session.jacobian("nothing", x)
    until(lambda: ("Session", "", "OK", "") in calls(scraped(server)))
    found = scraped(server)
    assert calls(found) == {
        ("Evaluate", "square@1", "OK", ""): 4,
        ("Evaluate", "square@1", "INVALID_ARGUMENT", "SHAPE_MISMATCH"): 1,
        ("Evaluate", "", "NOT_FOUND", "FUNCTION_NOT_FOUND"): 3,
        ("ListFunctions", "", "OK", ""): 1,
        ("EvaluateStream", "square@1", "OK", ""): 1,
        ("Session", "square@1", "OK", ""): 1,
        ("Session", "square@1", "INVALID_ARGUMENT", "SHAPE_MISMATCH"): 1,
        ("Session", "", "NOT_FOUND", "FUNCTION_NOT_FOUND"): 1,
        ("Session", "", "OK", ""): 1,  # The stream itself.
    }
    assert (
        value(found, "call_seconds_count", method="Evaluate", function="square@1") == 5
    )
    assert value(found, "execute_seconds_count", function="square@1") == 6
    assert value(found, "queue_seconds_count", function="square@1") == 6
    assert value(found, "compile_seconds_count", function="square@1") == 3
    assert value(found, "program_misses_total") == value(found, "programs") == 3
    assert value(found, "program_hits_total") == 3
    assert value(found, "coalesced_points_count") == 5  # All but the batch.
    assert value(found, "health_serving") == 1
    assert value(found, "queries_in_flight") == value(found, "streams_open") == 0
    assert value(found, "build_info", version="0.1.0") == 1


def test_a_label_is_never_what_a_stranger_sends(server: RunningServer) -> None:
    before = len(scraped(server))
    with jacserve.Client(server.target) as client:
        with pytest.raises(LookupError):
            client.jacobian("unknown-0", 1.0)
        once = len(scraped(server))
        for n in range(1, 200):
            with pytest.raises(LookupError):
                client.jacobian(f"unknown-{n}", 1.0)
    found = scraped(server)
    assert before < once == len(found)
    assert calls(found) == {("Evaluate", "", "NOT_FOUND", "FUNCTION_NOT_FOUND"): 200}


def test_cancelled_calls_and_what_is_in_flight(server: RunningServer) -> None:
    slow = ("Evaluate", "slow@1")
    with jacserve.Client(server.target) as client, admin(server) as stub:
        client.value("slow", np.ones(2))  # Compiled now.
        with pytest.raises(TimeoutError):
            client.value("slow", np.ones(2), timeout_s=0.05)
        until(lambda: (*slow, "CANCELLED", "") in calls(scraped(server)))
        threads = [
            threading.Thread(target=client.value, args=("slow", np.full(2, float(n))))
            for n in range(6)
        ]
        for thread in threads:
            thread.start()

        def busy() -> bool:
            load = stub.GetStatus(admin_pb2.GetStatusRequest()).load
            return bool(load.query_count and load.waiting_count)

        until(busy)
        status = stub.GetStatus(admin_pb2.GetStatusRequest())
        [device] = status.devices
        assert 0 < device.running_count <= device.slot_count
        [identity] = status.identities
        assert identity.identity.startswith("ipv4:127.0.0.1:")
        assert identity.query_count == status.load.query_count
        assert identity.size_bytes == status.load.size_bytes > 0
        for thread in threads:
            thread.join()
        until(lambda: calls(scraped(server)).get((*slow, "OK", "")) == 7)
        status = stub.GetStatus(admin_pb2.GetStatusRequest())
        assert not status.identities
        assert status.load.query_count == status.load.waiting_count == 0
        [function] = status.functions
        assert function.name == "functions/slow@1"
        assert (function.query_count, function.error_count) == (8, 1)
        assert 0.3 <= function.p50_seconds <= function.p99_seconds
        assert function.execute_seconds >= 7 * 0.3
    waited = value(scraped(server), "queue_seconds_sum", function="slow@1")
    assert waited > 0.3


def test_status(server: RunningServer) -> None:
    with jacserve.Client(server.target) as client, admin(server) as stub:
        client.jacobian("square", np.ones((7, 3)))
        client.jacobian("square", np.ones((7, 3)))
        with client.session() as session, suppress(ValueError):
            session.jacobian("square", 1.0)
        status = stub.GetStatus(admin_pb2.GetStatusRequest())
        assert status.version == version("jacserve")
        assert abs(status.start_time.seconds - time.time()) < 120
        assert status.is_serving
        [device] = status.devices
        assert (device.name, device.kind) == ("cpu:0", "cpu")
        assert device.slot_count >= 1
        assert device.running_count == device.used_bytes == device.limit_bytes == 0
        assert status.load.max_query_count == Config().max_queries
        assert status.load.max_size_bytes == Config().max_queued_bytes
        programs = status.programs
        assert (programs.count, programs.max_count) == (1, Config().max_programs)
        assert (programs.hit_count, programs.miss_count) == (1, 1)
        assert programs.compile_seconds > 0
        [function] = status.functions
        assert function.name == "functions/square@1"
        assert (function.query_count, function.error_count) == (3, 1)
        assert function.point_count == 14
        assert 0 < function.p50_seconds <= function.p99_seconds
        assert status.calls["INVALID_ARGUMENT"] == 1
        assert status.resident_bytes > 2**20
        assert not status.jobs
        assert not status.workers
        again = stub.GetStatus(admin_pb2.GetStatusRequest())
        assert again.calls["OK"] > status.calls["OK"]


def test_jobs_are_counted(server: RunningServer, tmp_path: Path) -> None:
    with (
        serving(
            registry_of_two(), metrics_port=0, jobs_dir=tmp_path / "jobs"
        ) as server,
        jacserve.Client(server.target) as client,
        admin(server) as stub,
    ):
        points = np.random.default_rng(0).normal(size=(100, 3))
        client.submit_job("square", points).wait()
        with pytest.raises(LookupError):
            client.job("none").cancel()
        found = scraped(server)
        assert value(found, "jobs", state="succeeded") == 1
        assert value(found, "jobs", state="queued") == 0
        assert value(found, "job_points_total") >= 100
        status = stub.GetStatus(admin_pb2.GetStatusRequest())
        assert status.jobs["succeeded"] == 1
        [function] = status.functions
        assert function.query_count == 0
        assert function.point_count >= 100


def test_a_function_that_is_not_quarantined_is_released(server: RunningServer) -> None:
    with admin(server) as stub:
        request = admin_pb2.ReleaseFunctionRequest(name="square")
        assert stub.ReleaseFunction(request).name == "functions/square@1"
        request = admin_pb2.ReleaseFunctionRequest(name="nothing")
        with pytest.raises(grpc.RpcError) as caught:
            stub.ReleaseFunction(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # pyright: ignore


def test_two_servers_in_one_process_have_metrics_of_their_own(
    server: RunningServer,
) -> None:
    with serving(registry_of_two(), metrics_port=0) as other:
        with jacserve.Client(server.target) as client:
            client.jacobian("square", np.ones(3))
        assert calls(scraped(server)) == {("Evaluate", "square@1", "OK", ""): 1}
        assert calls(scraped(other)) == {}
    with pytest.raises(urllib.error.URLError):
        scraped(other)


def test_the_port_has_nothing_else(server: RunningServer) -> None:
    root = server.metrics_url.removesuffix("metrics")
    for path in ("", "metrics/", "metricsx", "favicon.ico", "../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(root + path, timeout=30)
        with closing(caught.value):
            assert caught.value.code == 404
            assert caught.value.headers["Server"].strip() == "jacserve"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(server.metrics_url, data=b"x", timeout=30)
    caught.value.close()
    assert caught.value.code == 501


def test_whoever_holds_connections_open_keeps_no_call_waiting(
    server: RunningServer,
) -> None:
    import socket

    address = server.metrics_url.split("/")[2].split(":")
    held = [socket.create_connection((address[0], int(address[1]))) for _ in range(50)]
    try:
        until(lambda: threading.active_count() > 8)
        before = threading.active_count()
        with jacserve.Client(server.target) as client:
            client.jacobian("square", np.ones(3))
        assert threading.active_count() < before + 10
    finally:
        for each in held:
            each.close()
    until(lambda: bool(calls_or_none(server)))


def calls_or_none(server: RunningServer) -> dict[tuple[str, ...], float] | None:
    with suppress(OSError):
        return calls(scraped(server))
    return None


def test_a_port_that_is_taken_stops_the_server_clearly(
    server: RunningServer, tmp_path: Path
) -> None:
    file = tmp_path / "functions.py"
    file.write_text(ZOO_FUNCTION)
    port = server.metrics_url.split(":")[2].split("/")[0]
    with pytest.raises(AssertionError) as caught:
        with server_process(file, "--metrics-port", port):
            pass
    assert f"can't answer Prometheus on 127.0.0.1:{port}" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_quantiles_bound_what_was_observed() -> None:
    histogram = Histogram(SECONDS)
    assert quantile([histogram], 0.5) == quantile([], 0.5) == 0
    for seconds in [0.0015] * 99 + [700.0]:
        histogram.observe(seconds)
    assert quantile([histogram], 0.5) == quantile([histogram], 0.99) == 0.002
    assert quantile([histogram], 1.0) == float("inf")


def test_a_server_that_does_not_answer_fails_the_scrape() -> None:
    from jacserve_server import metrics

    class Stuck:
        async def status(self) -> None:
            await asyncio.Event().wait()

    async def scrape() -> int:
        loop = asyncio.get_running_loop()
        port = metrics.MetricsPort(
            Stuck(),  # pyright: ignore[reportArgumentType]
            loop,
            host="127.0.0.1",
            port=0,
            patience_s=0.1,
        )
        try:
            await asyncio.to_thread(urllib.request.urlopen, port.url, None, 30)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        finally:
            await asyncio.to_thread(port.close)
        return 200

    assert asyncio.run(scrape()) == 503


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:jacserve|process)_\w+", text))


def test_dashboard_and_alerts_ask_for_what_there_is(server: RunningServer) -> None:
    with jacserve.Client(server.target) as client:
        client.jacobian("square", np.ones(3))
    with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
        text = response.read().decode()
    there = names_in(re.sub("{.*", "", text)) | {
        f"{name}_bucket" for name in re.findall(r"# TYPE (\w+) histogram", text)
    }
    board = json.loads((ROOT / "deploy/grafana/jacserve.json").read_text())
    expressions = [each["expr"] for p in board["panels"] for each in p["targets"]]
    variables = [str(each.get("query")) for each in board["templating"]["list"]]
    asked = names_in(" ".join(expressions + variables))
    assert asked <= there
    # All of ours are shown.
    ours = set(re.findall(r"# TYPE (jacserve_\w+)", text))
    assert {n for n in ours if not any(a.startswith(n) for a in asked)} == set()
    alerts = (ROOT / "deploy/prometheus/alerts.yml").read_text()
    assert names_in(alerts)
    assert names_in(alerts) <= there
