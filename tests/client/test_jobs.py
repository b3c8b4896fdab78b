"""Jobs, by both clients, over the wire."""

import asyncio
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Generator
from concurrent import futures
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve.channels import CREATE_JOB
from jacserve.v1 import jobs_pb2
from jacserve_server import Registry, serving
from server_process import server_process

registry = Registry()
# By what stands in a point: whoever computes it waits for this.
GATES = {-1.0: threading.Event(), -2.0: threading.Event(), -3.0: threading.Event()}
ROW = 2**16  # float64 numbers, half a MiB, so that a chunk has few points.
CHUNK = 16


def hold(x: np.ndarray) -> np.ndarray:
    for number, gate in GATES.items():
        if (np.asarray(x) == number).any():
            gate.wait(60)
    return np.zeros_like(x)


@registry.function
def wide(x: Float[Array, ""]) -> Float[Array, "65536"]:
    zero = jax.pure_callback(hold, x, x, vmap_method="broadcast_all")
    return (x + zero) * jnp.ones(ROW)


@registry.function
def nested(x: Float[Array, "3"], a: Float[Array, ""]) -> dict:
    return {"z": a * jnp.sin(x), "k": (1.0 / x[0],)}


@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x**2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def target(folder: Path) -> Generator[str]:
    with serving(
        registry, jobs_dir=folder / "jobs", storage_roots={"data": str(folder)}
    ) as server:
        yield server.target


@pytest.fixture(scope="module")
def client(target: str) -> Generator[jacserve.Client]:
    with jacserve.Client(target, timeout_s=60.0) as connected:
        yield connected


POINTS = np.random.default_rng(0).uniform(0.5, 2.0, size=(1000, 3))


def held_points(number: float, at: int, count: int = 4 * CHUNK) -> np.ndarray:
    points = np.arange(1.0, count + 1)
    points[at] = number
    return points


def submit_wide(client: jacserve.Client, points: np.ndarray, **options) -> jacserve.Job:
    return client.submit_job(
        "wide", points, quantities="value", batch_size=8, **options
    )


# --- Following ------------------------------------------------------------------------


def test_chunks_come_in_order_while_the_job_runs(client) -> None:
    points = held_points(-1.0, at=40)
    job = submit_wide(client, points)
    chunks = iter(job)
    first = [next(chunks), next(chunks)]
    assert [(chunk.start, chunk.stop) for chunk in first] == [(0, 16), (16, 32)]
    assert not job.done()
    info = job.info()
    assert (info.state, info.batch_size, info.chunk_size) == ("running", 8, CHUNK)
    assert 32 <= info.progress.ready_count <= info.progress.done_count < 64
    with pytest.raises(jacserve.PreconditionError) as caught:
        job.read(32, 16)
    assert caught.value.reason == "JOB_NOT_FINISHED"
    np.testing.assert_array_equal(job.read(3, 2).value[:, 0], points[3:5])
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not ended within 0\.2 s.* of 64 points"):
        job.result(0.2)
    assert time.monotonic() - begun < 5
    GATES[-1.0].set()
    rest = list(chunks)
    found = np.concatenate([chunk.result.value for chunk in [*first, *rest]])
    np.testing.assert_array_equal(found, points[:, None] * np.ones(ROW))
    assert [chunk.start for chunk in rest] == [32, 48]
    assert [chunk.start for chunk in job.chunks(50)] == [50]
    np.testing.assert_array_equal(job.result().value, found)
    assert job.done()
    assert job.progress().fraction == 1.0
    assert job.info().ended is not None


def test_news_ends_with_the_job(client) -> None:
    job = client.submit_job("square", POINTS, quantities="value")
    seen = list(job.watch())
    assert seen[-1].state == "succeeded"
    assert seen[-1].progress.done_count == 1000
    assert all(not info.has_ended for info in seen[:-1])
    assert [info.state for info in job.watch()] == ["succeeded"]
    assert job.wait(timeout_s=0.0).state == "succeeded"
    assert repr(job) == f"<Job {job.id} square@1 succeeded 100%>"


