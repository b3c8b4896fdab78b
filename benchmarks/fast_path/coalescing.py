"""Waiting points computed together, beside the same one by one: two servers.

They differ in `max_coalesced` alone. Of one function many points at once take little
more time than one, of the other they do not; the server is to find out by itself, and
never to be slower for it.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import numpy as np
from benchmarks.fast_path.processes import BenchmarkError, Process, serving
from benchmarks.fast_path.rounds import (
    Grid,
    Row,
    Section,
    at_least,
    compared,
    interleaved,
)
from benchmarks.fast_path.setting import Setting
from benchmarks.fast_path.warmed_functions import MOST_POINTS, SIZES

import jacserve
from jacserve import load

_MODULE = "benchmarks.fast_path.warmed_functions"
_CALLERS = (16, 64)
# Less is noise between two servers that do the same.
_NOT_SLOWER = 0.95
_LONGEST_START_S = 120.0
# What the server logs once it has timed a function.
_DECISION = re.compile(r"functions/(\w+)\S*: up to (\d+) points are computed together")


def measure(setting: Setting) -> Section:
    """Measures concurrent callers of both functions on both servers."""
    with ExitStack() as stack:
        measures: list[Callable[[], Mapping[str, float]]] = []
        points = {name: setting.point(n) for name, n in SIZES.items()}
        for label, most in (("alone", 1), ("together", MOST_POINTS)):
            target, server = stack.enter_context(
                serving(
                    setting.device,
                    setting.cache_dir,
                    functions=_MODULE,
                    max_coalesced=most,
                )
            )
            if most > 1:
                print(_wait_until_measured(server))
            client = stack.enter_context(jacserve.Client(target))
            for name, x in points.items():
                client.jacobian(name, x)
                measures += [
                    _level(client, name, x, label, callers, setting)
                    for callers in _CALLERS
                ]
        found = interleaved(measures, setting.effort.rounds, setting.random)
    rows: list[Row] = []
    lines: list[list[str]] = []
    for name, n in SIZES.items():
        for callers in _CALLERS:
            key = f"{name} {callers}"
            rows.append(
                compared(
                    f"{name}, n = {n}, {callers} callers, coalesced",
                    "calls/s",
                    found[f"{key} together"],
                    "one by one",
                    found[f"{key} alone"],
                    at_least(_NOT_SLOWER),
                )
            )
            means = (
                np.median(found[f"{key} {label} coalesced"])
                for label in ("alone", "together")
            )
            lines.append([name, str(callers), *(f"{mean:.1f}" for mean in means)])
    headings = [
        "function",
        "callers",
        "max_coalesced 1",
        f"max_coalesced {MOST_POINTS}",
    ]
    return Section(
        rows=rows, grids=[Grid("calls that one run answered, means", headings, lines)]
    )


def _wait_until_measured(server: Process) -> dict[str, str]:
    """Waits until the server knows of each function how many points at once win."""
    end = time.monotonic() + _LONGEST_START_S
    while True:
        found = dict(_DECISION.findall(server.log_text()))
        if len(found) == len(SIZES):
            return found
        if time.monotonic() > end:
            raise BenchmarkError(f"nothing was timed:\n{server.log_text()}")
        time.sleep(0.1)


def _level(
    client: jacserve.Client,
    name: str,
    x: np.ndarray,
    label: str,
    callers: int,
    setting: Setting,
) -> Callable[[], Mapping[str, float]]:
    key = f"{name} {callers} {label}"

    def measured() -> Mapping[str, float]:
        level = load.run(
            lambda: client.evaluate(name, x, quantities="jacobian"),
            callers=callers,
            seconds=setting.effort.seconds,
        )
        if level.errors:
            raise BenchmarkError(level.errors[0])
        server = level.server_time
        return {
            key: level.calls_per_s,
            f"{key} coalesced": server.coalesced_count if server else 1.0,
        }

    return measured
