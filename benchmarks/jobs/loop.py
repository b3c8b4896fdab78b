"""A process that computes points in a loop of its own: the floors of throughput.

Run as `python -m benchmarks.jobs.loop`. For each line of JSON it computes the points of
a file batch by batch with a vmapped, compiled function, and writes the seconds. What
becomes of the results is `discard`: nothing; `memory`: they are copied into one array;
`store`: they are written into a Zarr store.
"""

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zarr

from benchmarks.jobs import functions
from benchmarks.jobs.cases import CASES, cotangent


@functools.cache
def program(label: str) -> Callable[[Any], Any]:
    """Returns what computes a batch of a case."""
    case = CASES[label]
    f = getattr(functions, case.function)
    jacobian = jax.jacfwd(f)
    u = cotangent(case.n)
    of_point: dict[str, Callable[[Any], Any]] = {
        "jacobian": jacobian,
        "slogdet": lambda x: jnp.linalg.slogdet(jacobian(x)),
        "vjp": lambda x: jax.vjp(f, x)[1](u)[0],
    }
    return jax.jit(jax.vmap(of_point[case.quantity]))


@dataclass(frozen=True, slots=True)
class Loop:
    """Points, and what computes them.

    Attributes:
        compute: Computes a batch.
        points: All points.
        batch_size: How many are computed at once.
    """

    compute: Callable[[Any], Any]
    points: np.ndarray
    batch_size: int

    def warm_up(self) -> list[jax.Array]:
        """Compiles what is needed; returns the results of a batch."""
        sample: list[jax.Array] = []
        for rows in {len(self.points) % self.batch_size, self.batch_size} - {0}:
            sample = jax.tree.leaves(self.compute(self.points[:rows]))
            jax.block_until_ready(sample)
        return sample

    def batches(self) -> Iterator[tuple[int, int, list[jax.Array]]]:
        """Yields for each batch its rows, and its results."""
        for start in range(0, len(self.points), self.batch_size):
            stop = min(start + self.batch_size, len(self.points))
            out = jax.block_until_ready(self.compute(self.points[start:stop]))
            yield start, stop, jax.tree.leaves(out)

    def discard(self) -> None:
        """Computes all, and keeps nothing."""
        for _ in self.batches():
            pass

    def fill(self, kept: Sequence[np.ndarray]) -> None:
        """Copies all results into arrays."""
        for start, stop, out in self.batches():
            for array, rows in zip(kept, out, strict=True):
                array[start:stop] = rows

    def store(self, arrays: Sequence[Any], chunk_size: int) -> None:
        """Writes all results, a chunk at a time."""
        kept = [
            np.empty((chunk_size, *array.shape[1:]), array.dtype) for array in arrays
        ]
        first = 0
        for start, stop, out in self.batches():
            for array, rows in zip(kept, out, strict=True):
                array[start - first : stop - first] = rows
            if stop - first == chunk_size or stop == len(self.points):
                for array, chunk in zip(arrays, kept, strict=True):
                    array[first:stop] = chunk[: stop - first]
                first = stop


def seconds(
    way: str,
    case: str,
    points: str,
    batch_size: int,
    chunk_size: int,
    folder: str,
) -> float:
    """Runs a loop.

    Args:
        way: What becomes of the results.
        case: The label of what is computed.
        points: The file of the points.
        batch_size: How many are computed at once.
        chunk_size: How many are kept at once in a store.
        folder: Where a store may be made.

    Returns:
        The seconds it took, with everything compiled and allocated before.
    """
    with jax.enable_x64(CASES[case].dtype == "float64"):
        loop = Loop(program(case), np.load(points), batch_size)
        return _seconds(loop, way, chunk_size, Path(folder))


def _seconds(loop: Loop, way: str, chunk_size: int, folder: Path) -> float:
    count, sample = len(loop.points), loop.warm_up()
    shapes = [((count, *each.shape[1:]), each.dtype) for each in sample]
    if way == "discard":
        return _timed(loop.discard)
    if way == "memory":
        # Written once, so that no page is touched for the first time later.
        kept = [np.ones(shape, dtype) for shape, dtype in shapes]
        return _timed(lambda: loop.fill(kept))
    path = folder / "loop.zarr"
    group = zarr.create_group(path)
    arrays = [
        group.create_array(
            str(place),
            shape=shape,
            chunks=(min(chunk_size, count), *shape[1:]),
            dtype=dtype,
            compressors=None,
        )
        for place, (shape, dtype) in enumerate(shapes)
    ]
    try:
        return _timed(lambda: loop.store(arrays, chunk_size))
    finally:
        shutil.rmtree(path)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Answers until stdin ends."""
    for line in sys.stdin:
        print(json.dumps(seconds(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
