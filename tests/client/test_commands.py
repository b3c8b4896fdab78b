"""The command line, as a shell sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from server_process import server_process

FUNCTIONS = Path(__file__).parents[2] / "examples" / "functions.py"
X = [2.0, 0.5, 1.0]
EXTRA = """
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Complex, Float, Int
from jacserve_server import Registry

registry = Registry()

@registry.function
def rotate(z: Complex[Array, "2"], k: Int[Array, ""]) -> Complex[Array, "2"]:
    return z * 1j ** k

@registry.function
def halves(x: BFloat16[Array, "n"]) -> BFloat16[Array, "n"]:
    return x / 2

@registry.function
def reciprocal(x: Float[Array, "2"]) -> dict:
    return {"whole": 1.0 / x, "parts": (x[0], x[1])}
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    extra = tmp_path_factory.mktemp("extra") / "extra.py"
    extra.write_text(EXTRA)
    with server_process(FUNCTIONS, extra) as server:
        yield server.target


@pytest.fixture
def jacserve(target: str, tmp_path: Path):
    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "jacserve", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={**os.environ, "JACSERVE_TARGET": target, "COLUMNS": "120"},
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.mark.slow
def test_describe_sparsity(jacserve, tmp_path: Path) -> None:
    options = ("--sparsity", "--size", "n=12", "--hessian", "--picture", "h.png")
    shown = jacserve("describe", "rosenbrock", *options).stdout
    assert "12 x 12, 34 entries (23.61%), 3 colours" in shown
    assert "sparsity at x: float32[12]" in shown
    picture = [line.strip() for line in shown.splitlines() if "│" in line]
    assert picture[0] == "│██▄         │"
    assert picture[-1] == "│          ▀█│".replace("  ▀█", " ▀██")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert "NAME=SIZE" in jacserve(
        "describe", "rosenbrock", "--sparsity", "--size", "n", code=1
    ).stderr  # fmt: skip
    assert "can't be written" in jacserve(
        "describe", "rosenbrock", "--sparsity", "--picture", "no/folder.png", code=1
    ).stderr  # fmt: skip


def test_eval_products_and_sparse_matrices(jacserve, tmp_path: Path) -> None:
    x = json.dumps([1.0, 2.0, 3.0])
    answer = json.loads(
        jacserve(
            "eval", "rosenbrock", "-i", x, "-q", "hessian", "-q", "hvp", "--tangent",
            "[1, 0, 0]", "--mode", "sparse", "-o", "json",
        ).stdout
    )  # fmt: skip
    hessian, hvp = answer["quantities"]["hessian"], answer["quantities"]["hvp"]
    dense = np.zeros(hessian["shape"])
    dense[hessian["rows"], hessian["columns"]] = hessian["data"]
    np.testing.assert_allclose(dense[0], hvp)
    assert answer["modes"]["hessian"] == "sparse"
    jacserve(
        "eval", "rosenbrock", "-i", x, "-q", "hessian", "--layout", "coo", "-o", "h.npz"
    )
    with np.load(tmp_path / "h.npz") as saved:
        np.testing.assert_array_equal(saved["hessian.rows"], hessian["rows"])
    answer = json.loads(
        jacserve(
            "eval", "reciprocal", "-i", "[2.0, 4.0]", "-q", "vjp", "--layout", "blocks",
            "--cotangent", "whole=[1, 0]", "--cotangent", "parts.0=2",
            "--cotangent", "parts.1=3", "-o", "json",
        ).stdout
    )  # fmt: skip
    np.testing.assert_allclose(answer["quantities"]["vjp"], [2 - 0.25, 3])


def test_functions(jacserve) -> None:
    lines = jacserve("functions").stdout.splitlines()
    assert lines[0].split() == [
        "function", "version", "signature", "modes", "documentation"
    ]  # fmt: skip
    [spherical] = [line for line in lines if line.startswith("spherical")]
    assert "(x: [3]) -> [3]" in spherical
    assert "forward, reverse" in spherical


def test_describe(jacserve) -> None:
    text = jacserve("describe", "rotate").stdout
    assert "rotate(z: [2], k: []) -> [2]" in text
    assert "complex128, complex64" in text
    assert "(no derivative)" in text


def test_eval_prints_a_table(jacserve) -> None:
    text = jacserve(
        "eval", "spherical", "-i", X, "-q", "jacobian", "-q", "determinant"
    ).stdout
    assert "jacobian float64 [3, 3]" in text
    assert "[ 0.259035  0.94832  -0.806845]" in text
    assert "1.917702" in text
    assert "spherical@1 on cpu:0, mode forward" in text


