"""Large arrays both ways, beside one plain message, a raw socket and memcpy.

Downloads are batches of Jacobians [128, 128] of an elementwise function, uploads inputs
of a sum of squares. The time in which the server queued, compiled and executed is
subtracted, so that a transfer is compared with a transfer; it is printed beside.
Nothing is compressed anywhere, so zeros are as long under way as other numbers.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import grpc
import numpy as np

import jacserve
from benchmarks.fast_path.floors import RawSocket
from benchmarks.fast_path.processes import running
from benchmarks.fast_path.rounds import (
    Array,
    Grid,
    Section,
    alone,
    at_least,
    compared,
    interleaved,
    seconds_of,
)
from benchmarks.fast_path.setting import Setting
from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc

_FLOORS = "benchmarks.fast_path.floors"
_N = 128
_SIZES = tuple(2**power for power in range(16, 29, 2))
_OF_TARGETS = 2**26
# A plain message of 256 MiB takes many seconds.
_LARGEST_PLAIN = 2**26
# Small transfers are repeated until so much was sent, and the median counts.
_BYTES_EACH, _MOST_REPEATS = 2**24, 20


def measure(setting: Setting) -> Section:
    """Measures sizes from 64 KiB to 256 MiB."""
    with ExitStack() as stack:
        plain = stack.enter_context(running(_FLOORS, "protobuf"))
        raw = stack.enter_context(running(_FLOORS, "socket"))
        channel = stack.enter_context(
            grpc.insecure_channel(
                plain.address(), options=[("grpc.max_receive_message_length", -1)]
            )
        )
        stub = pb_grpc.JacobianServiceStub(channel)
        socket = RawSocket(raw.address(), max(_SIZES))
        stack.callback(socket.close)
        measures: list[Callable[[], Mapping[str, float]]] = []
        for size in _SIZES:
            measures += [
                _download(setting, size),
                _upload(setting, size),
                _from_socket(socket, size),
                _memcpy(size),
            ]
            if size <= _LARGEST_PLAIN:
                measures.append(_plain(stub, size))
        for warm_up in measures:
            warm_up()
        found = interleaved(measures, setting.effort.rounds, setting.random)
    return _section(found)


def _download(setting: Setting, size: int) -> Callable[[], Mapping[str, float]]:
    points = setting.point(size // (_N * _N * 4), _N)

    def measured() -> Mapping[str, float]:
        return _transfer(
            f"download {size}",
            size,
            lambda: setting.client.evaluate("wave", points, quantities="jacobian"),
        )

    return measured


def _upload(setting: Setting, size: int) -> Callable[[], Mapping[str, float]]:
    x = setting.point(size // 4)

    def measured() -> Mapping[str, float]:
        return _transfer(
            f"upload {size}",
            size,
            lambda: setting.client.evaluate("total", x, quantities="value"),
        )

    return measured


def _transfer(
    name: str, size: int, call: Callable[[], jacserve.Result]
) -> dict[str, float]:
    """Returns the seconds of the whole call, of the server's work, and of the rest."""
    whole, work = [], []
    for _ in range(_repeats(size)):
        start = time.perf_counter()
        timing = call().timing
        whole.append(time.perf_counter() - start)
        work.append(timing.queue_s + timing.compile_s + timing.execute_s)
    return {
        f"{name} whole": float(np.median(whole)),
        f"{name} work": float(np.median(work)),
        name: float(np.median(np.subtract(whole, work))),
    }


def _from_socket(socket: RawSocket, size: int) -> Callable[[], Mapping[str, float]]:
    return _repeated(f"raw socket {size}", size, lambda: socket.receive(size))


def _plain(
    stub: pb_grpc.JacobianServiceStub, size: int
) -> Callable[[], Mapping[str, float]]:
    def fetch() -> Array:
        result = stub.Evaluate(pb.Query(function=str(size)))
        return np.frombuffer(result.outputs[0].tensor.data, "f4")

    return _repeated(f"plain message {size}", size, fetch)


def _memcpy(size: int) -> Callable[[], Mapping[str, float]]:
    source, goal = np.ones((2, size // 4), "f4")
    return _repeated(f"memcpy {size}", size, lambda: np.copyto(goal, source))


def _repeated(
    name: str, size: int, call: Callable[[], object]
) -> Callable[[], Mapping[str, float]]:
    def measured() -> Mapping[str, float]:
        seconds = [seconds_of(call) for _ in range(_repeats(size))]
        return {name: float(np.median(seconds))}

    return measured


def _repeats(size: int) -> int:
    return min(max(_BYTES_EACH // size, 1), _MOST_REPEATS)


def _section(found: Mapping[str, Array]) -> Section:
    def rate(way: str, size: int = _OF_TARGETS) -> Array:
        return size / found[f"{way} {size}"] / 1e9

    ours, plain, raw = (
        rate(way) for way in ("download", "plain message", "raw socket")
    )
    mib = f"{_text(_OF_TARGETS)} of Jacobians"
    rows = [
        compared(mib, "GB/s", ours, "one plain message", plain, at_least(5)),
        compared(mib, "GB/s", ours, "raw TCP socket", raw, at_least(0.6)),
        alone(
            f"{mib}: server's work, subtracted",
            "ms",
            found[f"download {_OF_TARGETS} work"] * 1e3,
            None,
        ),
    ]
    ways = ("download", "upload", "plain message", "raw socket", "memcpy")
    curves = {
        way: {
            size: float(np.median(rate(way, size)))
            for size in _SIZES
            if f"{way} {size}" in found
        }
        for way in ways
    }
    lines: list[list[str]] = []
    for size in _SIZES:
        rates = [curves[way].get(size) for way in ways]
        parts = [
            np.median(found[f"{way} {size} {part}"]) * 1e3
            for way in ("download", "upload")
            for part in ("whole", "work")
        ]
        lines.append(
            [
                _text(size),
                *("-" if rate is None else f"{rate:.3f}" for rate in rates),
                *(f"{part:.2f}" for part in parts),
            ]
        )
    headings = ["size", *ways, "download ms", "of it work", "upload ms", "of it work"]
    return Section(
        rows=rows,
        grids=[Grid("GB/s of a transfer, without the server's work", headings, lines)],
        curves={"transfer": curves},
    )


def _text(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
