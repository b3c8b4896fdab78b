"""Which points are computed together, and what that was measured to be worth."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jacserve.tensors import Array
from jacserve_server.work import Computation, InputSpec, Outcome, ProgramKey, Work

# What wins less may do so by chance, and does not make up for the padding.
_LEAST_GAIN = 1.2


def together(computation: Computation) -> Computation:
    """Returns the computation of many points, of which nothing is shared.

    Args:
        computation: The computation of one point.

    Returns:
        The same of a batch, to which each point brings all of its arrays.
    """
    return replace(
        computation,
        inputs=tuple(map(_batched, computation.inputs)),
        tangents=tuple(map(_batched, computation.tangents)),
        cotangents=tuple((path, _batched(x)) for path, x in computation.cotangents),
    )


def _batched(spec: InputSpec) -> InputSpec:
    return replace(spec, is_batched=True)


def gathered(works: Sequence[Work], key: ProgramKey) -> Work:
    """Returns the work of several points as that of one full batch.

    Args:
        works: Points of one computation.
        key: The program that is to compute them together.

    Returns:
        The batch; the last point fills the rows that are left.
    """
    columns = zip(*(work.arrays for work in works), strict=True)
    rows = key.bucket or 0
    arrays = tuple(_stacked(column, rows) for column in columns)
    return Work(key.computation, arrays, key.bucket)


def _stacked(arrays: Sequence[Array], rows: int) -> Array:
    # Faster than np.stack, which also looks at every dtype and shape again.
    stacked = np.empty((rows, *arrays[0].shape), arrays[0].dtype)
    for row, array in enumerate(arrays):
        stacked[row] = array
    stacked[len(arrays) :] = arrays[-1]
    return stacked


def separated(outcome: Outcome, count: int) -> list[Outcome]:
    """Returns the outcomes of the points of a batch, each with its own row.

    Args:
        outcome: What came of the batch.
        count: How many of its rows were asked for.

    Returns:
        An outcome for each of these.
    """
    return [
        replace(
            outcome,
            arrays=tuple(array[row, ...] for array in outcome.arrays),
            finite=outcome.finite[row, ...],
            coalesced_count=count,
        )
        for row in range(count)
    ]


@dataclass(frozen=True, slots=True)
class Gain:
    """What was measured of computing points of one kind together.

    Attributes:
        batch: The computation that does so.
        single_s: Seconds for one point alone.
        bucket_s: Seconds for each number of points at once.
    """

    batch: Computation
    single_s: float
    bucket_s: Mapping[int, float]

    def of(self, count: int, bucket: int) -> float:
        """Returns how many times faster than one by one points are together.

        Args:
            count: How many points wait.
            bucket: How many the program computes, padding included.
        """
        return min(count, bucket) * self.single_s / self.bucket_s[bucket]

    @property
    def largest(self) -> int:
        """The largest number of points at once that wins; 1 where none does."""
        wins = [b for b in self.bucket_s if self.of(b, b) > _LEAST_GAIN]
        return max(wins, default=1)


class Gains:
    """What was measured in this process, by the computation of one point."""

    def __init__(self) -> None:
        """Starts without measurements, so that nothing is computed together."""
        self._by_computation: dict[Computation, Gain] = {}

    def record(
        self, computation: Computation, seconds: Mapping[int, Sequence[float]]
    ) -> Gain:
        """Keeps what was measured, where computing together wins at all.

        Args:
            computation: Of one point.
            seconds: Of each run, for 1 point and for each larger number at once.

        Returns:
            What follows from the medians.
        """
        medians = {rows: statistics.median(taken) for rows, taken in seconds.items()}
        gain = Gain(together(computation), medians.pop(1), medians)
        if gain.largest > 1:
            self._by_computation[computation] = gain
        return gain

    def wins(self, computation: Computation) -> bool:
        """Whether points of this kind are ever better computed together."""
        return computation in self._by_computation

    def programs(self, computation: Computation, count: int) -> list[ProgramKey]:
        """Returns what computes waiting points together, and is worth it.

        Args:
            computation: Of one of them.
            count: How many wait.

        Returns:
            The programs, the one that wins the most for each point first.
        """
        gain = self._by_computation.get(computation)
        if gain is None or count < 2:
            return []
        wins = {
            bucket: gain.of(count, bucket)
            for bucket in gain.bucket_s
            if bucket <= gain.largest
        }
        order = sorted(wins, key=lambda bucket: wins[bucket], reverse=True)
        return [ProgramKey(gain.batch, b) for b in order if wins[b] > _LEAST_GAIN]


def buckets_to_measure(most: int) -> list[int]:
    """Returns the powers of two from 2 to the most points at once."""
    return [1 << power for power in range(1, most.bit_length())]