def test_eval_prints_json_that_can_be_read_back(jacserve) -> None:
    first = jacserve("eval", "spherical", "-i", json.dumps(X), "-o", "json").stdout
    answer = json.loads(first)
    assert answer["mode"] == "forward"
    assert answer["quantities"]["jacobian"][2][2] == 0.0
    text = jacserve(
        "eval", "rotate", "-i", 'z=["1+2j", "Infinity"]', "-i", "k=1",
        "-q", "value", "-o", "json",
    ).stdout  # fmt: skip
    value = json.loads(text, parse_constant=pytest.fail)["quantities"]["value"]
    assert complex(value[0]) == pytest.approx(-2 + 1j)
    assert np.isinf(complex(value[1]))
    again = jacserve(
        "eval", "rotate", "-i", f"z={json.dumps(value)}", "-i", "k=1", "-o", "json"
    )
    assert not json.loads(again.stdout)["finite"]


def test_eval_reads_and_writes_files(jacserve, tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(0.5, 2.5, size=(7, 3)).astype("f")
    np.save(tmp_path / "points.npy", points)
    np.savez(tmp_path / "inputs.npz", x=points)
    for text in ("points.npy", "x=points.npy", "inputs.npz"):
        jacserve("eval", "spherical", "-i", text, "-q", "jacobian", "-o", "jac.npy")
        jac = np.load(tmp_path / "jac.npy")
        assert (jac.shape, jac.dtype) == ((7, 3, 3), np.float32)
    jacserve("eval", "reciprocal", "-i", [1, 2], "-o", "all.npz")
    with np.load(tmp_path / "all.npz") as arrays:
        assert set(arrays) == {
            "value['whole']", "value['parts'][0]", "value['parts'][1]", "jacobian"
        }  # fmt: skip


def test_eval_options(jacserve) -> None:
    blocks = jacserve(
        "eval", "reciprocal", "-i", [1, 2], "--layout", "blocks", "--mode", "reverse",
        "--wrt", "x", "--dtype", "float32", "-q", "jacobian",
    ).stdout  # fmt: skip
    assert "jacobian['whole'] float32 [2, 2]" in blocks
    assert "mode reverse" in blocks


def test_nan_is_pointed_out(jacserve) -> None:
    text = jacserve("eval", "reciprocal", "-i", [0, 1]).stdout
    assert "The answer has NaN or Inf." in text
    refused = jacserve("eval", "reciprocal", "-i", [0, 1], "--require-finite", code=1)
    assert "value, jacobian of functions/reciprocal@1 has NaN or Inf." in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["describe", "sphericl"], "Did you mean spherical?"),
        (["eval", "sphericl", "-i", "[1]"], "Did you mean spherical?"),
        (["eval", "spherical", "-i", "[1, 2]"], "x has shape [2]"),
        (["eval", "spherical", "-i", "[1, 2"], "neither JSON text"),
        (["eval", "spherical", "-i", "nowhere.npy"], "nowhere.npy can't be read"),
        (["eval", "spherical", "-i", str(X), "-q", "jacobi"], "'jacobi'"),
        (["eval", "spherical", "-i", str(X), "-o", "a.npy"], "holds one array"),
        (["eval", "spherical", "-i", str(X), "-o", "a.txt"], "neither .npy nor .npz"),
        (["eval", "rotate", "-i", "[1, 2]", "-i", "k=1"], "all inputs by name"),
        (["eval", "spherical", "-i", "x=[1]", "-i", "x=[2]"], "given twice"),
        (["eval", "rotate", "-i", "z=[1, 2]", "-i", "k=1.5"], "it has float64"),
        (["eval", "rotate", "-i", "z=[1]", "-i", f"k={2**63}"], "int64 or int32"),
        (["eval", "spherical", "-i", '["1+2j"]'], "it has complex128"),
        (["eval", "spherical", "-i", "[null, 1, 2]"], "neither JSON text"),
        (["eval", "spherical", "-i", "[" * 9999], "neither JSON text"),
        (["eval", "spherical", "-i", str(X), "--dtype", "foo"], "no dtype foo"),
        (["eval", "spherical", "-i", "broken.npz"], "broken.npz can't be read"),
        (["eval", "spherical", "-i", "text.npy"], "<U1, which can't be sent"),
        (["eval", "halves", "-i", "[1]", "-o", "a.npz"], "can't hold bfloat16"),
        (["functions", "--target", "127.0.0.1:1"], "No server answers"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    jacserve, tmp_path: Path, arguments, words: str
) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    done = jacserve(*arguments, code=1)
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "command", [[], ["eval"], ["serve"], ["describe"], ["bench"], ["jobs"]]
)
def test_help(jacserve, command: list[str]) -> None:
    assert "Usage: jacserve" in jacserve(*command, "--help").stdout
