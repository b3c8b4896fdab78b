"""1 to 256 concurrent callers of one client, beside as many of an empty call."""

import asyncio
import time
from collections.abc import Callable, Mapping

import numpy as np

import jacserve
from benchmarks.fast_path.processes import BenchmarkError
from benchmarks.fast_path.rounds import (
    Array,
    Grid,
    Section,
    alone,
    at_least,
    at_most,
    compared,
    interleaved,
)
from benchmarks.fast_path.setting import Setting
from jacserve import load

_LEVELS = (1, 4, 16, 64, 256)
_SIZES = (3, 128)
_FIGURES = (
    "calls", "p50", "p99", "errors", "queue", "compile", "execute", "coalesced"
)  # fmt: skip


def measure(setting: Setting) -> Section:
    """Measures calls of n = 3 and n = 128."""
    calls: dict[str, Callable[[], object]] = {"empty": setting.empty}
    for n in _SIZES:
        calls[f"n = {n}"] = _caller(setting, setting.point(n))
    for call in calls.values():
        call()
    measures = [
        _level(name, call, callers, setting.effort.seconds)
        for name, call in calls.items()
        for callers in _LEVELS
    ]
    measures += [
        _task_level(setting, f"n = {n}, tasks", setting.point(n), callers)
        for n in _SIZES
        for callers in _LEVELS
    ]
    found = interleaved(measures, setting.effort.rounds, setting.random)
    return _section(found, [*calls, *(f"n = {n}, tasks" for n in _SIZES)])


def _caller(setting: Setting, x: Array) -> Callable[[], object]:
    return lambda: setting.client.evaluate("layer", x, quantities="jacobian")


def _level(
    name: str, call: Callable[[], object], callers: int, seconds: float
) -> Callable[[], Mapping[str, float]]:
    def measured() -> Mapping[str, float]:
        level = load.run(call, callers=callers, seconds=seconds)
        if not len(level.latencies_s):
            raise BenchmarkError(f"all calls failed: {level.errors[0]}")
        figures = {
            "calls": level.calls_per_s,
            "p50": level.latency_s(50) * 1e3,
            "p99": level.latency_s(99) * 1e3,
            "errors": level.error_count,
        }
        if time := level.server_time:
            figures["queue"] = time.queue_s * 1e3
            figures["compile"] = time.compile_s * 1e3
            figures["execute"] = time.execute_s * 1e3
            figures["coalesced"] = time.coalesced_count
        return {f"{name} {callers} {key}": x for key, x in figures.items()}

    return measured


def _task_level(
    setting: Setting, name: str, x: Array, callers: int
) -> Callable[[], Mapping[str, float]]:
    """The same with tasks for callers, which do not contend for Python's lock."""

    async def measure() -> tuple[list[float], float]:
        async with jacserve.AsyncClient(setting.target) as client:
            await client.jacobian("layer", x)
            start = time.perf_counter()

            latencies_ms: list[float] = []

            async def calling() -> None:
                while (begun := time.perf_counter()) < start + setting.effort.seconds:
                    await client.jacobian("layer", x)
                    latencies_ms.append((time.perf_counter() - begun) * 1e3)

            await asyncio.gather(*(calling() for _ in range(callers)))
            return latencies_ms, time.perf_counter() - start

    def measured() -> Mapping[str, float]:
        latencies_ms, elapsed_s = asyncio.run(measure())
        return {
            f"{name} {callers} calls": len(latencies_ms) / elapsed_s,
            f"{name} {callers} p50": float(np.percentile(latencies_ms, 50)),
            f"{name} {callers} p99": float(np.percentile(latencies_ms, 99)),
        }

    return measured


def _section(found: Mapping[str, Array], names: list[str]) -> Section:
    rows = [
        compared(
            "16 callers, n = 3",
            "calls/s",
            found["n = 3 16 calls"],
            "16 callers of an empty call",
            found["empty 16 calls"],
            at_least(0.75),
        )
    ]
    for name in (f"n = {n}{kind}" for n in _SIZES for kind in (", tasks", "")):
        best = max(_LEVELS, key=lambda level: np.median(found[f"{name} {level} calls"]))
        rows += [
            compared(
                f"{callers} callers, {name}",
                "calls/s",
                found[f"{name} {callers} calls"],
                f"{best} callers, the best",
                found[f"{name} {best} calls"],
                at_least(0.9),
            )
            for callers in (64, 256)
        ]
    rows += [
        compared(
            f"{callers} callers of an empty call",
            "calls/s",
            found[f"empty {callers} calls"],
            "16 callers",
            found["empty 16 calls"],
            None,
        )
        for callers in (64, 256)
    ]
    failed = np.sum([x for name, x in found.items() if "errors" in name], axis=0)
    rows.append(
        alone(
            "calls that failed, 1 to 256 callers",
            "",
            np.sum(failed, axis=0),
            at_most(0),
        )
    )
    curves = {
        name: {
            level: {
                key: float(np.median(found[f"{name} {level} {key}"]))
                for key in _FIGURES
                if f"{name} {level} {key}" in found
            }
            for level in _LEVELS
        }
        for name in names
    }
    lines = [
        [name, str(level), *(_text(key, curve.get(key)) for key in _FIGURES)]
        for name, levels in curves.items()
        for level, curve in levels.items()
    ]
    headings = [
        "call", "callers", "calls/s", "p50 ms", "p99 ms", "failed", "queue ms",
        "compile ms", "execute ms", "coalesced",
    ]  # fmt: skip
    title = "concurrent callers; queue, compile and execute are the server's own time"
    return Section(
        rows=rows, grids=[Grid(title, headings, lines)], curves={"concurrency": curves}
    )


def _text(key: str, figure: float | None) -> str:
    if figure is None:
        return "-"
    if key in {"calls", "errors"}:
        return f"{figure:,.0f}"
    return f"{figure:.1f}" if key == "coalesced" else f"{figure:.3g}"
