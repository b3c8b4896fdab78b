from pathlib import Path

import pytest


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    """A file with a function, for servers that are to do something else."""
    file = tmp_path / "functions.py"
    file.write_text(
        "from jacserve_server import Registry\nfrom jaxtyping import Array, Float\n"
        "registry = Registry()\n"
        '@registry.function\ndef f(x: Float[Array, "2"]) -> Float[Array, "2"]:\n'
        "    return x\n"
    )
    return file
