"""Measured strategies: found, kept, used, and passed over where they do not fit."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve_server import Registry, serving
from jacserve_server.executor import find_device
from jacserve_server.measurements import Measurement, Measurements, Timing
from jacserve_server.programs import Limits
from jacserve_server.registration import build_catalog
from jacserve_server.tuning import keys_to_measure, measure
from jacserve_server.work import Computation, InputSpec, ProgramKey

registry = Registry()
KIND = find_device("cpu").device_kind


@registry.function
def wave(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sin(x) * jnp.roll(x, 1)


@registry.function
def sensors(x: Float[Array, "n"]) -> Float[Array, "2"]:
    return jnp.stack([jnp.sum(x**2), jnp.sum(jnp.sin(x))])


def measured(function: str, n: int, bucket: int | None, *ways: tuple) -> Measurement:
    timings = [Timing(mode, size, 1e-3 * k) for k, (mode, size) in enumerate(ways, 1)]
    return Measurement(
        function=function,
        device=KIND,
        inputs=(f"float64[{n}]",),
        wrt=("x",),
        bucket=bucket,
        timings=tuple(timings),
        rule_s=2e-3,
    )


def key(n: int, bucket: int | None) -> ProgramKey:
    inputs = (InputSpec((n,), "float64", is_batched=bucket is not None),)
    computation = Computation("wave@1", ("jacobian",), ("x",), "auto", "matrix", inputs)
    return ProgramKey(computation, bucket)


def test_every_way_is_timed_and_the_fastest_comes_first() -> None:
    catalog = build_catalog([registry])
    function = catalog.find("sensors")
    [each] = keys_to_measure(function.spec, {"n": 700}, ["float64"], [None])
    limits = Limits(result_bytes=2**30, program_bytes=2**30)
    found = measure(function, each, find_device("cpu"), limits)
    ways = {(timing.mode, timing.chunk_size) for timing in found.timings}
    assert ways >= {("forward", None), ("forward", 128), ("reverse", None)}
    assert ("reverse", 32) not in ways  # There are two products.
    assert found.timings[0].mode == "reverse"
    seconds = [timing.seconds for timing in found.timings]
    assert seconds[0] <= 1.05 * min(seconds)
    assert found.inputs == ("float64[700]",)
    assert found.speedup >= 0.95


def test_the_nearest_batch_counts() -> None:
    kept = Measurements(
        [
            measured("wave@1", 5, None, ("reverse", None)),
            measured("wave@1", 5, 64, ("forward", 16), ("reverse", None)),
            measured("wave@1", 6, None, ("sparse", None)),
        ]
    )
    assert kept.find(key(5, None), KIND)[0].jacobian == "reverse"
    assert kept.find(key(5, 2), KIND)[0].jacobian == "reverse"
    assert kept.find(key(5, 32), KIND)[0].chunk_size == 16
    assert kept.find(key(5, 4096), KIND)[0].jacobian == "forward"
    assert kept.find(key(7, None), KIND) == []
    assert kept.find(key(5, None), "another device") == []
    assert kept.find(key(6, None), KIND)[0].is_measured


def test_what_is_kept_is_read_again_and_later_ones_replace(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    first = measured("wave@1", 5, None, ("reverse", None))
    other = measured("wave@1", 6, None, ("forward", 32))
    path = Measurements([first, other]).save(folder)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert list(folder.iterdir()) == [path]
    again = measured("wave@1", 5, None, ("forward", None))
    kept = Measurements.load(folder).updated([again])
    assert kept.of("wave@1", KIND) == [again, other]


@pytest.mark.parametrize("text", ["", "{", "[{}]", "[1]", '{"a": 1}'])
def test_a_broken_file_is_left_aside(tmp_path: Path, text: str) -> None:
    (tmp_path / "strategies.json").write_text(text)
    assert Measurements.load(tmp_path).of("wave@1", KIND) == []


def test_a_server_takes_what_was_measured(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=5)
    Measurements([measured("wave@1", 5, None, ("reverse", 2), ("forward", None))]).save(
        tmp_path
    )
    with (
        serving(registry, cache_dir=tmp_path) as server,
        jacserve.Client(server.target) as client,
    ):
        result = client.evaluate("wave", x)
        assert (result.mode, result.chunk_size, result.measured) == ("reverse", 2, True)
        by_rule = client.evaluate("wave", np.append(x, 1.0))
        assert (by_rule.mode, by_rule.chunk_size, by_rule.measured) == (
            "forward", None, False
        )  # fmt: skip
        asked = client.evaluate("wave", x, mode="forward")
        assert (asked.mode, asked.measured) == ("forward", False)
        np.testing.assert_allclose(result.jacobian, asked.jacobian, rtol=1e-14)
        [shown] = client.describe("wave").measured_strategies
        assert shown.inputs == "x: float64[5]"
        assert (shown.mode, shown.chunk_size, shown.speedup) == ("reverse", 2, 2.0)
        assert client.describe("sensors").measured_strategies == ()


def test_sparse_is_taken_only_where_the_layout_allows_it(tmp_path: Path) -> None:
    sparse = measured("wave@1", 40, None, ("sparse", None), ("reverse", None))
    dense = measured("wave@1", 50, None, ("reverse", None), ("sparse", None))
    Measurements([sparse, dense]).save(tmp_path)
    with (
        serving(registry, cache_dir=tmp_path) as server,
        jacserve.Client(server.target) as client,
    ):
        assert client.evaluate("wave", np.ones(40)).mode == "reverse"
        assert client.evaluate("wave", np.ones(40), layout="csr").mode == "sparse"
        assert client.evaluate("wave", np.ones(50), layout="csr").mode == "reverse"


def test_a_measured_mode_that_is_no_more_is_passed_over(tmp_path: Path) -> None:
    import jax

    others = Registry()

    @others.function
    def wave(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return jax.lax.while_loop(lambda y: y[0] < 9.0, lambda y: 2.0 * y, x)

    Measurements([measured("wave@1", 5, None, ("reverse", None))]).save(tmp_path)
    with (
        serving(others, cache_dir=tmp_path) as server,
        jacserve.Client(server.target) as client,
    ):
        result = client.evaluate("wave", np.ones(5))
        assert (result.mode, result.measured) == ("forward", False)


def test_the_command_measures_and_keeps(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "examples" / "functions.py"
    done = subprocess.run(
        [sys.executable, "-m", "jacserve", "tune", file, "-f", "rosenbrock",
         "--size", "n=40", "--batch", "0", "--dtype", "float64"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "JACSERVE_CACHE_DIR": str(tmp_path)},
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "rosenbrock@1 float64[40], one point: " in done.stdout
    assert "times as fast as the rule by shape" in done.stdout
    [entry] = json.loads((tmp_path / "strategies.json").read_text())
    assert entry["inputs"] == ["float64[40]"]
    assert {"forward", "reverse"} <= {timing["mode"] for timing in entry["timings"]}


def test_the_command_says_which_function_could_not_be_measured(tmp_path: Path) -> None:
    file = tmp_path / "picky.py"
    file.write_text("""
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def picky(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 4:
        raise RuntimeError("the moon is full")
    return x
""")
    done = subprocess.run(
        [sys.executable, "-m", "jacserve", "tune", file, "--size", "n=4"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JACSERVE_CACHE_DIR": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 1
    assert "picky@1: functions/picky can't be traced" in done.stderr
    assert "the moon is full" in done.stderr
    assert "Traceback" not in done.stderr
