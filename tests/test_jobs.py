"""Jobs say what Evaluate says, however they are asked, read, stored and disturbed."""

import itertools
import random
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from jaxtyping import Array, Float, Int, Num

import jacserve
import zoo
from jacserve import Source, trees
from jacserve.results import Result
from jacserve.sparse import SparseMatrix
from jacserve.vocabulary import LAYOUTS, QUANTITIES
from jacserve_server import Registry, serving
from job_calls import FAILED, JobCalls, reason_of, upload
from job_servers import JobHome

NAMES = ["/", "..", "", "a.b", "ü☃", "zarr.json", "c", ".", "%", "data", "a/b", "%2F"]
SQUARE = ("value", "jacobian", "determinant", "slogdet", "singular_values")
registry = Registry()
GATE = threading.Event()


@registry.function
def odd(x: Float[Array, "3"]) -> dict:
    return {name: (place + 1) * jnp.sin(x) for place, name in enumerate(NAMES)}


@registry.function
def deep(x: Float[Array, "3"], i: Int[Array, ""]) -> dict:
    return {"/": {"..": (x, {"": x.sum()})}, "i": [jnp.arange(3) + i, (x > 0,)]}


@registry.function
def nothing(x: Float[Array, "n"], s: Float[Array, ""]) -> Float[Array, "n 0"]:
    return jnp.zeros((x.size, 0), x.dtype) * s


