"""Interactive calls while a job runs, and the job while there are calls."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import jacserve
from benchmarks.fast_path.processes import BenchmarkError
from benchmarks.fast_path.rounds import (
    Array,
    Row,
    Section,
    alone,
    at_most,
    compared,
    interleaved,
)
from benchmarks.jobs.setting import Setting, mapped
from jacserve import load
from jacserve.jobs import Job

_N = 64
_CALLERS = 8
_WITHIN_S = 120.0
_LOOK_S = 0.02
_MOST_TIMES_IDLE = 3


def measure(setting: Setting) -> Section:
    """Measures calls of n = 3 and n = 128, of one caller and of eight."""
    with (
        setting.serving() as (target, _),
        jacserve.Client(target) as client,
    ):
        x3, x128 = (setting.random.uniform(0.5, 1.5, n).astype("f4") for n in (3, 128))
        loads = {
            "n = 3": _Load(
                lambda: client.evaluate("sphere", x3, quantities="jacobian")
            ),
            "n = 128": _Load(
                lambda: client.evaluate("layer", x128, quantities="jacobian")
            ),
        }
        loads["8 callers, n = 3"] = _Load(loads["n = 3"].call, _CALLERS)
        for each in loads.values():
            each.call()
        with _running_job(setting, client):
            pass  # Compiles what its sizes are found with.
        seconds = setting.effort.seconds

        def idle() -> Mapping[str, float]:
            found: dict[str, float] = {}
            for name, each in loads.items():
                found |= each.figures(f"idle {name}", seconds)
            return found

        def busy() -> Mapping[str, float]:
            found: dict[str, float] = {}
            with _running_job(setting, client) as job:
                found["job alone"] = _rate(job, lambda: time.sleep(seconds))
                for name, each in loads.items():

                    def calls(name: str = name, each: _Load = each) -> None:
                        found.update(each.figures(f"busy {name}", seconds))

                    found[f"job {name}"] = _rate(job, calls)
                info = job.info()
                assert info.batch_size is not None
                point_s = info.progress.execute_s / info.progress.done_count
                found["batch"] = point_s * info.batch_size * 1e3
            return found

        found = interleaved([idle, busy], setting.effort.rounds, setting.random)
    return Section(rows=_rows(found))


@dataclass(frozen=True, slots=True)
class _Load:
    """Callers that call again as soon as they have their answer.

    Attributes:
        call: Makes a call.
        callers: How many they are.
    """

    call: Callable[[], object]
    callers: int = 1

    def figures(self, prefix: str, seconds: float) -> dict[str, float]:
        """Calls for so long; returns percentiles in ms, and calls per second."""
        found = load.run(self.call, callers=self.callers, seconds=seconds)
        if found.error_count:
            raise BenchmarkError(f"calls failed: {found.errors[0]}")
        return {
            f"{prefix} p50": found.latency_s(50) * 1e3,
            f"{prefix} p99": found.latency_s(99) * 1e3,
            f"{prefix} calls": found.calls_per_s,
        }


@contextmanager
def _running_job(setting: Setting, client: jacserve.Client) -> Generator[Job]:
    """Yields a job that has computed its first chunk; deletes it."""
    points = mapped(setting.points_file(_N, setting.scale.load_points))
    job = client.submit_job("layers", points, quantities="jacobian")
    try:
        end = time.monotonic() + _WITHIN_S
        while not job.progress().done_count:
            if time.monotonic() > end:
                raise BenchmarkError(f"{job} has computed nothing in {_WITHIN_S:g} s")
            time.sleep(_LOOK_S)
        yield job
    finally:
        setting.forget(job)


def _rate(job: Job, meanwhile: Callable[[], object]) -> float:
    """Returns the points per second of a job while something else is done."""
    before, start = job.progress().done_count, time.perf_counter()
    meanwhile()
    info = job.info()
    if info.state != "running":
        raise BenchmarkError(f"{job} ended too early; give it more load_points")
    return (info.progress.done_count - before) / (time.perf_counter() - start)


def _rows(found: Mapping[str, Array]) -> list[Row]:
    rows: list[Row] = []
    for name in ("n = 3", "n = 128"):
        idle, busy = f"idle {name}", f"busy {name}"
        allowed = _MOST_TIMES_IDLE * found[f"{idle} p99"] + found["batch"]
        rows += [
            compared(
                f"{name} beside a job, {percentile}",
                "ms",
                found[f"{busy} {percentile}"],
                "idle",
                found[f"{idle} {percentile}"],
                None,
            )
            for percentile in ("p50", "p99")
        ]
        rows.append(
            compared(
                f"{name} beside a job, p99",
                "ms",
                found[f"{busy} p99"],
                "3 times idle, and a batch",
                allowed,
                at_most(1),
            )
        )
    rows.append(alone("one batch of the job", "ms", found["batch"], None))
    eight = "8 callers, n = 3"
    rows.append(
        compared(
            f"{eight}, beside a job",
            "calls/s",
            found[f"busy {eight} calls"],
            "idle",
            found[f"idle {eight} calls"],
            None,
        )
    )
    rows += [
        compared(
            f"the job beside {name if name == eight else f'1 caller, {name}'}",
            "points/s",
            found[f"job {name}"],
            "without calls",
            found["job alone"],
            None,
        )
        for name in ("n = 3", "n = 128", eight)
    ]
    return rows
