"""What computing points together was measured to be worth, and what follows."""

import numpy as np
import pytest

from jacserve_server.coalescing import (
    Gains,
    buckets_to_measure,
    gathered,
    separated,
    together,
)
from jacserve_server.work import (
    Computation,
    InputSpec,
    Outcome,
    Outline,
    ProgramKey,
    Strategy,
    Work,
)

POINT = Computation(
    "f@1",
    ("value", "jvp"),
    ("x",),
    "forward",
    "matrix",
    (InputSpec((2,), "float32", False), InputSpec((), "int32", False)),
    tangents=(InputSpec((2,), "float32", False),),
    cotangents=(((), InputSpec((3,), "float32", False)),),
)


def buckets(gains: Gains, count: int) -> list[int | None]:
    return [key.bucket for key in gains.programs(POINT, count)]


def test_what_was_not_measured_or_does_not_win_is_never_computed_together() -> None:
    gains = Gains()
    assert gains.programs(POINT, 64) == []
    assert gains.record(POINT, {1: [1.0], 2: [1.9], 4: [3.5]}).largest == 1
    assert not gains.wins(POINT)
    assert gains.programs(POINT, 64) == []


def test_the_program_that_wins_most_for_those_that_wait_comes_first() -> None:
    gains = Gains()
    # By medians: 2 win nothing, 4 twice, 8 four times, and 16 nothing again.
    seconds = {1: [1.0, 9, 1], 2: [2, 2, 0.1], 4: [2.0], 8: [2.0], 16: [16.0]}
    assert gains.record(POINT, seconds).largest == 8
    assert buckets(gains, 1) == []
    assert buckets(gains, 2) == []  # In the program for 4, half of it padding.
    assert buckets(gains, 3) == [4, 8]
    assert buckets(gains, 5) == [8, 4]
    assert buckets(gains, 1000) == [8, 4]
    batch = gains.programs(POINT, 8)[0].computation
    assert all(spec.is_batched for spec in batch.arrays)
    assert len(batch.arrays) == len(POINT.arrays)


def test_points_are_gathered_and_separated_in_order() -> None:
    works = [
        Work(POINT, (np.full(2, k, "f"), np.array(k, "i4"), np.zeros(2, "f"),
                     np.ones(3, "f")), None)
        for k in range(3)
    ]  # fmt: skip
    key = ProgramKey(together(POINT), 4)
    batch = gathered(works, key)
    assert (batch.batch, batch.computation) == (4, key.computation)
    np.testing.assert_array_equal(batch.arrays[0][:, 0], [0, 1, 2, 2])
    np.testing.assert_array_equal(batch.arrays[1], [0, 1, 2, 2])
    assert [array.dtype.name for array in batch.arrays] == [
        spec.dtype for spec in POINT.arrays
    ]
    outline = Outline("f@1", (), {}, {}, Strategy(), 4, "cpu:0")
    finite = np.array([True, False, True, True])
    whole = Outcome(outline, (np.arange(4.0), np.zeros((4, 2))), finite, 0.5)
    parts = separated(whole, 3)
    assert [part.arrays[0].item() for part in parts] == [0, 1, 2]
    assert [part.finite.item() for part in parts] == [True, False, True]
    assert all(part.arrays[1].shape == (2,) for part in parts)
    assert all(part.coalesced_count == 3 and part.execute_s == 0.5 for part in parts)
    assert all(isinstance(x, np.ndarray) for part in parts for x in part.arrays)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, []), (2, [2]), (3, [2]), (48, [2, 4, 8, 16, 32])]
)
def test_powers_of_two_are_measured(most: int, expected: list[int]) -> None:
    assert buckets_to_measure(most) == expected
