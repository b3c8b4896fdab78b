"""Points per second against the points in one call, beside the same in process."""

from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.fast_path.rounds import Grid, Section, interleaved, seconds_of
from benchmarks.fast_path.setting import Setting

_FUNCTIONS = ("layer", "orbit")
_N = 3
_BATCHES = tuple(4**power for power in range(9))
# Fewer where a call takes long.
_REPEATS, _LARGE, _LARGE_REPEATS = 10, 4096, 3


def measure(setting: Setting) -> Section:
    """Measures batches of 1 to 65536 points."""
    measures: list[Callable[[], Mapping[str, float]]] = [
        _pair(setting, function, batch) for function in _FUNCTIONS for batch in _BATCHES
    ]
    for warm_up in measures:
        warm_up()
    found = interleaved(measures, setting.effort.rounds, setting.random)
    curves = {
        f"{function}, {way}": {
            batch: float(np.median(batch / found[f"{function} {batch} {way}"]))
            for batch in _BATCHES
        }
        for function in _FUNCTIONS
        for way in ("server", "in process")
    }
    lines = [
        [str(batch), *(f"{curve[batch]:,.0f}" for curve in curves.values())]
        for batch in _BATCHES
    ]
    title = f"points/s against the points in one call, n = {_N}"
    return Section(
        grids=[Grid(title, ["points", *curves], lines)], curves={"batch": curves}
    )


def _pair(
    setting: Setting, function: str, batch: int
) -> Callable[[], Mapping[str, float]]:
    points = setting.point(batch, _N)
    repeats = _REPEATS if batch < _LARGE else _LARGE_REPEATS

    def measured() -> Mapping[str, float]:
        server = [
            seconds_of(lambda: setting.client.jacobian(function, points))
            for _ in range(repeats)
        ]
        in_process = setting.in_process_s(function, _N, batch=batch, repeats=repeats)
        return {
            f"{function} {batch} server": float(np.median(server)),
            f"{function} {batch} in process": in_process,
        }

    return measured
