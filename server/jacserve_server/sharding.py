"""How a large batch is divided among devices, and its results put together again."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from jacserve_server.batches import bucket_for
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
    specs = work.computation.arrays
    for start in range(0, batch, rows):
        arrays = tuple(
            array[start : start + rows] if spec.is_batched else array
            for spec, array in zip(specs, work.arrays, strict=True)
        )
        yield replace(work, arrays=arrays, batch=min(rows, batch - start))


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
    return Outcome(
        outline=_joined_outline(ordered, len(outcomes)),
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
def _joined_outline(outlines: tuple[Outline, ...], parts: int) -> Outline:
    first = outlines[0]
    return replace(
        first,
        bucket=(first.bucket or 0) * parts,
        device=", ".join(outline.device for outline in outlines),
    )