def test_a_cancelled_job(client, tmp_path: Path) -> None:
    points = held_points(-2.0, at=40)
    job = submit_wide(client, points)
    next(iter(job))
    job.cancel()
    GATES[-2.0].set()
    assert job.wait(30).state == "cancelled"
    with pytest.raises(jacserve.CancelledError, match="of 64 points are computed"):
        job.result()
    with pytest.raises(jacserve.CancelledError):
        job.save(tmp_path / "a.npy")
    job.save(tmp_path / "a.npy", count=10)
    saved = np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(saved[:, 0], points[:10])
    chunks = []
    with pytest.raises(jacserve.CancelledError):
        chunks.extend(job)  # What is computed comes first.
    job.delete()
    with pytest.raises(jacserve.NotFoundError, match=job.id):
        job.info()
    with pytest.raises(LookupError):
        client.job(job.id)


def test_what_a_job_fails_with(client) -> None:
    points = POINTS.copy()
    points[700, 0] = 0.0
    inputs = {"x": points, "a": 1.0}
    job = client.submit_job("nested", inputs, on_error="fail")
    with pytest.raises(ArithmeticError, match="point 700"):
        job.result()
    with pytest.raises(jacserve.NonFiniteError):
        list(job)
    info = job.info()
    assert info.state == "failed"
    assert isinstance(info.error, jacserve.NonFiniteError)
    assert job.id in {each.id for each in client.jobs("failed")}
    assert job.id not in {each.id for each in client.jobs(["succeeded", "queued"])}
    recorded = client.submit_job("nested", inputs)
    result = recorded.result()
    np.testing.assert_array_equal(np.flatnonzero(~result.finite_points), [700])
    assert not result.finite
    progress = recorded.progress()
    assert (progress.non_finite_count, progress.first_non_finite) == (1, 700)


# --- Submitting -----------------------------------------------------------------------


def test_points_may_be_anywhere(client, folder: Path) -> None:
    np.save(folder / "x.npy", POINTS)
    np.savez(folder / "all.npz", v=POINTS[:, ::-1])
    np.savez_compressed(folder / "named.npz", x=POINTS)
    truth = np.concatenate(
        [client.value("square", part) for part in np.split(POINTS, 4)]
    )
    for inputs in (
        POINTS, (np.asfortranarray(POINTS),), {"x": POINTS.astype(">f8")},
        {"x": folder / "x.npy"}, folder / "named.npz", jacserve.Source("data/x.npy"),
    ):  # fmt: skip
        job = client.submit_job("square", inputs, quantities="value")
        np.testing.assert_array_equal(job.result().value, truth)
    job = client.submit_job(
        "square",
        folder / "x.npy",
        quantities="jvp",
        tangents=jacserve.Source("data/all.npz", "v"),
    )
    np.testing.assert_allclose(job.result().jvp, 2 * POINTS * POINTS[:, ::-1])
    with pytest.raises(ValueError, match="'dat'"):
        client.submit_job("square", jacserve.Source("dat/x.npy"))


def test_submitted_twice_it_is_there_once(client) -> None:
    jobs = [client.submit_job("square", POINTS, id="twice") for _ in range(2)]
    assert [job.id for job in jobs] == ["twice", "twice"]
    assert [job.id for job in client.jobs()].count("twice") == 1
    with pytest.raises(jacserve.PreconditionError) as caught:
        client.submit_job("square", POINTS[:-1], id="twice")
    assert caught.value.reason == "JOB_ALREADY_EXISTS"
    assert client.job("jobs/twice").result().value.shape == (1000, 3)


