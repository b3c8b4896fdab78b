"""A server is killed in the middle of a job, and started again."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import jacserve
from benchmarks.fast_path.processes import BenchmarkError
from benchmarks.fast_path.rounds import (
    Section,
    alone,
    at_most,
    compared,
    interleaved,
)
from benchmarks.jobs.setting import Setting, finished, mapped

_N = 64
_LOOK_S = 0.01


def measure(setting: Setting) -> Section:
    """Measures kills of the server when half of the points are computed."""
    with setting.serving() as (target, _), jacserve.Client(target) as client:
        # Both servers find its programs in the cache, as one in use does.
        points = mapped(setting.points_file(_N, setting.scale.resume_points))
        job = client.submit_job("layers", points, quantities="jacobian")
        finished(job)
        setting.forget(job)

    def kill() -> Mapping[str, float]:
        with setting.serving() as (target, server), jacserve.Client(target) as client:
            job = client.submit_job("layers", points, quantities="jacobian")
            while (info := job.info()).progress.done_count < len(points) // 2:
                time.sleep(_LOOK_S)
            os.kill(server.pid, signal.SIGKILL)
            server.popen.wait()
        if info.has_ended or info.chunk_size is None:
            raise BenchmarkError(f"{job} ended too early; give it more resume_points")
        [store] = (setting.jobs_dir / "results").iterdir()
        before = _written_at(store)
        start = time.time()
        with setting.serving() as (target, _), jacserve.Client(target) as client:
            listens_s = time.time() - start
            job = client.job(job.id)
            back = job.progress().done_count
            finished(job)
            after = _written_at(store)
            setting.forget(job)
        fresh = {name: at for name, at in after.items() if at != before.get(name)}
        return {
            "listens": listens_s,
            "goes on": min(fresh.values()) - start,
            "again": len(fresh.keys() & before.keys()),
            "chunk": info.chunk_size,
            "lost": max(0, info.progress.done_count - back),
        }

    found = interleaved([kill], setting.effort.rounds, setting.random)
    return Section(
        rows=[
            compared(
                "restart until the job's next chunk",
                "s",
                found["goes on"],
                "until it listens",
                found["listens"],
                None,
            ),
            alone("chunks on the disk computed again", "", found["again"], None),
            alone("points of a chunk", "", found["chunk"], None),
            alone("computed points that were lost", "", found["lost"], at_most(0)),
        ]
    )


def _written_at(store: Path) -> dict[str, float]:
    """Returns when each chunk was written: its flags are the last of it."""
    return {
        path.name: path.stat().st_mtime
        for path in (store / "status").iterdir()
        if path.name.startswith("c")
    }
