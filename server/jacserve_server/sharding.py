"""How a batch is divided, and its results put together again.

A large one is divided among devices. One that the memory of a device does not suffice
for is computed in parts, one after the other.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from jacserve_server.batches import bucket_for
from jacserve_server.errors import ServiceError
from jacserve_server.work import Outcome, Outline, Work


def part_rows(batch: int, devices: int) -> int:
    """Returns the rows of each part of a batch; the last part may have fewer.

    Args:
        batch: The rows of the batch, at least one.
        devices: How many devices there are.

    Returns:
        The power of two of which so many cover the batch, so that all parts run in
        one program, with padding in the last alone.
    """
    return bucket_for(-(-batch // devices)) or 1


def divided(work: Work, rows: int) -> Iterator[Work]:
    """Yields the parts of a batch, in order.

    Args:
        work: The batch.
        rows: How many rows each part has, but for the last.
    """
    batch = work.batch or 0
    for start in range(0, batch, rows):
        yield _part(work, start, min(start + rows, batch))


def _part(work: Work, start: int, stop: int) -> Work:
    specs = work.computation.arrays
    arrays = tuple(
        array[start:stop] if spec.is_batched else array
        for spec, array in zip(specs, work.arrays, strict=True)
    )
    return replace(work, arrays=arrays, batch=stop - start)


def is_out_of_memory(error: ServiceError) -> bool:
    """Tells whether work has failed for want of memory."""
    return error.reason == "DEVICE_OUT_OF_MEMORY"


def is_divisible(work: Work) -> bool:
    """Tells whether work may be computed in parts.

    Other programs may round otherwise, so a query that wants to be exact is not.
    """
    return (work.batch or 0) > 1 and not work.is_exact


async def in_smaller_parts(
    work: Work, run: Callable[[Work], Awaitable[Outcome]]
) -> Outcome:
    """Computes a batch for which the memory did not suffice.

    Each part has half of the rows of what did not fit, down to one, so that it does not
    fit at most as often as the batch can be halved.

    Args:
        work: The batch, of two rows at least.
        run: Computes a part.

    Returns:
        All its rows. Its seconds are those of all parts together.

    Raises:
        ServiceError: A part can't be computed, or not even one row fits.
    """
    batch = work.batch or 0
    rows, start = (bucket_for(batch) or 2) // 2, 0
    outcomes: list[Outcome] = []
    while start < batch:
        stop = min(start + rows, batch)
        part = _part(work, start, stop)
        try:
            outcomes.append(await run(part))
        except ServiceError as error:
            if not is_out_of_memory(error) or not is_divisible(part):
                raise
            rows = (bucket_for(stop - start) or 2) // 2
        else:
            start = stop
    whole = await asyncio.to_thread(joined, outcomes)
    return replace(
        whole,
        execute_s=sum(outcome.execute_s for outcome in outcomes),
        queue_s=sum(outcome.queue_s for outcome in outcomes),
        compile_s=sum(outcome.compile_s for outcome in outcomes),
    )


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome of a batch.

    Args:
        outcomes: Those of its parts, in order.

    Returns:
        All their rows. Its seconds are the longest of the parts: they ran at once.
    """
    arrays = tuple(map(np.concatenate, zip(*(o.arrays for o in outcomes), strict=True)))
    for array in arrays:
        array.flags.writeable = False
    outlines = {outcome.outline.device: outcome.outline for outcome in outcomes}
    ordered = tuple(outlines[name] for name in sorted(outlines, key=_natural))
    rows = sum(outcome.outline.bucket or 0 for outcome in outcomes)
    return Outcome(
        outline=_joined_outline(ordered, rows),
        arrays=arrays,
        finite=np.concatenate([outcome.finite for outcome in outcomes]),
        execute_s=max(outcome.execute_s for outcome in outcomes),
        queue_s=max(outcome.queue_s for outcome in outcomes),
    )


def _natural(device: str) -> tuple[str, int]:
    platform, _, number = device.partition(":")
    return platform, int(number)


# Memoised, so that batches divided alike have one outline, as those of one program do.
@functools.lru_cache(maxsize=256)
def _joined_outline(outlines: tuple[Outline, ...], rows: int) -> Outline:
    return replace(
        outlines[0],
        bucket=rows,
        device=", ".join(outline.device for outline in outlines),
    )
