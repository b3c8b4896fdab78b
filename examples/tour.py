"""A tour of jacserve: starts a server of functions.py, and asks it six things.

Run it with `make demo`, or `python examples/tour.py` where jacserve[server,cli] is
installed. It stops by itself.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console

import jacserve

T = TypeVar("T")
FUNCTIONS = Path(__file__).with_name("functions.py")
console = Console(highlight=False)


@contextmanager
def running_server() -> Iterator[str]:
    """Starts a server process on a free loopback port; yields its address."""
    command = [sys.executable, "-m", "jacserve", "serve", str(FUNCTIONS), "--port", "0"]
    # What becomes of jobs goes with the tour.
    folder = tempfile.TemporaryDirectory(prefix="jacserve-tour-")
    environment = {**os.environ, "JACSERVE_JOBS_DIR": f"{folder.name}/jobs"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        ready = next((line for line in lines if line.startswith("Listening on ")), None)
        if ready is None:
            raise SystemExit("The server did not start.")
        yield ready.split()[2]
    finally:
        process.terminate()
        process.wait()
        folder.cleanup()


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Returns what a call returns, and the milliseconds that it took."""
    start = time.perf_counter()
    answer = call()
    return answer, (time.perf_counter() - start) * 1e3


def title(text: str) -> None:
    """Prints the heading of a stop of the tour."""
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


def show(name: str, array: npt.ArrayLike) -> None:
    """Prints an array under its name."""
    text = np.array2string(np.asarray(array), precision=4, suppress_small=True)
    indented = text.replace("\n", "\n" + " " * (len(name) + 5))
    console.print(f"  {name} = {indented}", markup=False)


def facts(result: jacserve.Result, took_ms: float) -> None:
    """Prints how a result came about."""
    compile_ms = result.timing.compile_s * 1e3
    execute_ms = result.timing.execute_s * 1e3
    print(
        f"  mode {result.mode} on {result.device}; {took_ms:.1f} ms, of which "
        f"compiling {compile_ms:.1f}, executing {execute_ms:.2f}"
    )


def spherical_coordinates(client: jacserve.Client) -> None:
    """J of a change of coordinates, and its determinant against r^2 sin(polar)."""
    title("1. Spherical coordinates: a 3 x 3 Jacobian and its determinant")
    x = np.array([2.0, 0.5, 1.0])
    quantities = ("jacobian", "determinant")

    def ask() -> jacserve.Result:
        return client.evaluate("spherical", x, quantities=quantities)

    result, first_ms = timed(ask)
    again, again_ms = timed(ask)
    show("J", result.jacobian)
    print(f"  det J            = {result.determinant:.12f}")
    print(f"  r^2 sin(polar)   = {x[0] ** 2 * np.sin(x[1]):.12f}")
    facts(result, first_ms)
    print("  and again, now that it is compiled:")
    facts(again, again_ms)


def scalar_function(client: jacserve.Client) -> None:
    """A scalar function has a 1 x n row."""
    title("2. Rosenbrock: a scalar function has a 1 x n row")
    x = np.array([-1.2, 1.0, 0.5, 2.0])
    result, took_ms = timed(lambda: client.evaluate("rosenbrock", x))
    show("f(x)", result.value)
    show("J", result.jacobian)
    print(f"  shape {result.jacobian.shape}")
    facts(result, took_ms)


def batch_of_points(client: jacserve.Client) -> None:
    """One call for a thousand points, and for many more."""
    title("3. A batch: 1,000 points in one call")
    low, high = [0.5, 0.1, -3.0], [2.0, 3.0, 3.0]
    points = np.random.default_rng(0).uniform(low, high, size=(1000, 3))
    client.evaluate("spherical", points)  # Compiles.
    result, batch_ms = timed(lambda: client.evaluate("spherical", points))
    _, singles_ms = timed(
        lambda: [client.evaluate("spherical", point) for point in points[:100]]
    )
    with client.session() as session:
        session.evaluate("spherical", points[0])  # Opens the stream.
        _, session_ms = timed(
            lambda: [session.evaluate("spherical", point) for point in points[:100]]
        )
    print(f"  points {points.shape} -> Jacobians {result.jacobian.shape}")
    facts(result, batch_ms)
    print(
        f"  {batch_ms:.1f} us a point; called one by one {singles_ms * 10:.0f} us, and "
        f"in a session {session_ms * 10:.0f} us"
    )
    many = np.tile(points, (250, 1))
    client.jacobian("spherical", many)  # Compiles.
    jacobians, many_ms = timed(lambda: client.jacobian("spherical", many))
    size_mib = jacobians.nbytes / 2**20
    print(f"  points {many.shape}: {size_mib:.0f} MiB streamed in {many_ms:.0f} ms")


