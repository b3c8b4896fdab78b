"""Programs that outlive the server which compiled them."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

import jacserve
from server_process import server_process

FILE = """
import jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def tower(x: Float[Array, "n"]) -> Float[Array, "n"]:
    for place in range(15):
        x = jnp.sin(x) * jnp.cos(place + jnp.roll(x, place)) + jnp.exp(-x * x)
    return x
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    file = tmp_path / "functions.py"
    file.write_text(FILE)
    return file


def first_compile_s(functions: Path) -> float:
    with (
        server_process(functions) as server,
        jacserve.Client(server.target) as client,
    ):
        # What is compiled for every process alike must not count.
        client.value("tower", np.ones(3))
        return client.evaluate("tower", np.ones(5)).timing.compile_s


def test_after_a_restart_a_first_call_is_only_traced(
    functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JACSERVE_CACHE_DIR", str(tmp_path / "cache"))
    cold = first_compile_s(functions)
    [folder] = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("programs-jax-")
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    kept = {file.name for file in folder.iterdir() if file.name.endswith("-cache")}
    assert kept
    warm = first_compile_s(functions)
    assert warm < 0.5 * cold
    assert kept == {f.name for f in folder.iterdir() if f.name.endswith("-cache")}


def test_a_folder_that_others_can_write_to_is_not_used(
    functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    folder = tmp_path / "cache" / f"programs-jax-{jax.__version__}"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("JACSERVE_CACHE_DIR", str(tmp_path / "cache"))
    with (
        server_process(functions) as server,
        jacserve.Client(server.target) as client,
    ):
        assert client.value("tower", np.ones(3)).shape == (3,)
        assert "others may write to it. Run chmod 700" in server.errors()
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_nothing_is_kept_where_nothing_may_be(
    functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JACSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JACSERVE_MAX_CACHE_BYTES", "0")
    first_compile_s(functions)
    assert not (tmp_path / "cache").exists()
