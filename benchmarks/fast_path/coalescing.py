"""Waiting points computed together, beside the same one by one: two servers.

They differ in `max_coalesced` alone. Of some functions many points at once take little
more time than one, of others they do not; the server is to find out by itself, and
never to be slower for it.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

import numpy as np

import jacserve
from benchmarks.fast_path.processes import BenchmarkError, Process, serving
from benchmarks.fast_path.rounds import (
    Array,
    Grid,
    Row,
    Section,
    at_least,
    compared,
    interleaved,
)
from benchmarks.fast_path.setting import Setting
from jacserve import load

# The functions, and n of each: two that win, and one that does not.
SIZES = {"network": 64, "layer": 128, "orbit": 64}
MOST_POINTS = 64

_MODULE = "benchmarks.fast_path.warmed_functions"
_CALLERS = (16, 64)
# Less is noise between two servers that do the same.
_NOT_SLOWER = 0.95
_LONGEST_START_S = 120.0
# What the server logs once it has timed a function.
_DECISION = re.compile(r"functions/(\w+)\S*: up to (\d+) points are computed together")


def measure(setting: Setting) -> Section:
    """Measures concurrent callers of each function on both servers."""
    with ExitStack() as stack:
        alone = stack.enter_context(_server(setting, 1))
        together = stack.enter_context(_server(setting, MOST_POINTS))
        largest = _wait_until_measured(together[1])
        measures: list[Callable[[], Mapping[str, float]]] = []
        for label, (target, _) in (("alone", alone), ("together", together)):
            client = stack.enter_context(jacserve.Client(target))
            for name, n in SIZES.items():
                x = setting.point(n)
                client.jacobian(name, x)
                measures += [
                    _level(client, name, x, label, callers, setting)
                    for callers in _CALLERS
                ]
        found = interleaved(measures, setting.effort.rounds, setting.random)
    keys = [(name, callers) for name in SIZES for callers in _CALLERS]
    lines = [
        [
            name,
            largest[name],
            str(callers),
            f"{np.median(found[f'{name} {callers} together coalesced']):.1f}",
        ]
        for name, callers in keys
    ]
    title = "points that the server computes together, where it found that faster"
    headings = ["function", "at most", "callers", "calls in one run, mean"]
    return Section(
        rows=[_row(found, name, callers) for name, callers in keys],
        grids=[Grid(title, headings, lines)],
    )


def _server(setting: Setting, most: int) -> AbstractContextManager[tuple[str, Process]]:
    return serving(
        setting.device, setting.cache_dir, functions=_MODULE, max_coalesced=most
    )


def _row(found: Mapping[str, Array], name: str, callers: int) -> Row:
    return compared(
        f"{name}, n = {SIZES[name]}, {callers} callers, coalesced",
        "calls/s",
        found[f"{name} {callers} together"],
        "one by one",
        found[f"{name} {callers} alone"],
        at_least(_NOT_SLOWER),
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
