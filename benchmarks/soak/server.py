"""The server of the soak: started, stopped, killed and started again, and watched."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

import psutil

from benchmarks.fast_path.processes import ROOT, BenchmarkError
from benchmarks.soak.credentials import Credentials

FUNCTIONS = Path(__file__).with_name("functions.py")
_STARTS_WITHIN_S = 120.0
_STOPS_WITHIN_S = 60.0
# A worker is young for so long: it imports JAX, and starts its threads.
_GROWS_UP_S = 10.0
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server takes at a moment.

    Attributes:
        at: When, by `time.monotonic`.
        memory_bytes: Its resident memory.
        threads: Its threads.
        files: Its open files, sockets among them.
        worker: What its worker takes; None where that was started just now.
    """

    at: float
    memory_bytes: int
    threads: int
    files: int
    worker: "Sample | None" = None


@dataclass(frozen=True, slots=True)
class Absence:
    """A time in which there was no server.

    Attributes:
        start: When it was told to go, by `time.monotonic`.
        stop: When the next one was ready.
        how: How it went.
    """

    start: float
    stop: float
    how: str


class SoakServer(AbstractContextManager["SoakServer"]):
    """A server on one port and one folder, however often it is started.

    Attributes:
        target: Its address.
        targets: That, and one where there never is a server.
        metrics_url: Where it tells its metrics.
        absences: When it was away.
        faults: Where it did not do as it must.
    """

    def __init__(
        self, folder: Path, credentials: Credentials, settings: Mapping[str, str]
    ) -> None:
        """Starts it.

        Args:
            folder: For its jobs and its cache.
            credentials: Who may call.
            settings: Further settings, by name.
        """
        self._port, metrics_port = _free_port(), _free_port()
        # Nobody listens, and nobody else gets the port.
        self._nobody = socket.socket()
        self._nobody.bind((_HOST, 0))
        self.target = f"{_HOST}:{self._port}"
        self.targets = (self.target, f"{_HOST}:{self._nobody.getsockname()[1]}")
        self.metrics_url = f"http://{_HOST}:{metrics_port}/metrics"
        every = {
            "device": "cpu",
            "jobs_dir": str(folder / "jobs"),
            "cache_dir": str(folder / "cache"),
            "metrics_port": str(metrics_port),
            "log_level": "warning",
            "log_format": "json",
            **credentials.settings,
            **settings,
        }
        self._environment = {
            **os.environ,
            **{f"JACSERVE_{name.upper()}": value for name, value in every.items()},
        }
        self._log: IO[str] = (folder / "server.log").open("w+")
        self.absences: list[Absence] = []
        self.faults: list[str] = []
        self._process = self._started()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._nobody.close()

    def restart(self, how: signal.Signals) -> None:
        """Ends it by a signal, and starts it again."""
        start = time.monotonic()
        self._end(how)
        self._process = self._started()
        self.absences.append(Absence(start, time.monotonic(), how.name))

    def stop(self) -> None:
        """Ends it in order."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        self._process.send_signal(how)
        try:
            status = self._process.wait(_STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.faults.append(f"it did not end within {_STOPS_WITHIN_S:.0f} s")
            self._process.kill()
            self._process.wait()
            return
        if how is signal.SIGTERM and status != 0:
            self.faults.append(f"it ended with status {status} after SIGTERM")

    def look(self) -> Sample | None:
        """Returns what it takes now; None where it has died by itself."""
        if self._process.poll() is not None:
            self.faults.append(
                f"it has died, with status {self._process.returncode}:\n{self.log()}"
            )
            return None
        main = psutil.Process(self._process.pid)
        own = _sampled(main)
        if own is None:
            return None
        found = map(_sampled, filter(_is_grown, main.children(recursive=True)))
        others = [each for each in found if each is not None]
        worker = max(others, key=lambda each: each.memory_bytes, default=None)
        return replace(own, worker=worker)

    def log(self) -> str:
        """Returns what every one of them has written to stderr."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def _started(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "jacserve", "serve", str(FUNCTIONS)]
        process = subprocess.Popen(
            [*command, "--host", _HOST, "--port", str(self._port)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=self._environment,
        )
        assert process.stdout is not None
        deadline = time.monotonic() + _STARTS_WITHIN_S
        for line in process.stdout:
            if line.startswith("Listening on "):
                return process
            if time.monotonic() > deadline:
                break
        process.kill()
        raise BenchmarkError(f"the server did not start:\n{self.log()}")


def within(at: float, absences: Sequence[Absence], slack_s: float) -> bool:
    """Tells whether there was no server at a moment, or it had just come back."""
    return any(each.start <= at <= each.stop + slack_s for each in absences)


def _is_grown(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return time.time() - process.create_time() > _GROWS_UP_S
    return False


def _sampled(process: psutil.Process) -> Sample | None:
    try:
        with process.oneshot():
            return Sample(
                time.monotonic(),
                process.memory_info().rss,
                process.num_threads(),
                process.num_fds(),
            )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return probe.getsockname()[1]
