"""A server in a process of its own, as users run it."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerProcess:
    process: subprocess.Popen[str]
    target: str


@contextmanager
def server_process(*arguments: str | Path) -> Generator[ServerProcess]:
    command = [sys.executable, "-m", "jacserve", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        lines = iter(process.stdout.readline, "")
        ready = next((line for line in lines if line.startswith("Listening on ")), None)
        assert ready is not None, process.stderr.read()
        yield ServerProcess(process, ready.split()[2])
    finally:
        process.kill()
        process.communicate()
