"""One caller: calls of several sizes beside an empty call and the compiled program.

The calls take turns one by one, so that each is as cold or warm as the others. The
compiled programs of the other process run while nothing else does.
"""

from collections.abc import Mapping

import numpy as np

from benchmarks.fast_path.rounds import (
    Array,
    Row,
    Section,
    at_least,
    at_most,
    compared,
    interleaved,
    mixed_seconds,
)
from benchmarks.fast_path.setting import Setting

_BATCH = 512
_LARGE_REPEATS = 10


def measure(setting: Setting) -> Section:
    """Measures calls of n = 3, 128 and 1024, and a batch of 512 points."""
    client, effort = setting.client, setting.effort
    x = {n: setting.point(n) for n in (3, 128, 1024)}
    points = setting.point(_BATCH, 3)
    with client.session() as session:
        small = {
            "empty": setting.empty,
            "n=3": lambda: client.jacobian("layer", x[3]),
            "n=3 session": lambda: session.jacobian("layer", x[3]),
            "n=128": lambda: client.jacobian("layer", x[128]),
            "batch": lambda: client.jacobian("layer", points),
        }
        large = {"n=1024": lambda: client.jacobian("layer", x[1024])}

        def small_calls() -> Mapping[str, float]:
            return _medians(mixed_seconds(small, effort.calls, setting.random))

        def large_calls() -> Mapping[str, float]:
            return _medians(mixed_seconds(large, _LARGE_REPEATS, setting.random))

        def in_process() -> Mapping[str, float]:
            ask = setting.in_process_s
            return {
                "in process n=128": ask("layer", 128, repeats=effort.calls),
                "in process n=1024": ask("layer", 1024, repeats=_LARGE_REPEATS),
                "in process batch": ask("layer", 3, batch=_BATCH, repeats=effort.calls),
            }

        for call in [*small.values(), *large.values()]:
            call()  # Compiles, and connects.
        in_process()
        found = interleaved(
            [small_calls, large_calls, in_process], effort.rounds, setting.random
        )
    return Section(rows=_rows(found))


def _medians(seconds: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(np.median(each)) for name, each in seconds.items()}


def _rows(found: Mapping[str, Array]) -> list[Row]:
    ms = {name: seconds * 1e3 for name, seconds in found.items()}
    single, batch = 1 / found["n=3"], _BATCH / found["batch"]
    return [
        compared(
            "n = 3, p50", "ms", ms["n=3"], "empty call", ms["empty"], at_most(1.35)
        ),
        compared(
            "n = 3 in a session, p50",
            "ms",
            ms["n=3 session"],
            "a call each",
            ms["n=3"],
            at_most(0.65),
        ),
        compared(
            "n = 128, p50",
            "ms",
            ms["n=128"],
            "empty call + in process",
            ms["empty"] + ms["in process n=128"],
            at_most(1.3),
        ),
        compared(
            "n = 1024, p50",
            "ms",
            ms["n=1024"],
            "in process",
            ms["in process n=1024"],
            at_most(1.4),
        ),
        compared(
            f"n = 3, {_BATCH} points in a call",
            "points/s",
            batch,
            "a point in a call",
            single,
            at_least(300),
        ),
        compared(
            f"n = 3, {_BATCH} points in a call",
            "points/s",
            batch,
            "in process, vmap",
            _BATCH / found["in process batch"],
            at_least(0.5),
        ),
        compared(
            f"n = 3, {_BATCH} points in a call",
            "points/s",
            batch,
            "empty call + in process, vmap",
            _BATCH / (found["empty"] + found["in process batch"]),
            None,
        ),
    ]
