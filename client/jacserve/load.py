"""Closed-loop load: callers that each call again as soon as they have their answer.

`run` makes the calls in threads and returns a `Load`: how long each call took, and what
the server said of where its time went. Nothing is printed here, and nothing knows what
is called, so that an empty call is measured by the same loop as one that works.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from jacserve.errors import JacobianError
from jacserve.results import Result
from jacserve.tensors import Array

# A caller whose calls fail this often in a row gives up: the server may be gone.
_MOST_FAILURES_IN_A_ROW = 10
_MOST_MESSAGES = 5


@dataclass(frozen=True, slots=True)
class ServerTime:
    """Where the server's time went: means over the calls that it answered.

    Attributes:
        queue_s: Seconds of waiting for a free device thread.
        compile_s: Seconds of waiting for the program to be compiled.
        execute_s: Seconds of running the program.
        coalesced_count: Calls that one run of the program answered.
    """

    queue_s: float
    compile_s: float
    execute_s: float
    coalesced_count: float


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What some callers measured.

    Attributes:
        callers: How many called at the same time.
        elapsed_s: Seconds from the first call to the last answer.
        latencies_s: Seconds that each answered call took, [k].
        server: For each answered call seconds of queueing, compiling and executing,
            and the calls that one run answered: [k, 4]; [0, 4] where answers tell
            nothing.
        error_count: How many calls failed.
        errors: Some of the messages of those.
    """

    callers: int
    elapsed_s: float
    latencies_s: Array
    server: Array
    error_count: int
    errors: tuple[str, ...]

    @property
    def calls_per_s(self) -> float:
        """Answered calls in a second."""
        return len(self.latencies_s) / self.elapsed_s

    def latency_s(self, percent: float) -> float:
        """Returns a percentile of the latency, in seconds; NaN without answers."""
        if not len(self.latencies_s):
            return float("nan")
        return float(np.percentile(self.latencies_s, percent))

    @property
    def server_time(self) -> ServerTime | None:
        """Where the server's time went; None where answers tell nothing."""
        if not len(self.server):
            return None
        return ServerTime(*map(float, self.server.mean(axis=0)))


def run(
    call: Callable[[], object],
    *,
    callers: int,
    seconds: float,
    stop: threading.Event | None = None,
) -> Load:
    """Has callers call until the time is up, but at least once each.

    Args:
        call: Makes one call and waits for its answer, from any thread.
        callers: How many threads call.
        seconds: Seconds after which no more calls begin; those that have are finished.
        stop: Ends it early once it is set.

    Returns:
        What was measured. Calls that raise JacobianError are counted; a caller of
        whom ten in a row have failed stops.
    """
    stop = stop or threading.Event()
    tapes = [_Tape() for _ in range(callers)]
    with ThreadPoolExecutor(callers) as pool:
        start = time.perf_counter()
        calling = [
            pool.submit(_repeat, call, tape, start + seconds, stop) for tape in tapes
        ]
        try:
            for each in calling:
                each.result()
        except BaseException:
            stop.set()  # Or the pool would wait for all the time that is left.
            raise
        elapsed = time.perf_counter() - start
    return Load(
        callers=callers,
        elapsed_s=elapsed,
        latencies_s=np.array([x for tape in tapes for x in tape.latencies_s]),
        server=np.array([x for tape in tapes for x in tape.server]).reshape(-1, 4),
        error_count=sum(tape.error_count for tape in tapes),
        errors=_distinct(tape.error for tape in tapes if tape.error),
    )


def joined(loads: Sequence[Load]) -> Load:
    """Joins what the same number of callers measured in several turns.

    Args:
        loads: At least one.

    Returns:
        The same as if it had been measured in one turn.
    """
    return Load(
        callers=loads[0].callers,
        elapsed_s=sum(load.elapsed_s for load in loads),
        latencies_s=np.concatenate([load.latencies_s for load in loads]),
        server=np.concatenate([load.server for load in loads]),
        error_count=sum(load.error_count for load in loads),
        errors=_distinct(text for load in loads for text in load.errors),
    )


@dataclass(slots=True)
class _Tape:
    """What one caller has measured so far; nobody else writes to it."""

    latencies_s: list[float] = field(default_factory=list[float])
    server: list[tuple[float, float, float, int]] = field(
        default_factory=list[tuple[float, float, float, int]]
    )
    error_count: int = 0
    error: str = ""

    def record(self, answer: object, latency_s: float) -> None:
        """Keeps the figures of an answer, but not its arrays."""
        self.latencies_s.append(latency_s)
        if isinstance(answer, Result):
            timing, count = answer.timing, answer.coalesced_count
            self.server.append(
                (timing.queue_s, timing.compile_s, timing.execute_s, count)
            )


def _repeat(
    call: Callable[[], object], tape: _Tape, end: float, stop: threading.Event
) -> None:
    failures_in_a_row = 0
    while not stop.is_set():
        start = time.perf_counter()
        try:
            answer = call()
        except JacobianError as error:
            tape.error_count += 1
            tape.error = str(error)
            failures_in_a_row += 1
        else:
            tape.record(answer, time.perf_counter() - start)
            failures_in_a_row = 0
        if time.perf_counter() >= end or failures_in_a_row == _MOST_FAILURES_IN_A_ROW:
            return


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))[:_MOST_MESSAGES]
