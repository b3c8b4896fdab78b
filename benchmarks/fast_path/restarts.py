"""First answers after a start, with an empty cache of programs and with a full one."""

import tempfile
import time
from collections.abc import Mapping

import numpy as np

import jacserve
from benchmarks.fast_path.processes import serving
from benchmarks.fast_path.rounds import Section, at_most, compared, interleaved
from benchmarks.fast_path.setting import Setting

_FUNCTIONS = ("layer", "wave", "orbit")
_N = 64


def measure(setting: Setting) -> Section:
    """Measures pairs of starts: one with a new cache, and one after it."""
    x = setting.point(_N)

    def start(cache_dir: str, label: str) -> dict[str, float]:
        begin = time.perf_counter()
        with serving(setting.device, cache_dir) as (target, _):
            ready = time.perf_counter()
            with jacserve.Client(target) as client:
                client.functions()  # Connects.
                connected = time.perf_counter()
                for function in _FUNCTIONS:
                    client.jacobian(function, x)
            end = time.perf_counter()
        return {
            f"{label} answers": end - connected,
            f"{label} all": end - begin - (connected - ready),
        }

    def pair() -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(prefix="jacserve-bench-") as cache_dir:
            return {**start(cache_dir, "cold"), **start(cache_dir, "warm")}

    found = interleaved([pair], setting.effort.rounds, setting.random)
    ms = {name: np.array(seconds) * 1e3 for name, seconds in found.items()}
    return Section(
        rows=[
            compared(
                "first answers after a restart",
                "ms",
                ms["warm answers"],
                "with an empty cache",
                ms["cold answers"],
                at_most(0.35),
            ),
            compared(
                "the same, from the process's start",
                "ms",
                ms["warm all"],
                "with an empty cache",
                ms["cold all"],
                None,
            ),
        ]
    )
