"""A machine's clock that is set: nothing is deleted too early, or waits for ever."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jacserve_server.jobs.clocks import SteadyClock
from jacserve_server.jobs.table import JobTable, NewJob

YEAR_S = 365 * 86400.0


class Machine:
    """A clock that somebody sets, and one that nobody can."""

    def __init__(self) -> None:
        self.now, self.uptime = 1.7e9, 100.0

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.uptime += seconds

    def clock(self) -> SteadyClock:
        return SteadyClock(lambda: self.now, lambda: self.uptime)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


@pytest.fixture
def table(machine: Machine, path: Path) -> Iterator[JobTable]:
    with closing(JobTable(f"sqlite:///{path}", "f", clock=machine.clock())) as opened:
        yield opened


def running(table: JobTable) -> str:
    job = NewJob(
        job_id="j",
        request=b"",
        digest="d",
        function="f@1",
        point_count=1,
        output="",
        ttl_s=3600.0,
        owner="a",
    )
    table.create(job)
    assert is_claimed(table)
    return job.uid


def is_claimed(table: JobTable) -> bool:
    return table.claim("a", ["f@1"], lambda _: True, running=set()) is not None


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S, 0.0])
def test_a_job_is_kept_for_its_time_whatever_the_clock_says(
    table: JobTable, machine: Machine, jump_s: float
) -> None:
    uid = running(table)
    table.finish(uid, "a", "succeeded")
    machine.now += jump_s
    assert table.expired(keep=10) == []
    machine.wait(3599)
    assert table.expired(keep=10) == []
    machine.wait(2)
    assert table.expired(keep=10) == [uid]


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S, 0.0])
def test_a_job_held_up_is_tried_again_in_time(
    table: JobTable, machine: Machine, jump_s: float
) -> None:
    clock = machine.clock()
    table.release(running(table), "a", error=b"full", retry_at=clock() + 300.0)
    machine.now += jump_s
    assert not is_claimed(table)
    machine.wait(301)
    assert is_claimed(table)


def test_a_job_held_up_by_a_clock_that_was_ahead_is_tried_at_once(
    table: JobTable, machine: Machine, path: Path
) -> None:
    table.release(running(table), "a", error=b"full", retry_at=machine.now + 300.0)
    machine.now -= YEAR_S
    with closing(JobTable(f"sqlite:///{path}", "f", clock=machine.clock())) as later:
        assert is_claimed(later)


def test_a_jump_is_told_once(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    clock = machine.clock()
    start = clock()
    for jump_s in (5.0, YEAR_S, 0.0, -YEAR_S):
        machine.now += jump_s
        machine.wait(1)
        clock()
    assert clock() == start + 4
    assert len(caplog.messages) == 2
    assert "off by 31536005 s" in caplog.messages[0]


def test_the_clock_of_a_server_that_nobody_sets_is_the_machines() -> None:
    assert abs(SteadyClock()() - time.time()) < 1.0
