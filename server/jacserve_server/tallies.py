"""What a server has done since it started, in numbers: plain data.

Everything is counted once, here, by the event loop. Whoever shows it, as metrics or as
the server's status, reads a copy.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jacserve_server.work import Outcome

# Upper bounds: seconds from a brief program's to those of one that took minutes, and
# the points that one run computes.
SECONDS = tuple(
    digit * 10.0**power for power in range(-4, 3) for digit in (1.0, 2.0, 5.0)
)
POINTS = tuple(float(2**power) for power in range(11))


class Histogram:
    """Counts values by their size.

    Attributes:
        bounds: The upper bound of each bucket; one more has all that is larger.
        counts: How many values are in each.
        total: The sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Starts empty.

        Args:
            bounds: The buckets' upper bounds, ascending.
        """
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Histogram":
        """Returns another with the same counts."""
        twin = Histogram(self.bounds)
        twin.counts, twin.total = self.counts.copy(), self.total
        return twin


def quantile(histograms: Iterable[Histogram], part: float) -> float:
    """Returns a bound that a part of all values does not exceed.

    Args:
        histograms: Have the values, in the same buckets.
        part: Which part, such as 0.99.

    Returns:
        The upper bound of the bucket in which the quantile is, infinity in the last
        one; 0 where there are no values.
    """
    found = list(histograms)
    counts = [sum(column) for column in zip(*(h.counts for h in found), strict=True)]
    wanted, seen = part * sum(counts), 0
    if not wanted:
        return 0.0
    for bound, count in zip((*found[0].bounds, float("inf")), counts, strict=True):
        seen += count
        if seen >= wanted:
            return bound
    return float("inf")


def _seconds() -> Histogram:
    return Histogram(SECONDS)


@dataclass(slots=True, eq=False)
class Computed:
    """What was computed of one function.

    Attributes:
        queue: Seconds that queries waited for a device.
        compile: Seconds that queries waited for their program, of those that did.
        execute: Seconds of the runs that answered queries.
        points: How many points were computed, of jobs too.
        device_s: Seconds that devices have spent, on jobs too.
    """

    queue: Histogram = field(default_factory=_seconds)
    compile: Histogram = field(default_factory=_seconds)
    execute: Histogram = field(default_factory=_seconds)
    points: int = 0
    device_s: float = 0.0

    def copy(self) -> "Computed":
        """Returns another with the same counts."""
        histograms = self.queue.copy(), self.compile.copy(), self.execute.copy()
        return Computed(*histograms, self.points, self.device_s)


class Tallies:
    """The counts of one server. Used from one event loop; copies are anybody's.

    Attributes:
        calls: Calls that have ended, by method, function, status code and reason.
        seconds: From the arrival of calls to their answers, by method and function.
        computed: What was computed, by function.
        together: For each query of one point, how many points its run computed.
        program_hits: Queries and batches of jobs that found their program compiled.
        program_misses: Those that had to wait for it.
        job_points: Points computed for jobs.
    """

    def __init__(self) -> None:
        """Starts at nothing."""
        self.calls: Counter[tuple[str, str, str, str]] = Counter()
        self.seconds: dict[tuple[str, str], Histogram] = {}
        self.computed: dict[str, Computed] = {}
        self.together = Histogram(POINTS)
        self.program_hits = 0
        self.program_misses = 0
        self.job_points = 0

    def count_call(
        self, method: str, function: str, code: str, reason: str, seconds: float | None
    ) -> None:
        """Counts a call that has ended.

        Args:
            method: The RPC's name.
            function: Name and version of a registered function, or "".
            code: The status code's name, such as "OK".
            reason: The contract's reason of a failure, or "".
            seconds: From its arrival to its end; None for one that was not let in.
        """
        self.calls[method, function, code, reason] += 1
        if seconds is not None:
            histogram = self.seconds.get((method, function))
            if histogram is None:
                histogram = self.seconds[method, function] = _seconds()
            histogram.observe(seconds)

    def count_outcome(
        self, function: str, batch: int | None, outcome: Outcome, *, is_job: bool
    ) -> None:
        """Counts what came of a piece of work.

        Args:
            function: Name and version of the function.
            batch: How many points it had; None for one.
            outcome: What came of it.
            is_job: Whether it was a job's, of which nobody waits for the answer.
        """
        computed = self.computed.get(function)
        if computed is None:
            computed = self.computed[function] = Computed()
        points = 1 if batch is None else batch
        computed.points += points
        computed.device_s += outcome.execute_s / outcome.coalesced_count
        if is_job:
            self.job_points += points
            return
        computed.queue.observe(outcome.queue_s)
        computed.execute.observe(outcome.execute_s)
        if outcome.compile_s:
            computed.compile.observe(outcome.compile_s)
        if batch is None:
            self.together.observe(outcome.coalesced_count)

    def copy(self) -> "Tallies":
        """Returns another with the same counts."""
        twin = Tallies()
        twin.calls = self.calls.copy()
        twin.seconds = {key: each.copy() for key, each in self.seconds.items()}
        twin.computed = {key: each.copy() for key, each in self.computed.items()}
        twin.together = self.together.copy()
        twin.program_hits = self.program_hits
        twin.program_misses = self.program_misses
        twin.job_points = self.job_points
        return twin
