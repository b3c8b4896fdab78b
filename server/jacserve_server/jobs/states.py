"""Where a job is in its life, and where it may go from there.

The one place that knows: the table of jobs asks `sources_of` in every change of state.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[JobState, ...] = get_args(JobState)

# From running to queued: its server stops, or storage holds it up.
TRANSITIONS: Mapping[JobState, tuple[JobState, ...]] = MappingProxyType(
    {
        "queued": ("running", "failed", "cancelled"),
        "running": ("queued", "succeeded", "failed", "cancelled"),
        "succeeded": (),
        "failed": (),
        "cancelled": (),
    }
)
FINAL: tuple[JobState, ...] = tuple(state for state in STATES if not TRANSITIONS[state])


def sources_of(target: JobState) -> tuple[JobState, ...]:
    """Returns the states from which a job may go to another.

    Args:
        target: Where it goes.

    Returns:
        The states, in the order of STATES.
    """
    return tuple(state for state in STATES if target in TRANSITIONS[state])
