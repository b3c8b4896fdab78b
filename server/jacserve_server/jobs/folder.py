"""The folder of jobs: what was uploaded, and the results that have no other place.

Servers that share the folder share its jobs; who lives is seen by locks in it.
"""

import os
import shutil
import time
import uuid
from pathlib import Path

from jacserve_server.jobs.liveness import Presence
from jacserve_server.jobs.storage import Location
from jacserve_server.jobs.uploads import file_name

# The storage root of results that a client has named no place for.
RESULTS_ROOT = "jobs"
_STALE_S = 3600.0


class JobFolder:
    """Where the files of each job are.

    Attributes:
        id: Names the folder, in whatever table of jobs.
        presence: Says which of the servers that share it live.
    """

    def __init__(self, path: Path) -> None:
        """Makes the folder, if need be.

        Args:
            path: The folder.

        Raises:
            OSError: It can't be used.
        """
        self._uploads, self._results = path / "uploads", path / "results"
        for each in (self._uploads, self._results):
            each.mkdir(parents=True, exist_ok=True)
        self.id = _name_of(path / "id")
        self.presence = Presence(path)

    def close(self) -> None:
        """Lets others know that this server is gone."""
        self.presence.close()

    def staged(self, uid: str) -> Path:
        """Returns where the arrays of a job that is being made are."""
        return self._uploads / f"{uid}.{self.presence.id}"

    def keep(self, staged: Path, uid: str) -> Path:
        """Moves the arrays of a job to where they stay; returns where that is."""
        kept = self._uploads / uid
        staged.rename(kept)
        return kept

    def upload(self, uid: str, place: int) -> Location:
        """Returns where an array of a job is."""
        name = file_name(place)
        return Location(str(self._uploads), f"{uid}/{name}", f"uploads/{name}")

    def results(self, uid: str) -> Location:
        """Returns where the results of a job are."""
        path = f"{uid}.zarr"
        return Location(str(self._results), path, f"{RESULTS_ROOT}/{path}")

    def remove(self, uid: str) -> None:
        """Removes the arrays of a job."""
        shutil.rmtree(self._uploads / uid, ignore_errors=True)

    def sweep(self) -> list[str]:
        """Removes what servers that were killed have left of jobs not yet made.

        Returns:
            The uids of other arrays, which may be left, too: where no job has them.
        """
        kept: list[str] = []
        for path in self._uploads.iterdir():
            uid, _, server = path.name.partition(".")
            if not server:
                # A moment passes between a job's files and the job.
                if _age_s(path) > _STALE_S:
                    kept.append(uid)
            elif not self.presence.is_alive(server):
                shutil.rmtree(path, ignore_errors=True)
        return kept


def _age_s(path: Path) -> float:
    """Returns how old a folder is; 0 where others have removed it meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _name_of(path: Path) -> str:
    """Returns the name in a file; a new one where there is none."""
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    fresh.write_text(uuid.uuid4().hex)
    try:
        # Of several servers that start at once, one makes it.
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text().strip()
