"""Results of a range of points, as parts of a message: never all of them in memory."""

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from jacserve import sparse, streaming, tensors, trees
from jacserve.framing import PIECE_BYTES
from jacserve.tensors import Array
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import DTYPES, MODES, QUANTITIES
from jacserve_server.jobs.results import Leaf, Results
from jacserve_server.jobs.threads import InThread


async def parts(
    results: Results,
    start: int,
    stop: int,
    *,
    quantities: Sequence[str],
    layout: str,
    block_rows: int,
    in_thread: InThread,
) -> AsyncGenerator[bytes]:
    """Yields results in parts.

    Args:
        results: The store.
        start: The first row.
        stop: The row after the last one.
        quantities: Which quantities, in order.
        layout: How the indices of sparse matrices are sent.
        block_rows: How many rows are read at once: those of a chunk of the store.
        in_thread: Calls what blocks.

    Yields:
        Serialized ReadJobResultResponses.

    Raises:
        ServiceError: The results can't be read.
    """
    leaves = [
        leaf for name in quantities for leaf in results.leaves if leaf.quantity == name
    ]
    head, indices = _head(results, leaves, start, stop, layout)
    if _size_bytes(head) <= PIECE_BYTES:
        finite = await in_thread(results.read_finite, start, stop)
        head.finite = bool(finite.all())
        payloads: list[Array] = []
        for leaf in leaves:
            rows = await in_thread(results.read, leaf, start, stop)
            payloads.append(tensors.bytes_of(rows))
        every = [*payloads, *indices, tensors.bytes_of(finite)]
        for part in streaming.parts(head, [each for each in every if each.size]):
            yield part
        return
    blocks = list(_blocks(start, stop, block_rows))
    head.finite = True
    for first, last in blocks:
        finite = await in_thread(results.read_finite, first, last)
        head.finite = head.finite and bool(finite.all())
    yield streaming.head_part(head)
    place = 0
    for read, ranges in [
        *((partial(results.read, leaf), blocks) for leaf in leaves),
        *((partial(_whole, payload), [(start, stop)]) for payload in indices),
        (results.read_finite, blocks),
    ]:
        offset = 0
        for first, last in ranges:
            payload = tensors.bytes_of(await in_thread(read, first, last))
            for part in streaming.pieces(place, offset, payload):
                yield part
            offset += len(payload)
        place += offset > 0


def _whole(array: Array, first: int, last: int) -> Array:
    """Reads what all rows share."""
    return array


def _blocks(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yields ranges that end where chunks do, so that each chunk is read once."""
    while start < stop:
        end = min((start // rows + 1) * rows, stop)
        yield start, end
        start = end


def _head(
    results: Results,
    leaves: Iterable[Leaf],
    start: int,
    stop: int,
    layout: str,
) -> tuple[pb.Result, list[Array]]:
    """Returns the hollow message, and the bytes of its patterns' tensors.

    Whether its numbers are finite is left out.
    """
    about, rows = results.about, stop - start
    head = pb.Result(
        function=f"functions/{about['function']}",
        device=about["device"],
        bucket=about["batch_size"],
        chunk_size=about["products_at_once"] or 0,
    )
    indices: list[Array] = []
    for leaf in leaves:
        output = head.outputs.add(quantity=QUANTITIES[leaf.quantity])
        output.path.extend(trees.encode_path(leaf.path))
        if leaf.mode:
            output.mode = MODES[leaf.mode]
        dtype = tensors.dtype_named(leaf.dtype)
        output.tensor.dtype = DTYPES[leaf.dtype]
        output.tensor.shape.extend([rows, *leaf.shape])
        count = rows * int(np.prod(leaf.shape, dtype=np.int64))
        output.tensor.streamed_bytes = count * dtype.itemsize
        if leaf.pattern is not None:
            output.pattern = leaf.pattern.hash
            message, payloads = sparse.describe_pattern(leaf.pattern, layout)
            if all(each.hash != message.hash for each in head.patterns):
                head.patterns.append(message)
                indices += payloads
    head.finite_points.dtype = DTYPES["bool"]
    head.finite_points.shape.append(rows)
    head.finite_points.streamed_bytes = rows
    return head, indices


def _size_bytes(head: pb.Result) -> int:
    outputs = sum(output.tensor.streamed_bytes for output in head.outputs)
    return outputs + head.finite_points.streamed_bytes + _pattern_bytes(head)


def _pattern_bytes(head: pb.Result) -> int:
    return sum(
        each.columns.streamed_bytes
        + each.rows.streamed_bytes
        + each.row_starts.streamed_bytes
        for each in head.patterns
    )
