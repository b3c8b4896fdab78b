"""Processes beside this one: servers, and helpers that answer lines of JSON.

All are started as new programs: after JAX or gRPC has started threads, a fork of this
process could hang.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
FUNCTIONS = Path(__file__).with_name("functions.py")
_GRACE_S = 30.0


class BenchmarkError(Exception):
    """A process failed; the text has what it wrote."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that writes lines.

    Attributes:
        popen: The process.
        log: What it writes to stderr.
    """

    popen: subprocess.Popen[str]
    log: IO[str]

    def line(self) -> str:
        """Waits for its next line.

        Raises:
            BenchmarkError: It has ended.
        """
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise BenchmarkError(f"{self.popen.args} ended:\n{self.log_text()}")
        return line

    def log_text(self) -> str:
        """Returns what it has written to stderr."""
        self.log.seek(0)
        return self.log.read()

    def ask(self, **request: Any) -> Any:
        """Sends a line of JSON, and waits for the answer.

        Args:
            **request: What to send.

        Returns:
            The answer.
        """
        self.send(**request)
        return self.answer()

    def answer(self) -> Any:
        """Waits for an answer."""
        return json.loads(self.line())

    def send(self, **request: Any) -> None:
        """Sends a line of JSON, and does not wait."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(request) + "\n")
        self.popen.stdin.flush()

    def address(self) -> str:
        """Waits until it listens; returns where."""
        while not (line := self.line()).startswith("Listening on "):
            pass
        return line.split()[2]

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.popen.pid


@contextmanager
def running(
    module: str, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> Generator[Process]:
    """Runs `python -m MODULE`; ends it with the block.

    Args:
        module: The module.
        *arguments: Its arguments.
        env: Further variables of its environment.

    Yields:
        The process.
    """
    # Several processes share one GPU: none may take most of its memory at once.
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **(env or {}),
    }
    with tempfile.TemporaryFile("w+") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            yield Process(popen, log)
        finally:
            popen.terminate()
            try:
                popen.communicate(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.communicate()


@contextmanager
def serving(
    device: str,
    cache_dir: str | Path,
    *,
    functions: str | Path = FUNCTIONS,
    **settings: Any,
) -> Generator[tuple[str, Process]]:
    """Runs `jacserve serve`.

    Args:
        device: Where it runs programs.
        cache_dir: The folder for what outlives it.
        functions: The file or module to serve.
        **settings: Further settings of the server.

    Yields:
        Its address, and the process.
    """
    env = {
        "JACSERVE_CACHE_DIR": str(cache_dir),
        **{f"JACSERVE_{name.upper()}": str(value) for name, value in settings.items()},
    }
    command = ("serve", functions, "--port", "0", "--device", device)
    with running("jacserve", *command, env=env) as process:
        yield process.address(), process


def memory_bytes(pid: int | str, field: str) -> int:
    """Reads how much memory a process has.

    Args:
        pid: Its id, or "self".
        field: "VmRSS" for now, "VmHWM" for the most since `reset_peak`.

    Returns:
        Resident bytes.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/{pid}/status has no {field}")


def reset_peak(pid: int | str) -> None:
    """Forgets the most memory that a process had, so that VmHWM starts anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
