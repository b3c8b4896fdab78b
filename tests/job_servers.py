"""Servers of job_functions.py on one folder of jobs, to be killed and restarted."""

import resource
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import job_functions
from job_calls import JobCalls
from server_process import server_process

FUNCTIONS = Path(job_functions.__file__)
OPEN = 10**9


class JobServer:
    """A server process, and a connection to it."""

    def __init__(self, *arguments: Path, **environment: str) -> None:
        self._stack = ExitStack()
        entered = server_process(*arguments, **environment)
        served = self._stack.enter_context(entered)
        self.process: subprocess.Popen[str] = served.process
        self.target = served.target
        self.errors = served.errors
        self.calls = self._stack.enter_context(JobCalls(self.target))

    def kill(self) -> None:
        """Ends it at once, as a crash does."""
        self._stack.close()

    def stop(self) -> None:
        """Ends it as an orderly shutdown does."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.errors()
        self._stack.close()

    def limit_files(self, size_bytes: int) -> None:
        """Has it fail, as with a full disk, to write beyond so many bytes of a file."""
        _, most = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size_bytes, most))


class JobHome:
    """A folder of jobs, what steers its functions, and the servers on it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.jobs_dir = folder / "jobs"
        self.results = self.jobs_dir / "results"
        self.uploads = self.jobs_dir / "uploads"
        self._log, self._gate = folder / "log", folder / "gate"
        self.fatal = folder / "fatal"
        self._environment = {
            "JACSERVE_DEVICE": "cpu",
            "JACSERVE_JOBS_DIR": str(self.jobs_dir),
            "JOB_TEST_LOG": str(self._log),
            "JOB_TEST_GATE": str(self._gate),
            "JOB_TEST_FATAL": str(self.fatal),
            **environment,
        }
        self._servers: list[JobServer] = []
        self.open()

    def start(self, functions: Path = FUNCTIONS, **environment: str) -> JobServer:
        server = JobServer(functions, **{**self._environment, **environment})
        self._servers.append(server)
        return server

    def close(self) -> None:
        for server in self._servers:
            server.kill()

    def open(self, row: int = OPEN) -> None:
        """Lets rows before this one be computed, and holds the others up."""
        fresh = self._gate.with_suffix(".new")
        fresh.write_text(str(row))
        fresh.replace(self._gate)

    def computed(self) -> Iterator[tuple[int, range]]:
        """Yields each batch that was computed: by which process, and its rows."""
        if self._log.exists():
            for line in self._log.read_text().splitlines():
                pid, start, stop = map(int, line.split())
                yield pid, range(start, stop)

    def times_computed(self) -> Counter[int]:
        """How often each row was computed, by all servers."""
        return Counter(row for _, rows in self.computed() for row in rows)

    def store(self, job: Any) -> Path:
        """Where the results of a job are, that has no other place for them."""
        return self.results / job.output.partition("/")[2]

    def query(self, statement: str, *values: Any) -> list[Any]:
        """Asks the table of jobs, or changes it."""
        with closing(sqlite3.connect(self.jobs_dir / "jobs.sqlite")) as connection:
            with connection:
                return connection.execute(statement, values).fetchall()
