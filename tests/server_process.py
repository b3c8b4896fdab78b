"""A server in a process of its own, as users run it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class ServerProcess:
    process: subprocess.Popen[str]
    target: str
    log: IO[str]

    def errors(self) -> str:
        """What it has written to stderr."""
        self.log.seek(0)
        return self.log.read()


@contextmanager
def server_process(
    *arguments: str | Path, **environment: str
) -> Generator[ServerProcess]:
    command = [sys.executable, "-m", "jacserve", "serve", "--port", "0"]
    # To a file: a pipe that nobody reads would fill up and hold the server.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
        )
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            ready = next((x for x in lines if x.startswith("Listening on ")), None)
            if ready is None:
                log.seek(0)
                raise AssertionError(log.read())
            yield ServerProcess(process, ready.split()[2], log)
        finally:
            process.kill()
            process.communicate()
