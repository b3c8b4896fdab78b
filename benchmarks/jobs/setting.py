"""What every file of these benchmarks measures with, and how much."""

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import jacserve
from benchmarks.fast_path.processes import BenchmarkError, Process, serving
from benchmarks.fast_path.rounds import Effort
from jacserve.jobs import Job

FUNCTIONS = Path(__file__).with_name("functions.py")
# Files of a deleted job are removed soon, and not at once.
_REMOVED_WITHIN_S = 60.0
_ENDS_WITHIN_S = 300.0
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Scale:
    """How many points jobs have.

    Attributes:
        points: In throughput.
        heavy_points: In throughput, where a point takes long or gives 16 KiB.
        memory_points: In memory: sizes that grow.
        load_points: Of the job beside interactive calls, which is not finished.
        resume_points: Of the job whose server is killed, 16 KiB each.
        disk_bytes: The disk that all takes at most, at a time.
    """

    points: int
    heavy_points: int
    memory_points: tuple[int, ...]
    load_points: int
    resume_points: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how much is measured.

    Attributes:
        effort: How much is measured.
        scale: How many points jobs have.
        random: Of points, and of the order of everything.
        folder: For everything that is written.
    """

    effort: Effort
    scale: Scale
    random: np.random.Generator
    folder: Path

    @property
    def jobs_dir(self) -> Path:
        """The folder of jobs of the servers."""
        return self.folder / "jobs"

    @contextmanager
    def serving(self) -> Generator[tuple[str, Process]]:
        """Runs a server; yields its address, and the process."""
        with serving(
            "cpu",
            self.folder / "cache",
            functions=FUNCTIONS,
            jobs_dir=self.jobs_dir,
            log_level="warning",
        ) as served:
            yield served

    def points_file(self, n: int, count: int, dtype: str = "float32") -> Path:
        """Writes points [count, n] to a file, once; returns it."""
        path = self.folder / f"points-{n}-{count}-{dtype}.npy"
        if not path.exists():
            np.save(path, self.random.uniform(0.5, 1.5, (count, n)).astype(dtype))
        return path

    def forget(self, job: Job) -> None:
        """Deletes the only job, and waits until none of its files takes disk."""
        job.delete()
        folders = [self.jobs_dir / name for name in ("uploads", "results")]
        end = time.monotonic() + _REMOVED_WITHIN_S
        while any(path for folder in folders for path in folder.iterdir()):
            if time.monotonic() > end:
                raise BenchmarkError(f"{self.jobs_dir} still has files of {job.id}")
            time.sleep(_LOOK_S)
        # Else the disk might still work off one measurement in the next.
        os.sync()


def mapped(path: Path, count: int | None = None) -> np.ndarray:
    """Maps the first points of a file into memory."""
    return np.load(path, mmap_mode="r")[:count]


def finished(job: Job) -> jacserve.JobInfo:
    """Waits for a job, which must succeed, and soon enough."""
    info = job.wait(_ENDS_WITHIN_S)
    info.raise_unless_succeeded()
    return info
