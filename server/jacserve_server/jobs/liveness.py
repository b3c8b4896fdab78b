"""Tells servers that share a folder of jobs which of them live.

Each holds a lock that the kernel frees when its process ends, in whatever way. A
stopped or stuck process holds its lock: it may go on, so it lives. To take a living
server for dead would have two compute one job, and must never happen; to take a dead
one for alive only costs time until the next look.
"""

import contextlib
import os
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout


class Presence:
    """A server's sign of life, and its view of the others'.

    Its methods may be called from several threads.

    Attributes:
        id: Names this server among those that share the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Shows that this server lives.

        Args:
            folder: The folder of jobs, shared with other servers.

        Raises:
            OSError: The folder can't be written to.
        """
        self.id = uuid4().hex
        self._folder = folder / "servers"
        self._folder.mkdir(parents=True, exist_ok=True)
        # Nobody knows the id before the lock is held, so nobody looks at it too early.
        self._lock = _lock(self._path(self.id))
        self._lock.acquire(timeout=0)

    def is_alive(self, server_id: str) -> bool:
        """Tells whether a server lives.

        What can't be told counts as alive. While two look at the same dead server, one
        of them may take it for alive.

        Args:
            server_id: The `id` of its Presence.

        Returns:
            Whether it lives. A dead one's file is gone then.
        """
        if server_id == self.id:
            return self._lock.is_locked
        path = self._path(server_id)
        try:
            os.stat(path)
        except FileNotFoundError:
            # Where our own file can't be seen either, the folder itself is away.
            return not self._path(self.id).exists()
        except OSError:
            return True
        return not _remove_if_free(path)

    def close(self) -> None:
        """Lets the others know that this server is gone."""
        self._lock.release(force=True)
        self._path(self.id).unlink(missing_ok=True)

    def _path(self, server_id: str) -> Path:
        return self._folder / f"{server_id}.lock"


def _lock(path: Path) -> FileLock:
    # Not of one thread: a server may be closed by another than has started it.
    return FileLock(path, thread_local=False)


def _remove_if_free(path: Path) -> bool:
    """Removes a dead server's file; tells whether it was one."""
    lock = _lock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    try:
        # Windows removes no open file; the next look finds it free again.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    finally:
        lock.release()
    return True