def test_a_job_whose_answer_is_lost_is_submitted_again() -> None:
    """The second time with the very same bytes, of which the id is a part."""
    seen: list[list[bytes]] = []

    def create(requests, context: grpc.ServicerContext) -> jobs_pb2.Job:
        seen.append(list(requests))
        if len(seen) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "going")
        head = jobs_pb2.CreateJobRequest.FromString(seen[-1][0]).head
        return jobs_pb2.Job(
            name=f"jobs/{head.job_id}",
            query=head.query,
            state=jobs_pb2.JOB_STATE_QUEUED,
        )

    service, _, method = CREATE_JOB.strip("/").partition("/")
    handler = grpc.stream_unary_rpc_method_handler(
        create, None, jobs_pb2.Job.SerializeToString
    )
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {method: handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with jacserve.Client(f"127.0.0.1:{port}") as client:
            job = client.submit_job("square", np.ones((100_000, 3)))
    finally:
        server.stop(None).wait()
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 4  # A head, and 2.3 MiB.
    assert job.id


# --- Files ----------------------------------------------------------------------------


def test_files_hold_what_the_job_has_computed(client, tmp_path: Path) -> None:
    job = client.submit_job("nested", {"x": POINTS, "a": 2.0})
    result = job.result()
    truths = {
        "value['z']": result.value["z"],
        "value['k'][0]": result.value["k"][0],
        "jacobian": result.jacobian,
        "finite_points": result.finite_points,
    }
    written: list[tuple[int, int]] = []
    job.save(tmp_path / "a.npz", on_progress=lambda *counts: written.append(counts))
    with np.load(tmp_path / "a.npz") as saved:
        assert set(saved) == set(truths)
        for label, truth in truths.items():
            np.testing.assert_array_equal(saved[label], truth)
    assert written[-1] == (1000, 1000)
    job.save(str(tmp_path / "a.npy"), "jacobian")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), result.jacobian)
    job.save(tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert set(table.column_names) == set(truths)
    for label, truth in truths.items():
        np.testing.assert_array_equal(np.array(table[label].to_pylist()), truth)
    with pytest.raises(ValueError, match="holds one array"):
        job.save(tmp_path / "b.npy")


def test_a_file_of_many_ranges(client, tmp_path: Path) -> None:
    points = held_points(7.0, at=0)
    job = submit_wide(client, points)
    written: list[int] = []
    job.save(tmp_path / "a.npy", on_progress=lambda done, _: written.append(done))
    assert written == [16, 32, 48, 64]
    saved = np.load(tmp_path / "a.npy", mmap_mode="r")
    np.testing.assert_array_equal(saved, points[:, None] * np.ones(ROW))


@pytest.mark.parametrize("layout", ["csr", "coo"])
@pytest.mark.parametrize("mode", ["sparse", "forward"])
def test_sparse_matrices(client, tmp_path: Path, layout, mode) -> None:
    points = np.tile(POINTS, 3)[:, :8]
    points[0] = 0.0  # So that its numbers alone would give another pattern.
    job = client.submit_job(
        "square", points, quantities="jacobian", layout=layout, mode=mode
    )
    dense = 2 * points[:, :, None] * np.eye(8)
    result = job.result()
    assert result.sparse_layout == layout
    np.testing.assert_allclose(result.jacobian.todense(), dense)
    job.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as saved:
        if mode == "sparse":
            assert saved["jacobian.shape"].tolist() == [1000, 8, 8]
            matrix = np.zeros_like(dense)
            matrix[:, saved["jacobian.rows"], saved["jacobian.columns"]] = saved[
                "jacobian.data"
            ]
        else:
            matrix = saved["jacobian"]
        np.testing.assert_allclose(matrix, dense)


FUNCTIONS = """
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def double(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return 2.0 * x
"""


@contextmanager
def most_memory() -> Generator[list[int]]:
    """Yields a list that has, after the block, by how many MiB this process grew.

    Pages of mapped files don't count: they are the system's to take.
    """

    def size() -> int:
        status = Path("/proc/self/status").read_text()
        match = re.search(r"RssAnon:\s+(\d+)", status)
        assert match is not None
        return int(match[1]) // 1024

    before, grown, stop = size(), [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            grown[0] = max(grown[0], size() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield grown
    finally:
        stop.set()
        thread.join()


def pass_through(client: jacserve.Client, points: np.ndarray, folder: Path) -> None:
    """Sends points as a file, and takes the results back in every way."""
    np.save(folder / "x.npy", points)
    job = client.submit_job("double", folder / "x.npy", quantities="value")
    job.save(folder / "y.npy")
    job.save(folder / "y.npz")
    for chunk in job:
        assert len(chunk.result.value) == chunk.stop - chunk.start


@pytest.mark.slow
def test_more_points_and_results_take_no_more_memory(tmp_path: Path) -> None:
    """144 MiB each way after 36 MiB each way, beside a server in another process."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    points = np.random.default_rng(0).normal(size=(3 * 2**21, 3))
    environment = {"JACSERVE_JOBS_DIR": str(tmp_path / "jobs")}
    with server_process(tmp_path / "functions.py", **environment) as server:
        with jacserve.Client(server.target) as client:
            with most_memory() as grown:
                pass_through(client, points[: len(points) // 4], tmp_path)
                of_few = grown[0]
                pass_through(client, points, tmp_path)

    assert grown[0] - of_few < 36
    saved = np.load(tmp_path / "y.npy", mmap_mode="r")
    np.testing.assert_array_equal(saved, 2.0 * points)


# --- A server that goes away ----------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_job_outlives_its_server(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "port": free_port(), "jobs_dir": tmp_path / "jobs", "grace_s": 0.2
    }  # fmt: skip
    points = held_points(-3.0, at=40)
    with jacserve.Client(f"127.0.0.1:{settings['port']}") as client:
        seen: list[str] = []
        with serving(registry, **settings):
            job = submit_wide(client, points, id="night-1")
            chunks = iter(job)
            found = [next(chunks).result.value, next(chunks).result.value]
            thread = threading.Thread(
                target=lambda: seen.extend(info.state for info in job.watch())
            )
            thread.start()
            deadline = time.monotonic() + 20
            while not seen and time.monotonic() < deadline:
                time.sleep(0.01)
            timer = threading.Timer(0.5, GATES[-3.0].set)
            timer.start()
        with pytest.raises(jacserve.UnavailableError):
            list(job.watch(patience_s=0.3))
        with serving(registry, **settings):
            found += [chunk.result.value for chunk in chunks]
            thread.join(60)
            assert client.job("night-1").done()
        with futures.ThreadPoolExecutor(1) as pool:
            whole = pool.submit(job.result)
            time.sleep(0.3)  # It meets no server.
            with serving(registry, **settings):
                np.testing.assert_array_equal(whole.result(60).value[:, 0], points)
    assert seen[-1] == "succeeded"
    np.testing.assert_array_equal(np.concatenate(found)[:, 0], points)


@contextmanager
def table_away(folder: Path) -> Generator[None]:
    """Has the server find no table for a while, as of a database that is away."""
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as database:
        database.execute("alter table jacserve_jobs rename to away")
        database.commit()
        yield
        database.execute("alter table away rename to jacserve_jobs")
        database.commit()


@contextmanager
def results_away(folder: Path) -> Generator[None]:
    (folder / "results").rename(folder / "away")
    yield
    (folder / "away").rename(folder / "results")


@pytest.mark.parametrize("away", [table_away, results_away])
def test_a_job_outlives_its_storage(client, folder: Path, away: Any) -> None:
    job = client.submit_job("square", POINTS, quantities="value")
    client.job(job.id).wait()  # So that the other has yet to ask how it is.
    with futures.ThreadPoolExecutor(1) as pool:
        with away(folder / "jobs"):
            found = pool.submit(job.result)
            assert not futures.wait([found], 0.5).done
        np.testing.assert_array_equal(found.result(60).value, POINTS**2)


@pytest.mark.parametrize("away", [table_away, results_away])
def test_an_asyncio_job_outlives_its_storage(
    target: str, folder: Path, away: Any
) -> None:
    async def ask() -> None:
        async with jacserve.AsyncClient(target, timeout_s=60.0) as client:
            job = await client.submit_job("square", POINTS, quantities="value")
            await (await client.job(job.id)).wait()
            with away(folder / "jobs"):
                found = asyncio.create_task(job.result())
                assert not (await asyncio.wait([found], timeout=0.5))[0]
            np.testing.assert_array_equal((await found).value, POINTS**2)

    asyncio.run(ask())


# --- The asyncio client ---------------------------------------------------------------


def test_the_async_client_has_the_same_jobs(target: str, tmp_path: Path) -> None:
    async def ask() -> None:
        async with jacserve.AsyncClient(target, timeout_s=60.0) as client:
            job = await client.submit_job("square", POINTS, quantities="value")
            assert repr(await client.job(job.id)).startswith(f"<AsyncJob {job.id} ")
            chunks = [chunk async for chunk in job]
            result = await job.result()
            np.testing.assert_array_equal(result.value, POINTS**2)
            np.testing.assert_array_equal(
                np.concatenate([chunk.result.value for chunk in chunks]), result.value
            )
            part = await job.read(5, 2)
            np.testing.assert_array_equal(part.value, POINTS[5:7] ** 2)
            await job.save(tmp_path / "a.npy")
            np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), result.value)
            assert [info.state async for info in job.watch()] == ["succeeded"]
            assert (await job.wait()).has_ended
            assert await job.done()
            assert (await job.progress()).fraction == 1.0
            assert job.id in {info.id for info in await client.jobs("succeeded")}
            assert (await job.cancel()).state == "succeeded"
            bad = await client.submit_job(
                "square", POINTS * np.nan, quantities="value", on_error="fail"
            )
            with pytest.raises(jacserve.NonFiniteError):
                await bad.result()
            await job.delete()
            with pytest.raises(jacserve.NotFoundError):
                await job.info()

    asyncio.run(ask())


def test_the_jobs_of_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(jacserve.Job) == public(jacserve.AsyncJob)
