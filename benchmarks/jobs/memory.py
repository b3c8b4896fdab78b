"""How much memory a job takes, of its server and of its client."""

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import numpy as np

import jacserve
from benchmarks.fast_path.processes import (
    Process,
    memory_bytes,
    reset_peak,
    running,
)
from benchmarks.fast_path.rounds import Grid, Section, alone, at_most
from benchmarks.jobs.setting import Setting

_CLIENT = "benchmarks.jobs.job_client"
_BATCH = 8192
_SAMPLE_S = 0.02
_MIB = 2**20
# What an allocator keeps differs so much from one process to the next.
_MOST_GROWTH_MIB = 32
_HEADINGS = (
    "points", "server peak", "server anonymous", "client peak", "client anonymous"
)  # fmt: skip


def measure(setting: Setting) -> Section:
    """Measures jobs of sizes that grow, each with new processes."""
    sizes = setting.scale.memory_points
    found = {count: _above_idle_mib(setting, sizes[0], count) for count in sizes}
    # A small job does not fill the buffers that all others share.
    *_, fewer, more = sizes
    rows = [
        alone(
            f"{who} memory of {more - fewer:,} more points",
            "MiB",
            np.array([found[more][who_has] - found[fewer][who_has]]),
            at_most(_MOST_GROWTH_MIB),
        )
        for who in ("server", "client")
        for who_has in [f"{who} anonymous"]
    ]
    lines = [
        [f"{count:,}", *(f"{mib:,.0f}" for mib in above.values())]
        for count, above in found.items()
    ]
    title = "MiB at most above idle; peak also counts files that are mapped"
    return Section(rows=rows, grids=[Grid(title, _HEADINGS, lines)])


def _above_idle_mib(
    setting: Setting, warm_up_count: int, count: int
) -> Mapping[str, float]:
    """Returns what server and client take at most, in the order of the headings."""
    with (
        setting.serving() as (target, server),
        running(_CLIENT, target) as job_client,
        jacserve.Client(target) as client,
    ):
        processes = {"server": server, "client": job_client}
        _run(setting, client, job_client, warm_up_count)
        idle: dict[str, int] = {}
        for who, process in processes.items():
            reset_peak(process.pid)
            idle[f"{who} peak"] = memory_bytes(process.pid, "VmRSS")
            idle[f"{who} anonymous"] = memory_bytes(process.pid, "RssAnon")
        with _sampled(processes) as most:
            _run(setting, client, job_client, count)
        for who, process in processes.items():
            most[f"{who} peak"] = memory_bytes(process.pid, "VmHWM")
    return {name: (most[name] - before) / _MIB for name, before in idle.items()}


def _run(
    setting: Setting, client: jacserve.Client, job_client: Process, count: int
) -> None:
    saved = setting.folder / "saved.npy"
    points = setting.points_file(3, count)
    job_id = job_client.ask(points=str(points), save=str(saved), batch_size=_BATCH)
    saved.unlink()
    setting.forget(client.job(job_id))


@contextmanager
def _sampled(processes: Mapping[str, Process]) -> Generator[dict[str, int]]:
    """Yields the most anonymous memory of processes, which grows during the block."""
    most = {f"{who} anonymous": 0 for who in processes}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            for who, process in processes.items():
                name = f"{who} anonymous"
                most[name] = max(most[name], memory_bytes(process.pid, "RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
