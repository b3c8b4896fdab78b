"""What a 64 MiB answer costs beside its time: memory, and other clients' patience.

A server and a client of their own do nothing else, so that what they keep of other
calls is not mistaken for what this one needs. The answer has a Jacobian for each of
many points, because a program for one large Jacobian works in chunks and needs as much
memory again, which would be mistaken for what it takes to send it.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
from benchmarks.fast_path.processes import memory_bytes, reset_peak, running, serving
from benchmarks.fast_path.rounds import (
    Section,
    alone,
    at_most,
    compared,
    interleaved,
)
from benchmarks.fast_path.setting import Setting

import jacserve

_CLIENT = "benchmarks.fast_path.other_client"
_SHAPE = (1024, 128)
_MIB = 2**20


def measure(setting: Setting) -> Section:
    """Measures peaks of memory, and pings beside downloads."""
    with ExitStack() as stack:
        target, server = stack.enter_context(serving(setting.device, setting.cache_dir))
        downloading = stack.enter_context(running(_CLIENT, target))
        pinging = stack.enter_context(running(_CLIENT, target))
        client = stack.enter_context(jacserve.Client(target))
        points = np.full(_SHAPE, 0.5, "f4")
        ping_s = 3 * setting.effort.seconds

        def memory() -> Mapping[str, float]:
            reset_peak(server.pid)
            before = memory_bytes(server.pid, "VmRSS")
            found = downloading.ask(download=_SHAPE)
            peak = memory_bytes(server.pid, "VmHWM")
            return {
                "server": (peak - before - found["result"]) / _MIB,
                "client": (found["peak"] - found["before"] - found["result"]) / _MIB,
            }

        def idle() -> Mapping[str, float]:
            return {"idle": _p99_ms(pinging.ask(ping_s=ping_s))}

        def busy() -> Mapping[str, float]:
            pinging.send(ping_s=ping_s)
            end = time.perf_counter() + ping_s
            while time.perf_counter() < end:
                client.jacobian("wave", points)
            return {"busy": _p99_ms(pinging.answer())}

        for warm_up in (memory, memory, idle, busy):
            warm_up()
        found = interleaved([memory, idle, busy], setting.effort.rounds, setting.random)
    return Section(
        rows=[
            alone(
                "64 MiB of Jacobians: server memory above it",
                "MiB",
                found["server"],
                at_most(16),
            ),
            alone(
                "64 MiB of Jacobians: client memory above it",
                "MiB",
                found["client"],
                at_most(16),
            ),
            compared(
                "another client's empty call meanwhile, p99",
                "ms",
                found["busy"],
                "idle",
                found["idle"],
                at_most(5),
            ),
        ]
    )


def _p99_ms(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) * 1e3
