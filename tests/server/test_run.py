"""`jacserve run`: jobs without a server, as a user runs them."""

import os
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from interruptible import COMMAND
from jacserve_server.errors import ServiceError
from jacserve_server.statuses import status_of

FUNCTIONS = """
import jax, jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()
LIMIT = 0.5

@registry.function
def square(x: Float[Array, "2"], scale: Float[Array, ""]) -> Float[Array, "2"]:
    return scale * x**2

@registry.function
def slow(x: Float[Array, "2"]) -> Float[Array, "2"]:
    return jax.lax.fori_loop(0, 100_000, lambda i, y: jnp.sin(y), x)

def check(x):
    if (x > LIMIT).any():
        raise ValueError("a number is too large")
    return x

@registry.function
def picky(x: Float[Array, "2"]) -> Float[Array, "2"]:
    kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(check, kind, x, vmap_method="expand_dims")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    np.save(
        tmp_path / "points.npy", np.random.default_rng(0).random((5000, 2), np.float32)
    )
    np.save(tmp_path / "scale.npy", np.array(3.0, np.float32))
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "run", "functions.py", *arguments]
    return subprocess.Popen(
        [*command, "-o", "out.zarr"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    process = start(folder, *arguments)
    _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def read(folder: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_array(folder / "out.zarr", path=name, mode="r")[:])


def test_it_computes_all_points_of_a_file(folder: Path) -> None:
    asked = "square", "x=points.npy", "scale=scale.npy", "-q", "jacobian", "--wrt", "x"
    status, errors = run(folder, *asked)
    assert status == 0, errors
    assert "succeeded, 5,000 points" in errors
    points = np.load(folder / "points.npy")
    expected = np.zeros((5000, 2, 2))
    expected[:, [0, 1], [0, 1]] = 6 * points
    np.testing.assert_allclose(read(folder, "jacobian"), expected, rtol=1e-5)
    assert not (folder / "out.zarr.job").exists()
    status, errors = run(folder, *asked)
    assert (status, "is there already" in errors) == (2, True)


def test_inputs_may_be_links(folder: Path) -> None:
    (folder / "links").mkdir()
    (folder / "links" / "x.npy").symlink_to(folder / "points.npy")
    status, errors = run(folder, "square", "x=links/x.npy", "scale=scale.npy")
    assert status == 0, errors
    (folder / "points.npy").rename(folder / "0f3a")
    (folder / "points.npy").symlink_to("0f3a")
    shutil.rmtree(folder / "out.zarr")
    status, errors = run(folder, "square", "x=links/x.npy", "scale=scale.npy")
    assert (status, "links/x.npy is a link to 0f3a" in errors) == (2, True), errors


def test_products_with_a_vector(folder: Path) -> None:
    inputs = "x=points.npy", "scale=scale.npy", "--wrt", "x"
    vectors = "--tangent", "[1, 2]", "--cotangent", "[3, 4]", "--dtype", "float32"
    status, errors = run(folder, "square", *inputs, *vectors, "-q", "jvp", "-q", "vjp")
    assert status == 0, errors
    slope = 6 * np.load(folder / "points.npy")
    np.testing.assert_allclose(read(folder, "jvp"), slope * [1, 2], rtol=1e-5)
    np.testing.assert_allclose(read(folder, "vjp"), slope * [3, 4], rtol=1e-5)


def hold_up(folder: Path) -> None:
    """Leaves the job as one that is tried again in a few minutes."""
    error = ServiceError("STORAGE_UNAVAILABLE", "The disk is full.")
    status = status_of(error, "").SerializeToString()
    with closing(sqlite3.connect(folder / "out.zarr.job" / "jobs.sqlite")) as table:
        values = "state = 'queued', error = ?, retry_at = ?"
        table.execute(f"update jacserve_jobs set {values}", (status, time.time() + 300))
        table.commit()


@pytest.mark.slow
@pytest.mark.parametrize(
    "end", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_the_same_command_goes_on(folder: Path, end: signal.Signals) -> None:
    asked = "slow", "points.npy", "-q", "value", "--batch-size", "64"
    process = start(folder, *asked)
    status_file = folder / "out.zarr" / "status"
    while not list(status_file.glob("c.*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    if end == signal.SIGINT:
        assert process.returncode == 130
        assert "goes on from here" in errors
    before = {path: os.stat(path).st_mtime_ns for path in status_file.glob("c.*")}
    status, errors = run(folder, "slow", "points.npy", "-q", "jacobian")
    assert (status, "other options or other points" in errors) == (2, True)
    if end == signal.SIGINT:
        hold_up(folder)
    status, errors = run(folder, *asked)
    assert status == 0, errors
    kept = [path for path, at in before.items() if os.stat(path).st_mtime_ns == at]
    # Those in hand may be computed again: of each thread one, and one that is written.
    assert len(kept) >= len(before) - 5
    assert (read(folder, "status") == 1).all()


@pytest.mark.slow
def test_a_function_that_is_mended_starts_over(folder: Path) -> None:
    status, errors = run(folder, "picky", "points.npy", "-q", "value")
    assert (status, "a number is too large" in errors) == (1, True), errors
    mended = FUNCTIONS.replace("LIMIT = 0.5", "LIMIT = 2")
    (folder / "functions.py").write_text(mended)
    status, errors = run(folder, "picky", "points.npy", "-q", "value")
    assert status == 0, errors


def test_what_replaces_the_results_of_a_failed_run_stays(folder: Path) -> None:
    asked = "picky", "points.npy", "-q", "value"
    status, errors = run(folder, *asked)
    assert (status, "a number is too large" in errors) == (1, True), errors
    shutil.rmtree(folder / "out.zarr", ignore_errors=True)
    zarr.create_array(folder / "out.zarr", data=np.arange(3.0))
    status, errors = run(folder, *asked)
    assert (status, "is there already" in errors) == (2, True), errors
    array: Any = zarr.open_array(folder / "out.zarr", mode="r")
    np.testing.assert_array_equal(array[:], np.arange(3.0))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("square", "nowhere.npy"), "nowhere.npy is not there"),
        (("square", "points.npy"), "scale was not given"),
        (("squre", "points.npy"), "Did you mean square?"),
        (("square", "x=points.npy", "x=points.npy"), "given twice"),
        (("square", "x=points.npy", "scale.npy"), "by name, or none"),
    ],
)
def test_bad_input(folder: Path, arguments: tuple[str, ...], text: str) -> None:
    status, errors = run(folder, *arguments)
    assert (status, text in errors) == (2, True), errors
    assert "Traceback" not in errors
