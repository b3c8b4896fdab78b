"""Large batches: divided, and put together again."""

import numpy as np
import pytest

from jacserve_server.sharding import divided, joined, part_rows
from jacserve_server.work import (
    Computation,
    InputSpec,
    Outcome,
    Outline,
    Strategy,
    Work,
)

INPUTS = (
    InputSpec((2,), "float64", is_batched=True),
    InputSpec((3,), "float64", is_batched=False),
)
COMPUTATION = Computation("f@1", ("value",), (), None, "matrix", INPUTS)


@pytest.mark.parametrize(
    ("batch", "devices", "rows"),
    [(4096, 4, 1024), (4097, 4, 2048), (5000, 4, 2048), (4096, 3, 2048), (2, 4, 1)],
)
def test_parts_are_equal_powers_of_two(batch: int, devices: int, rows: int) -> None:
    assert part_rows(batch, devices) == rows
    x, shared = np.arange(2.0 * batch).reshape(batch, 2), np.zeros(3)
    parts = list(divided(Work(COMPUTATION, (x, shared), batch), rows))
    assert len(parts) <= devices
    assert all(part.batch == rows for part in parts[:-1])
    assert all(part.arrays[1] is shared for part in parts)
    assert all(len(part.arrays[0]) == part.batch for part in parts)
    np.testing.assert_array_equal(np.concatenate([p.arrays[0] for p in parts]), x)


def test_parts_are_joined_in_order_whatever_ran_them() -> None:
    outlines = [
        Outline("f@1", (("value", ()),), {}, {}, Strategy(), 4, f"cpu:{place}")
        for place in (0, 2, 10)
    ]

    def part(place: int, first: int, rows: int) -> Outcome:
        array = np.arange(first, first + rows)
        finite = array != 5
        return Outcome(outlines[place], (array,), finite, 0.1 * place, queue_s=first)

    parts = [part(2, 0, 4), part(0, 4, 4), part(1, 8, 1)]
    whole = joined(parts)
    np.testing.assert_array_equal(whole.arrays[0], np.arange(9))
    np.testing.assert_array_equal(np.flatnonzero(~whole.finite), [5])
    assert not whole.arrays[0].flags.writeable
    assert (whole.execute_s, whole.queue_s) == (0.2, 8)
    assert (whole.outline.device, whole.outline.bucket) == ("cpu:0, cpu:2, cpu:10", 12)
    # What is the same of all such batches can be encoded once.
    again = joined([part(0, 0, 4), part(1, 4, 4), part(2, 8, 1)])
    assert again.outline is whole.outline
    assert joined(parts[:2]).outline is not whole.outline