def digit_classifier(client: jacserve.Client) -> None:
    """The sensitivity of probabilities to pixels; the weights are a shared input."""
    title("4. A digit classifier: 10 probabilities by 784 pixels")
    random = np.random.default_rng(7)
    pixels = random.uniform(size=784).astype(np.float32)
    weights = random.normal(scale=0.05, size=(10, 785)).astype(np.float32)
    inputs = {"pixels": pixels, "weights": weights}
    result, took_ms = timed(lambda: client.evaluate("classifier", inputs, wrt="pixels"))
    show("p", result.value)
    show("J[:, :6]", result.jacobian[:, :6])
    print(f"  shape {result.jacobian.shape} {result.jacobian.dtype}")
    facts(result, took_ms)
    largest = np.abs(result.jacobian).sum(axis=0).argmax()
    print(f"  the most telling pixel is row {largest // 28}, column {largest % 28}")
    total = np.abs(result.jacobian.sum(axis=0)).max()
    print(f"  probabilities sum to 1, so columns of J sum to 0: at most {total:.0e}")


def newton(client: jacserve.Client) -> None:
    """Newton's method on two simultaneous equations, driven from here."""
    title("5. Newton's method: u^2 + v^2 = 4 and v = u^2 - 1")
    x = np.array([1.0, 1.0])
    for step in range(20):
        start = time.perf_counter()
        f, jac = client.value_and_jacobian("circle_and_parabola", x)
        took_ms = (time.perf_counter() - start) * 1e3
        print(
            f"  step {step}: x = ({x[0]:.12f}, {x[1]:.12f}), |f| = {abs(f).max():.1e}, "
            f"{took_ms:.1f} ms"
        )
        if abs(f).max() < 1e-14:
            break
        x = x - np.linalg.solve(jac, f)
    v = (np.sqrt(13.0) - 1.0) / 2.0
    print(f"  exact:  x = ({np.sqrt(v + 1.0):.12f}, {v:.12f})")


def batch_job(client: jacserve.Client) -> None:
    """A job goes on without its client, and keeps what it has computed."""
    title("6. A job: log-determinants at a million points, kept chunk by chunk")
    low, high = [0.5, 0.1, -3.0], [2.0, 3.0, 3.0]
    points = np.random.default_rng(1).uniform(low, high, size=(1_000_000, 3))
    job = client.submit_job("spherical", points, quantities="slogdet", id="tour")
    print(f"  submitted as {job.id}; anybody may come back for it by this id")
    ended, took_ms = timed(job.wait)
    progress = ended.progress
    print(
        f"  {ended.state}: {progress.done_count:,} points in {took_ms / 1e3:.1f} s, "
        f"batches of {ended.batch_size:,}, {progress.non_finite_count} not finite"
    )
    _, log = job.read(start=0, count=1000).slogdet
    expected = np.log(points[:1000, 0] ** 2 * np.sin(points[:1000, 1]))
    print(
        "  log |det J| is off log(r^2 sin(polar)) by at most "
        f"{abs(log - expected).max():.0e}"
    )


def main() -> None:
    """Starts a server, makes the tour and stops the server."""
    start = time.perf_counter()
    print("Starting a server ...")
    with running_server() as target, jacserve.Client(target) as client:
        print(f"It listens on {target} and has:")
        for function in client.functions():
            print(f"  {function.signature}")
        spherical_coordinates(client)
        scalar_function(client)
        batch_of_points(client)
        digit_classifier(client)
        newton(client)
        batch_job(client)
    elapsed = time.perf_counter() - start
    print(f"\nThe server has stopped. The tour took {elapsed:.0f} s.")


if __name__ == "__main__":
    main()
