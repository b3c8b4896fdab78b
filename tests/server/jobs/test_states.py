import pytest

from jacserve_server.jobs.states import FINAL, STATES, JobState, sources_of

ALLOWED = {
    ("queued", "running"),
    ("queued", "failed"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
}


@pytest.mark.parametrize("target", STATES)
def test_only_these_moves_are_allowed(target: JobState) -> None:
    expected = {source for source in STATES if (source, target) in ALLOWED}
    assert set(sources_of(target)) == expected


def test_what_has_ended_stays_so() -> None:
    assert set(FINAL) == {"succeeded", "failed", "cancelled"}
