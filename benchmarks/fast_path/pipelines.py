"""One caller who does not wait for each answer: submitted calls, and mapped batches."""

import time
from collections.abc import Mapping

from benchmarks.fast_path.rounds import Section, compared, interleaved
from benchmarks.fast_path.setting import Setting

_N = 3
_BATCH, _BATCHES = 512, 64
# They are timed all together, not one by one, and so many take half a second.
_TIMES = 4


def measure(setting: Setting) -> Section:
    """Measures `session.submit` and `client.map` beside calls one after another."""
    client, calls = setting.client, _TIMES * setting.effort.calls
    x = setting.point(_N)
    batches = [setting.point(_BATCH, _N) for _ in range(_BATCHES)]
    with client.session() as session:

        def one_by_one() -> Mapping[str, float]:
            start = time.perf_counter()
            for _ in range(calls):
                session.jacobian("layer", x)
            return {"calls": calls / (time.perf_counter() - start)}

        def submitted() -> Mapping[str, float]:
            start = time.perf_counter()
            futures = [
                session.submit("layer", x, quantities="jacobian") for _ in range(calls)
            ]
            for future in futures:
                future.result()
            return {"submitted": calls / (time.perf_counter() - start)}

        def batch_by_batch() -> Mapping[str, float]:
            start = time.perf_counter()
            for batch in batches:
                client.jacobian("layer", batch)
            return {"batches": _BATCHES * _BATCH / (time.perf_counter() - start)}

        def mapped() -> Mapping[str, float]:
            start = time.perf_counter()
            for _ in client.map("layer", batches, quantities="jacobian"):
                pass
            return {"mapped": _BATCHES * _BATCH / (time.perf_counter() - start)}

        measures = [one_by_one, submitted, batch_by_batch, mapped]
        for warm_up in measures:
            warm_up()
        found = interleaved(measures, setting.effort.rounds, setting.random)
    return Section(
        rows=[
            compared(
                "n = 3, submitted to a session",
                "calls/s",
                found["submitted"],
                "one by one in a session",
                found["calls"],
                None,
            ),
            compared(
                f"n = 3, batches of {_BATCH} by client.map",
                "points/s",
                found["mapped"],
                "batch by batch",
                found["batches"],
                None,
            ),
        ]
    )
