"""The worker's process: started, listened to, and ended. Never forked."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)
# Settings may have passwords, and the worker is told what it needs.
_OWN_VARIABLES = "JACSERVE_"
_LINE_BYTES = 4096
_MOST_READS = 256
_PATIENCE_S = 2.0
_PROGRAM = "jacserve_server.isolation.worker"
_is_worker = False


def become_worker() -> None:
    """Says that this process is a worker, which starts no other."""
    global _is_worker
    _is_worker = True


def is_worker() -> bool:
    """Whether this process is a worker."""
    return _is_worker


def resident_bytes(pid: int) -> int:
    """Returns the memory that a process has resident.

    Args:
        pid: Its process id.

    Returns:
        Bytes; 0 where that can't be told.
    """
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class WorkerProcess:
    """A process that runs the worker's program. Used from one event loop.

    It does not outlive the thread that makes it.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, end: socket.socket, on_exit: Callable[[str], None]) -> None:
        """Starts it.

        Args:
            end: What it inherits, and nothing else.
            on_exit: Called in the event loop when it has ended, with the words
                "was killed by SIGSEGV" or "ended with status 3".

        Raises:
            OSError: It can't be started.
        """
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._output, theirs = os.pipe()
        os.set_blocking(self._output, False)
        self._line = b""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_OWN_VARIABLES)
        }
        try:
            self._process = subprocess.Popen(
                # -P: nothing of the current folder stands for what it imports.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    _PROGRAM,
                    str(os.getpid()),
                    str(end.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                pass_fds=(end.fileno(),),
                env=environment,
                # With what it starts itself, it is a group that can be killed.
                start_new_session=True,
            )
        except BaseException:
            os.close(self._output)
            raise
        finally:
            os.close(theirs)
            end.close()
        self.pid = self._process.pid
        self._reaping = threading.Lock()
        self._loop.add_reader(self._output, self._log_output)
        self._waiting = threading.Thread(
            target=self._wait, name=f"worker-{self.pid}", daemon=True
        )
        self._waiting.start()

    def kill(self) -> None:
        """Ends it, and what it has started; nothing if it has ended."""
        with self._reaping, suppress(ProcessLookupError, PermissionError):
            # Once it has been waited for, its number may be another's.
            if self._process.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Waits until it has ended, by itself if it does so soon."""
        self._waiting.join(_PATIENCE_S)
        self.kill()
        self._waiting.join()
        self._settle()

    def resident_bytes(self) -> int:
        """Returns its resident memory; 0 where that can't be told."""
        return resident_bytes(self.pid)

    def _wait(self) -> None:
        # What it has started must not outlive it: the group is ended with it.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
        with self._reaping:
            self._process.wait()
        with suppress(RuntimeError):  # The loop is closed: nobody asks any more.
            self._loop.call_soon_threadsafe(self._exited)

    def _exited(self) -> None:
        self._settle()
        self._on_exit(_words(self._process.returncode))

    def _settle(self) -> None:
        if self._output < 0:
            return
        # Its last words; who has left its group may go on for ever.
        for _ in range(_MOST_READS):
            if not self._log_output():
                break
        self._log_line(self._line)
        self._loop.remove_reader(self._output)
        os.close(self._output)
        self._output = -1

    def _log_output(self) -> bool:
        """Logs what it has written; returns whether there may be more."""
        try:
            data = os.read(self._output, _LINE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            # Everyone who had it has closed it.
            self._loop.remove_reader(self._output)
            return False
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._log_line(line)
        if len(self._line) >= _LINE_BYTES:
            self._log_line(self._line)
            self._line = b""
        return True

    def _log_line(self, line: bytes) -> None:
        if text := line.decode(errors="replace").rstrip():
            _log.info("worker %d: %s", self.pid, text)


def _words(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
