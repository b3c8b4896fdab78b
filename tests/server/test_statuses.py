"""Failures that are nobody's fault are said in terms of the contract."""

import pytest

from jacserve_server.statuses import explained


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "DEVICE_OUT_OF_MEMORY"),
        (RuntimeError("can't start new thread"), "DEVICE_OUT_OF_MEMORY"),
        (RuntimeError("something else"), "UNEXPECTED"),
    ],
)
def test_a_want_of_memory_is_no_fault(error: Exception, reason: str) -> None:
    assert explained(error, "r").reason == reason
