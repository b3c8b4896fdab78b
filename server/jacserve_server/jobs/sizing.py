"""How many rows are computed, and how many are kept at once.

A batch is what a device runs without a pause, so it has to be short enough for a query
to wait for, and long enough to be worth handing over. A chunk is what is written and
recorded at once: some batches, so that it is not the disk that everybody waits for.
Both are settled before the first chunk, and then kept, so that a job that was
interrupted computes the very same programs again.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from jacserve_server.errors import ServiceError
from jacserve_server.work import Outcome

# What a query may have to wait for the device.
BATCH_S = 0.02
# A function may take a second for each row, so few are tried first.
_FIRST_ROWS, _MOST_GROWTH = 16, 64
# Of the arrays of a batch's results, and of a chunk's where batches are smaller.
_BATCH_BYTES = 2**24
_CHUNK_BYTES = 2**23
_CHUNK_S = 0.5
_TOO_LARGE = {"DEVICE_OUT_OF_MEMORY", "RESULT_TOO_LARGE"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Into what a job is divided.

    Attributes:
        batch_size: The rows computed at once.
        chunk_size: The rows kept at once; a multiple of it.
    """

    batch_size: int
    chunk_size: int


async def choose_sizes(
    run: Callable[[int], Awaitable[Outcome]],
    point_count: int,
    *,
    batch_size: int,
    max_batch: int | None,
) -> tuple[Sizes, Outcome]:
    """Chooses the sizes of a job, by running some of its rows.

    Args:
        run: Computes the first rows of the job, as one batch of so many.
        point_count: The rows of the job.
        batch_size: The rows to compute at once, fewer where these are too many; 0 to
            choose.
        max_batch: The most rows that its function takes at once.

    Returns:
        The sizes, and what came of a batch.

    Raises:
        ServiceError: The rows can't be computed.
    """
    most = min(_power_above(point_count), _power_below(max_batch or point_count * 2))
    if batch_size:
        rows = min(batch_size, point_count, max_batch or batch_size)
        rows, sample = await _fitting(run, rows)
    else:
        rows, sample = await _measured(run, most)
    seconds, row_bytes = sample.execute_s, _row_bytes(sample)
    chunk = rows
    while (
        chunk < point_count
        and 2 * chunk * row_bytes <= _CHUNK_BYTES
        and 2 * seconds * chunk / rows <= _CHUNK_S
    ):
        chunk *= 2
    return Sizes(rows, chunk), sample


async def _measured(
    run: Callable[[int], Awaitable[Outcome]], most: int
) -> tuple[int, Outcome]:
    """Finds how many rows take as long as a query may have to wait."""
    rows = min(most, _FIRST_ROWS)
    while True:
        tried = rows
        rows, sample = await _fitting(run, tried)
        sample = min(sample, await run(rows), key=lambda outcome: outcome.execute_s)
        fitting = min(
            most,
            _power_below(rows * BATCH_S / max(sample.execute_s, 1e-9)),
            _power_below(_BATCH_BYTES / max(_row_bytes(sample), 1)),
        )
        # Each try is a program to compile, so half of the best is good enough.
        if fitting < rows:
            return await _fitting(run, fitting)
        if rows < tried or fitting <= 2 * rows:
            return rows, sample
        rows = min(fitting, rows * _MOST_GROWTH)


async def _fitting(
    run: Callable[[int], Awaitable[Outcome]], rows: int
) -> tuple[int, Outcome]:
    """Runs as many rows as device and server have room for, of at most so many."""
    while True:
        try:
            return rows, await run(rows)
        except ServiceError as error:
            if error.reason not in _TOO_LARGE or rows == 1:
                raise
        rows = max(1, rows // 4)


def _row_bytes(sample: Outcome) -> float:
    return sum(array.nbytes for array in sample.arrays) / len(sample.finite)


def _power_below(number: float) -> int:
    """Returns the largest power of two that is not above a number, at least 1."""
    return 1 << max(int(number).bit_length() - 1, 0) if number >= 1 else 1


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()
