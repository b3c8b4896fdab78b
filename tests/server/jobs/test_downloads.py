"""Results in parts: what is read of the store at once, and what becomes of it."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from jacserve.results import decode_opened
from jacserve.sparse import Pattern
from jacserve.streaming import Assembly, read_head
from jacserve.tensors import Array
from jacserve.v1 import jobs_pb2
from jacserve_server.jobs import downloads, results
from jacserve_server.jobs.plans import RowSource, Task
from jacserve_server.jobs.results import Leaf, Results
from jacserve_server.jobs.storage import Location
from jacserve_server.work import Computation, InputSpec

ROWS, CHUNK = 200_000, 20_000


class Watched(Results):
    """Notes the most rows that are read at once."""

    most_rows = 0

    def read(self, leaf: Leaf, start: int, stop: int) -> Array:
        self.most_rows = max(self.most_rows, stop - start)
        return super().read(leaf, start, stop)

    def read_finite(self, start: int, stop: int) -> Array:
        self.most_rows = max(self.most_rows, stop - start)
        return super().read_finite(start, stop)


def test_rows_are_read_chunk_by_chunk(tmp_path: Path) -> None:
    """Also of matrices that have no entries, and so nothing to send."""
    none = np.zeros(0, np.int32)
    leaves = [
        Leaf("value", (), "float64", (1,), "", None),
        Leaf("jacobian", (), "float64", (0,), "sparse", Pattern.of((1, 1), none, none)),
    ]
    computation = Computation(
        "f@1",
        ("value", "jacobian"),
        (),
        None,
        "csr",
        (InputSpec((1,), "float64", True),),
    )
    output = Location(str(tmp_path), "x.zarr", "data/x.zarr")
    source = RowSource(output, "", True)
    task = Task("job", "turn", computation, (source,), ROWS, output)
    about = {"device": "cpu", "batch_size": CHUNK, "products_at_once": None}
    results.create(task, leaves, CHUNK, about)
    store = Watched(output, "job", is_writable=True)
    x = np.arange(float(ROWS))[:, None]
    finite = np.arange(ROWS) != ROWS - 2
    for start in range(0, ROWS, CHUNK):
        rows = slice(start, start + CHUNK)
        store.write(start, [x[rows], np.zeros((CHUNK, 0))], finite[rows])

    async def in_thread(call: Any, /, *arguments: Any) -> Any:
        return call(*arguments)

    async def parts() -> list[bytes]:
        found = downloads.parts(
            store,
            5,
            ROWS,
            quantities=["value", "jacobian"],
            layout="csr",
            block_rows=CHUNK,
            in_thread=in_thread,
        )
        return [part async for part in found]

    first, *others = asyncio.run(parts())
    part, holes = read_head(first, jobs_pb2.ReadJobResultResponse)
    assembly = Assembly(first, holes)
    for each in others:
        assembly.feed(each)
    assert assembly.is_complete
    result = decode_opened(part.head, assembly.payloads, "csr")
    np.testing.assert_array_equal(result.value, x[5:])
    np.testing.assert_array_equal(result.finite_points, finite[5:])
    assert not result.finite
    assert store.most_rows == CHUNK