@registry.function(max_batch=5)
def few(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.sin(x) * x.sum()


@registry.function(batchable=False)
def alone(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.sin(x) * x.sum()


@registry.function
def cubed(x: Num[Array, "3"]) -> Num[Array, "3"]:
    return x * x * x


@registry.function
def square(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.stack([x[0] * jnp.sin(x[1]), x[1] * x[2] + x[0], jnp.exp(x[2])])


@registry.function
def scalar(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(x**4) + x[0] * x[1]


@registry.function
def chain(u: Float[Array, "n"], k: Float[Array, ""]) -> Float[Array, "n"]:
    return k * u * jnp.roll(u, 1)


def hold(x: np.ndarray) -> np.ndarray:
    if (x < 0).any():
        GATE.wait(60)
    # The first rows take the longest.
    time.sleep(0.3 if x.min() < 8 else 0.02)
    return np.zeros_like(x)


@registry.function
def held(x: Float[Array, "2"]) -> Float[Array, "2"]:
    zero = jax.pure_callback(hold, x[0], x[0], vmap_method="broadcast_all")
    return jnp.sqrt(x[1]) + x + zero


@registry.function
def wide(x: Float[Array, ""]) -> Float[Array, "4096"]:
    return x + jnp.arange(4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    for name in ("data", "out"):
        (made / name).mkdir()
    return made


@pytest.fixture(scope="module")
def target(folder: Path) -> Generator[str]:
    with serving(
        registry,
        zoo.registry,
        jobs_dir=folder / "jobs",
        storage_roots={"data": str(folder / "data")},
        result_roots={"out": str(folder / "out")},
        device_threads=4,
    ) as server:
        yield server.target


@pytest.fixture(scope="module")
def client(target: str) -> Generator[jacserve.Client]:
    with jacserve.Client(target, timeout_s=120.0) as connected:
        yield connected


def numbers(*shape: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).uniform(0.3, 1.5, size=shape)
    if dtype.startswith("complex"):
        made = made * (1.0 + 0.3j)
    return made.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def flat(result: Result) -> dict[Any, np.ndarray]:
    """Every array that has a row for each point, by where it stands."""
    assert result.finite_points is not None
    found: dict[Any, np.ndarray] = {"finite": result.finite_points}
    for quantity, tree in result.quantities.items():
        for path, array in trees.flatten(tree):
            is_sparse = isinstance(array, SparseMatrix)
            found[quantity, path] = np.asarray(array.data if is_sparse else array)
    return found


def check_same(
    one: dict[Any, np.ndarray],
    other: dict[Any, np.ndarray],
    *,
    tolerance: float | None = None,
) -> None:
    """By default bit for bit."""
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert (array.shape, array.dtype) == (other[key].shape, other[key].dtype), key
        if tolerance is None:
            assert array.tobytes() == other[key].tobytes(), key
        else:
            wide = np.result_type(np.complex64, array.dtype)
            np.testing.assert_allclose(
                array.astype(wide), other[key].astype(wide), tolerance, tolerance
            )


def check_job(
    client: jacserve.Client,
    function: str,
    inputs: Any,
    quantities: Any = ("value", "jacobian"),
    *,
    batch_size: int | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> jacserve.Job:
    """Checks a job against Evaluate, and returns it."""
    expected = client.evaluate(function, inputs, quantities=quantities, **options)
    job = client.submit_job(
        function, inputs, quantities=quantities, batch_size=batch_size, **options
    )
    found = job.result(120)
    assert found.finite_points is not None
    assert found.finite_points.all()
    assert dict(found.modes) == dict(expected.modes)
    known = flat(found)
    del known["finite"]
    theirs: dict[Any, np.ndarray] = {}
    for quantity, tree in expected.quantities.items():
        for path, array in trees.flatten(tree):
            if isinstance(array, SparseMatrix):
                mine = found.quantities[quantity]
                np.testing.assert_array_equal(mine.pattern.rows, array.pattern.rows)
                array = array.data
            theirs[quantity, path] = np.asarray(array)
    check_same(known, theirs, tolerance=tolerance)
    return job


CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("odd", numbers(16, 3), {"layout": "blocks"}),
    ("deep", (numbers(16, 3), np.int32(4)), {"quantities": "value"}),
    ("nothing", (numbers(16, 2), 1.5), {}),
    ("square", numbers(16, 3), {"quantities": SQUARE}),
    ("cubed", numbers(16, 3, dtype="bfloat16"), {}),
    ("cubed", numbers(16, 3, dtype="complex64"), {"quantities": "jacobian"}),
    ("cubed", numbers(16, 3, dtype="float16"), {"quantities": "value"}),
    (
        "chain",
        (numbers(16, 4), 2.0),
        {"quantities": ("jvp", "vjp"), "tangents": numbers(5)}
        | {"cotangents": numbers(16, 2, 4)},
    ),
    ("chain", (numbers(16, 6), numbers(16)), {"layout": "csr", "mode": "sparse"}),
    ("chain", (numbers(16, 6), numbers(16)), {"layout": "coo", "wrt": "u"}),
    ("alone", numbers(16, 3), {}),
]


@pytest.mark.parametrize(("function", "inputs", "options"), CASES)
def test_a_job_is_what_evaluate_returns(client, function, inputs, options) -> None:
    check_job(client, function, inputs, batch_size=16, **options)


@pytest.mark.parametrize("function", ["square", "few"])
@pytest.mark.parametrize(("count", "batch_size"), [(1, None), (31, 7), (13, 64)])
def test_any_number_of_points(client, function: str, count: int, batch_size) -> None:
    points = numbers(count, 3)
    job = client.submit_job(function, points, batch_size=batch_size)
    found = job.result(120)
    for start in range(0, count, 5):
        part = client.evaluate(function, points[start : start + 5])
        np.testing.assert_allclose(found.jacobian[start : start + 5], part.jacobian)
    most = count if function == "square" else min(count, 5)
    assert job.info().batch_size == min(batch_size or most, most)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("function", ["square", "scalar"])
def test_every_quantity_in_every_layout(client, function, quantity, layout) -> None:
    options: dict[str, Any] = {"layout": layout}
    if quantity in {"jvp", "hvp"}:
        options["tangents"] = numbers(37, 3, seed=1)
    if quantity == "vjp":
        is_bare = function == "scalar" and layout == "blocks"
        one = () if is_bare else (3,) if function == "square" else (1,)
        options["cotangents"] = numbers(37, *one, seed=2)
    points = numbers(37, 3)
    try:
        client.evaluate(function, points, quantities=quantity, **options)
    except jacserve.InvalidRequestError as error:
        with pytest.raises(jacserve.InvalidRequestError) as caught:
            client.submit_job(function, points, quantities=quantity, **options).result(
                60
            )
        assert caught.value.reason == error.reason  # noqa: PT017
    else:
        check_job(client, function, points, quantity, batch_size=37, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("animal", "dtype"),
    [(animal, dtype) for animal in zoo.ZOO for dtype in animal.dtypes],
    ids=lambda each: getattr(each, "name", each),
)
def test_the_zoo(client, animal: zoo.Animal, dtype: str) -> None:
    samples = [animal.sample(np.random.default_rng(n)) for n in range(13)]
    inputs = tuple(np.stack(column) for column in zip(*samples, strict=True))
    inputs = tuple(x.astype(dtype) if x.dtype.kind in "fc" else x for x in inputs)
    check_job(client, animal.name, inputs, batch_size=13)


def test_integers_are_cast(client) -> None:
    points = (np.arange(52).reshape(13, 4), np.arange(13, dtype=np.int8))
    check_job(client, "chain", points, cast=True, tolerance=1e-14)


def folder_of(folder: Path, job: jacserve.Job) -> Path:
    return folder / "jobs" / "results" / job.info().output.partition("/")[2]


def store_of(folder: Path, job: jacserve.Job) -> Any:
    return zarr.open_group(folder_of(folder, job), mode="r")


@pytest.mark.parametrize("function", ["odd", "cubed", "chain"])
def test_every_way_to_read_says_the_same(client, folder: Path, function: str) -> None:
    inputs = {
        "odd": numbers(37, 3),
        "cubed": numbers(37, 3, dtype="bfloat16"),
        "chain": (numbers(37, 6), 2.0),
    }[function]
    options: Any = {"layout": "coo", "mode": "sparse"} if function == "chain" else {}
    job = client.submit_job(
        function, inputs, quantities=("jacobian", "value"), batch_size=4, **options
    )
    whole = flat(job.result(120))

    def check(start: int, stop: int, result: Result) -> None:
        rows = {key: array[start:stop] for key, array in whole.items()}
        check_same(flat(result), rows)

    chunks = list(job)
    assert [each.start for each in chunks] == [0, *(each.stop for each in chunks[:-1])]
    assert chunks[-1].stop == 37
    for each in chunks:
        check(each.start, each.stop, each.result)
    seed = random.Random(function)
    for _ in range(10):
        start = seed.randrange(37)
        count = seed.randint(1, 37 - start)
        check(start, start + count, job.read(start, count))
    store = store_of(folder, job)
    arrays = store.attrs["jacserve"]
    assert len(arrays["arrays"]) == len(whole) - 1
    for about in arrays["arrays"]:
        kept = np.asarray(store[about["name"]])
        expected = whole[about["quantity"], tuple(about["path"])]
        assert (kept.shape, kept.tobytes()) == (expected.shape, expected.tobytes())
    np.testing.assert_array_equal(store["status"], np.ones(37))


def test_the_store_of_a_job_that_runs(client, folder: Path) -> None:
    points = np.stack([np.arange(32.0), np.ones(32)], axis=1)
    points[20, 0], points[3, 1] = -1.0, -1.0
    job = client.submit_job("held", points, quantities="value", batch_size=8)
    next(iter(job))
    store = store_of(folder, job)
    status = store["status"]
    flags = [status.attrs["flag_values"], status.attrs["flag_meanings"]]
    assert flags == [[0, 1, 2], "pending finite non_finite"]
    np.testing.assert_array_equal(np.flatnonzero(status[:8] == 2), [3])
    np.testing.assert_array_equal(
        np.flatnonzero(status[:8] == 1), [0, 1, 2, *range(4, 8)]
    )
    assert not status[16:24].any()
    assert np.isnan(store["value"][16:24]).all()
    GATE.set()
    assert job.wait(60).progress.non_finite_count == 1
    assert status[:].all()


# --- What is not finite ---------------------------------------------------------------


def test_the_first_row_that_is_not_finite_fails_a_job(client) -> None:
    """Also where the chunks after it are computed before it."""
    points = np.stack([np.arange(64.0), np.ones(64)], axis=1)
    points[[7, 12, 20, 63], 1] = -1.0
    job = client.submit_job(
        "held", points, quantities="value", batch_size=8, on_error="fail"
    )
    info = job.wait(60)
    assert info.chunk_size == 8  # Else there would be nothing to race.
    assert "at point 7." in str(info.error)
    assert info.progress.first_non_finite == 7
    recorded = client.submit_job("held", points, quantities="value", batch_size=8)
    progress = recorded.wait(60).progress
    assert (progress.non_finite_count, progress.first_non_finite) == (4, 7)


def test_a_row_that_is_not_finite_is_not_forgotten(tmp_path: Path) -> None:
    """A server may be killed when the row is noted, and the failure is not."""
    home = JobHome(tmp_path)
    try:
        server = home.start()
        x = numbers(50, 2)
        x[12] = -1.0
        arrays = (x, np.arange(50))
        options: Any = {"require_finite": True}
        server.calls.send(
            iter(upload("a", "roots", arrays, "value", options=options, batch_size=10))
        )
        assert reason_of(server.calls.wait("a", FAILED)) == "RESULT_NOT_FINITE"
        server.kill()
        home.query(
            "update jacserve_jobs set state='running', ended_at=null, error=null"
        )
        again = home.start()
        assert reason_of(again.calls.wait("a", FAILED)) == "RESULT_NOT_FINITE"
    finally:
        home.close()


# --- Storage --------------------------------------------------------------------------


def test_points_of_any_storage(client, folder: Path) -> None:
    data, u, k = folder / "data", numbers(41, 4), numbers(41)
    np.save(data / "u.npy", u)
    np.savez_compressed(data / "all.npz", u=u, k=k)
    group = zarr.open_group(data / "all.zarr", mode="w")
    group.create_array("u", data=u, chunks=(7, 3))
    table = {f"u{n}": u[:, n] for n in range(4)} | {"k": k}
    pq.write_table(pa.table(table), data / "all.parquet", row_group_size=11)
    arrays: list[Any] = [
        Source("data/u.npy"),
        Source("data/all.npz", "u"),
        Source("data/all.zarr", "u"),
        Source("data/all.parquet", "u0,u1,u2,u3"),
        u,
    ]
    others: list[Any] = [
        Source("data/all.npz", "k"),
        Source("data/all.parquet", "k"),
        k,
    ]
    expected = flat(client.submit_job("chain", (u, k), batch_size=16).result(60))
    jobs = [
        client.submit_job("chain", pair, batch_size=16)
        for pair in itertools.product(arrays, others)
    ]
    for job in jobs:
        check_same(flat(job.result(60)), expected)


def test_an_output_is_a_new_store(client, folder: Path) -> None:
    out = folder / "out"
    job = client.submit_job("square", numbers(9, 3), output="out/a/new.zarr")
    job.wait(60)
    store: Any = zarr.open_group(out / "a" / "new.zarr", mode="r")
    np.testing.assert_array_equal(store["jacobian"], job.result().jacobian)
    (out / "file.zarr").write_text("mine")
    (out / "folder.zarr").mkdir()
    (out / "folder.zarr" / "notes.txt").write_text("mine")
    (out / "link.zarr").symlink_to(folder / "data", target_is_directory=True)
    for name, reason in {
        "a/new.zarr": "MALFORMED_REQUEST",
        "file.zarr": "MALFORMED_REQUEST",
        "folder.zarr": "MALFORMED_REQUEST",
        "link.zarr": "SOURCE_FORBIDDEN",
        "link.zarr/new.zarr": "SOURCE_FORBIDDEN",
        "../data/new.zarr": "SOURCE_FORBIDDEN",
        "new.npy": "MALFORMED_REQUEST",
    }.items():
        with pytest.raises(jacserve.JacobianError) as caught:
            client.submit_job("square", numbers(9, 3), output=f"out/{name}")
        assert (caught.value.reason, caught.value.field) == (reason, "output")
    assert (out / "folder.zarr" / "notes.txt").read_text() == "mine"
    job.delete()
    assert store["status"][:].all()


def test_two_jobs_never_write_to_one_store(client) -> None:
    points = [numbers(100, 3, seed=n) for n in range(2)]
    for turn in range(5):
        output = f"out/both-{turn}.zarr"
        jobs: list[jacserve.Job | None] = []
        for each in points:
            try:
                jobs.append(client.submit_job("square", each, output=output))
            except jacserve.InvalidRequestError:
                jobs.append(None)  # The other one was as fast as that.
        infos = [job.wait(60) for job in jobs if job is not None]
        assert [info.state for info in infos].count("succeeded") == 1
        for job, each in zip(jobs, points, strict=True):
            if job is not None and job.info().state == "succeeded":
                expected = client.evaluate("square", each, quantities="value")
                np.testing.assert_allclose(job.read().value, expected.value)
            elif job is not None:
                error = job.info().error
                assert error is not None
                assert error.field == "output"


def test_what_appears_at_an_output_stays(client, folder: Path) -> None:
    """Even where a job waits for its turn to make a store there."""
    running = [
        client.submit_job("held", np.zeros((64, 2)), batch_size=1) for _ in range(8)
    ]
    job = client.submit_job("square", numbers(9, 3), output="out/late.zarr")
    mine = folder / "out" / "late.zarr" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    for each in running:
        each.delete()
    assert job.wait(60).state == "failed"
    assert mine.read_text() == "mine"


def test_rows_that_are_gone_are_not_made_up(client, folder: Path) -> None:
    job = client.submit_job("square", numbers(64, 3), quantities="value")
    job.wait(60)
    [chunk] = (folder_of(folder, job) / "value").glob("c*")
    chunk.unlink()
    with pytest.raises(jacserve.PreconditionError, match="not there any more"):
        job.read()


# --- Disturbances ---------------------------------------------------------------------


def test_a_job_deleted_while_it_is_read(client, target: str) -> None:
    """A reader gets the numbers or is told, and never what fills empty chunks."""
    x = numbers(1000)
    expected = x[:, None] + np.arange(4096)
    for delay_s in (0.0, 0.01, 0.02, 0.04, 0.08):
        job = client.submit_job("wide", x, quantities="value", batch_size=16)
        job.wait(60)
        with ThreadPoolExecutor() as pool:
            reading = pool.submit(lambda job=job: job.read().value)
            time.sleep(delay_s)
            job.delete()
            with suppress(jacserve.NotFoundError):
                np.testing.assert_array_equal(reading.result(), expected)


def test_uploads_that_are_given_up_leave_nothing(client, target: str, folder: Path):
    parts = upload("", "chain", (numbers(50_000, 8), 1.0))
    seed = random.Random(0)
    with JobCalls(target) as calls:
        for _ in range(60):
            call = calls.sending(iter(parts))
            time.sleep(seed.uniform(0, 0.03))
            call.cancel()
    deadline = time.monotonic() + 20

    def staged() -> list[Path]:
        return [p for p in (folder / "jobs" / "uploads").iterdir() if "." in p.name]

    while staged():
        assert time.monotonic() < deadline, staged()
        time.sleep(0.05)


def test_a_batch_has_no_larger_results_than_the_server_allows(tmp_path: Path) -> None:
    with (
        serving(registry, jobs_dir=tmp_path, max_payload_bytes=2**20) as server,
        jacserve.Client(server.target, timeout_s=120.0) as client,
    ):
        # The value of `wide` takes 32 KiB, the Jacobian of `chain` 2 MiB.
        for batch_size in (100, None):
            job = client.submit_job(
                "wide", numbers(100), quantities="value", batch_size=batch_size
            )
            job.wait(60)
            info = job.info()
            assert info.state == "succeeded"
            assert info.batch_size is not None
            assert info.batch_size <= 32
        u, k = numbers(4, 512), numbers(4)
        job = client.submit_job("chain", (u, k), batch_size=4)
        with pytest.raises(jacserve.JacobianError) as raised:
            job.result(60)
        assert raised.value.reason == "RESULT_TOO_LARGE"
