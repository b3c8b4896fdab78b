"""Jobs beside loops in one process that compute the same batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jacserve
from benchmarks.fast_path.processes import Process, running
from benchmarks.fast_path.report import number
from benchmarks.fast_path.rounds import (
    Array,
    Grid,
    Row,
    Section,
    at_least,
    compared,
    interleaved,
    seconds_of,
)
from benchmarks.jobs.cases import CASES, Case, cotangent
from benchmarks.jobs.setting import Setting, finished, mapped
from jacserve.jobs import Job

_LOOP = "benchmarks.jobs.loop"
# What is compared, and the key of its seconds.
_WAYS: Mapping[str, str] = {
    "discard": "a loop that keeps nothing",
    "memory": "a loop into one array",
    "store": "a loop into a Zarr store",
}
_MOST_KEPT_BYTES = 2 * 10**9
# A difference of two times may come out as none at all, or less.
_LEAST_S = 1e-6
_HEADINGS = (
    "", "points", "batch", "chunk", "upload s", "queue s", "job s", "of it fixed s",
    *(f"{way} s" for way in _WAYS),
)  # fmt: skip


def measure(setting: Setting) -> Section:
    """Measures each function and quantity, one after another."""
    rows: list[Row] = []
    lines: list[list[str]] = []
    with (
        setting.serving() as (target, _),
        jacserve.Client(target) as client,
        running(_LOOP) as loop,
    ):
        for case in CASES.values():
            measured = _Measured.of(setting, client, loop, case)
            found = measured.all()
            rows += _rows(case, measured.count, found)
            lines.append(_line(measured, found))
    title = "seconds of throughput; medians. A job's are from its start to its end"
    return Section(rows=rows, grids=[Grid(title, _HEADINGS, lines)])


@dataclass(frozen=True, slots=True)
class _Measured:
    """A case, and what measures it.

    Attributes:
        setting: Where it is measured.
        client: Submits jobs.
        loop: The process of the loops.
        case: What is computed.
        path: The file of the points.
        count: How many they are.
        batch_size: How many are computed at once.
        chunk_size: How many are kept at once.
        result_bytes: What the results take.
    """

    setting: Setting
    client: jacserve.Client
    loop: Process
    case: Case
    path: Path
    count: int
    batch_size: int
    chunk_size: int
    result_bytes: int

    @classmethod
    def of(
        cls, setting: Setting, client: jacserve.Client, loop: Process, case: Case
    ) -> "_Measured":
        """Warms a case up: a small job finds its sizes, and compiles its program."""
        scale = setting.scale
        count = scale.heavy_points if case.is_heavy else scale.points
        path = setting.points_file(case.n, count, case.dtype)
        job = submitted(client, case, mapped(path, count // 4), None)
        info = finished(job)
        assert info.batch_size is not None
        assert info.chunk_size is not None
        outputs = getattr(job.read(0, 1), case.quantity)
        row_bytes = sum(np.asarray(each).nbytes for each in outputs)
        setting.forget(job)
        return cls(
            setting=setting,
            client=client,
            loop=loop,
            case=case,
            path=path,
            count=count,
            batch_size=info.batch_size,
            chunk_size=info.chunk_size,
            result_bytes=row_bytes * count,
        )

    def all(self) -> dict[str, Array]:
        """Measures jobs and loops in turn; returns seconds by name."""
        measures = [self._whole_job, self._part_of_job]
        measures += [self._loop(way) for way in _WAYS if self._has(way)]
        effort = self.setting.effort
        return interleaved(measures, effort.rounds, self.setting.random)

    def _has(self, way: str) -> bool:
        return way != "memory" or self.result_bytes <= _MOST_KEPT_BYTES

    def _whole_job(self) -> Mapping[str, float]:
        return self._job(self.count, "")

    def _part_of_job(self) -> Mapping[str, float]:
        return self._job(self.count // 4, "part ")

    def _job(self, count: int, prefix: str) -> Mapping[str, float]:
        jobs: list[Job] = []

        def submit() -> None:
            points = mapped(self.path, count)
            jobs.append(submitted(self.client, self.case, points, self.batch_size))

        upload_s = seconds_of(submit)
        [job] = jobs
        info = finished(job)
        assert info.created is not None
        assert info.started is not None
        assert info.ended is not None
        self.setting.forget(job)
        return {
            f"{prefix}upload": upload_s,
            f"{prefix}queue": (info.started - info.created).total_seconds(),
            f"{prefix}job": (info.ended - info.started).total_seconds(),
        }

    def _loop(self, way: str) -> Any:
        def measured() -> Mapping[str, float]:
            seconds = self.loop.ask(
                way=way,
                case=self.case.label,
                points=str(self.path),
                batch_size=self.batch_size,
                chunk_size=self.chunk_size,
                folder=str(self.setting.folder),
            )
            return {way: seconds}

        return measured


def submitted(
    client: jacserve.Client, case: Case, points: np.ndarray, batch_size: int | None
) -> Job:
    """Submits the job of a case.

    Args:
        client: A client of a server of `functions.py`.
        case: What to compute.
        points: The points.
        batch_size: How many to compute at once; None to have that measured.

    Returns:
        The job.
    """
    options: Any = {}
    if case.quantity == "vjp":
        options["cotangents"] = cotangent(case.n)
    return client.submit_job(
        case.function,
        points,
        quantities=case.quantity,
        batch_size=batch_size,
        **options,
    )


def _variable_s(found: Mapping[str, Array]) -> Array:
    """Returns the seconds of three quarters of the points, with no fixed cost."""
    return np.maximum(found["job"] - found["part job"], _LEAST_S)


def _rows(case: Case, count: int, found: Mapping[str, Array]) -> list[Row]:
    rates = {way: count / found[way] for way in _WAYS if way in found}
    rows = [
        compared(
            case.label,
            "points/s",
            count / found["job"],
            _WAYS[way],
            rate,
            at_least(case.goal) if way == "discard" else None,
        )
        for way, rate in rates.items()
    ]
    rows.append(
        compared(
            f"{case.label}, no fixed cost",
            "points/s",
            0.75 * count / _variable_s(found),
            _WAYS["discard"],
            rates["discard"],
            None,
        )
    )
    return rows


def _line(measured: _Measured, found: Mapping[str, Array]) -> list[str]:
    seconds = {name: float(np.median(each)) for name, each in found.items()}
    fixed_s = float(np.median(found["job"] - _variable_s(found) / 0.75))
    return [
        measured.case.label,
        f"{measured.count:,}",
        f"{measured.batch_size:,}",
        f"{measured.chunk_size:,}",
        number(seconds["upload"]),
        number(seconds["queue"]),
        number(seconds["job"]),
        number(fixed_s),
        *(number(seconds[way]) if way in seconds else "-" for way in _WAYS),
    ]
