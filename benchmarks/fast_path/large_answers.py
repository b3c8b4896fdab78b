"""What a 64 MiB answer costs beside its time: memory, and other clients' patience.

A server and a client of their own do nothing else, so that what they keep of other
calls is not mistaken for what this one needs. The answer has a Jacobian for each of
many points, because a program for one large Jacobian works in chunks and needs as much
memory again, which would be mistaken for what it takes to send it.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import numpy as np

import jacserve
from benchmarks.fast_path.floors import RawSocket
from benchmarks.fast_path.processes import memory_bytes, reset_peak, running, serving
from benchmarks.fast_path.rounds import (
    Section,
    alone,
    at_most,
    compared,
    interleaved,
)
from benchmarks.fast_path.setting import Setting

_CLIENT = "benchmarks.fast_path.other_client"
_FLOORS = "benchmarks.fast_path.floors"
_SHAPE = (1024, 128)
_BYTES = 2**26
_MIB = 2**20


def measure(setting: Setting) -> Section:
    """Measures peaks of memory, and pings beside downloads."""
    with ExitStack() as stack:
        target, server = stack.enter_context(serving(setting.device, setting.cache_dir))
        downloading = stack.enter_context(running(_CLIENT, target))
        pinging = stack.enter_context(running(_CLIENT, target))
        client = stack.enter_context(jacserve.Client(target))
        points = np.full(_SHAPE, 0.5, "f4")
        raw = stack.enter_context(running(_FLOORS, "socket"))
        socket = RawSocket(raw.address(), _BYTES)
        stack.callback(socket.close)
        ping_s = 4 * setting.effort.seconds

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

        def beside(transfer: Callable[[], object]) -> float:
            pinging.send(ping_s=ping_s)
            end = time.perf_counter() + ping_s
            while time.perf_counter() < end:
                transfer()
            return _p99_ms(pinging.answer())

        def downloads() -> Mapping[str, float]:
            return {"downloads": beside(lambda: client.jacobian("wave", points))}

        def raw_transfers() -> Mapping[str, float]:
            return {"raw transfers": beside(lambda: socket.receive(_BYTES))}

        measures = [memory, idle, downloads, raw_transfers]
        for warm_up in [memory, *measures]:
            warm_up()
        found = interleaved(measures, setting.effort.rounds, setting.random)
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
                found["downloads"],
                "idle",
                found["idle"],
                at_most(5),
            ),
            compared(
                "another client's empty call meanwhile, p99",
                "ms",
                found["downloads"],
                "beside a raw TCP socket",
                found["raw transfers"],
                None,
            ),
        ]
    )


def _p99_ms(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) * 1e3
