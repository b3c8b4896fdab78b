"""Whatever two servers and their clients do, in any order: as in a simple model."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jacserve_server.jobs.states import STATES, JobState
from jacserve_server.jobs.table import ChunkRecord, JobRecord, JobTable, NewJob

ROWS = 10
seats = st.sampled_from([0, 1])
ids = st.sampled_from("jkl")
boots = st.sampled_from([None, "now", "earlier"])
picks = st.integers(0, 9)


@dataclass
class Model:
    """A job as it should be, and the boot of each of its chunks."""

    job_id: str
    owner: str | None
    number: int
    state: JobState = "queued"
    boots: dict[int, str | None] = field(default_factory=dict)
    chunk_size: int | None = None
    attempts: int = 0
    strikes: int = 0
    retry_at: float | None = None
    is_deleted: bool = False

    @property
    def ready_count(self) -> int:
        return ROWS * next(index for index in count() if index not in self.boots)


class Machine(RuleBasedStateMachine):
    """Two servers at a time; one that crashes is replaced by another.

    Each has a table of its own, of the same folder.
    """

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.folder = uuid4().hex
        self.models: dict[str, Model] = {}
        self.servers = ["", ""]
        self.tables: list[JobTable] = []
        self.number = 0

    @initialize()
    def start(self) -> None:
        self.tables = [self.open(), self.open()]
        self.servers = [uuid4().hex, uuid4().hex]

    def teardown(self) -> None:
        for table in self.tables:
            table.close()

    def open(self) -> JobTable:
        return JobTable(self.url, self.folder, clock=lambda: self.now)

    def is_alive(self, server: str) -> bool:
        return server in self.servers

    def is_left(self, model: Model, server: str) -> bool:
        owner = model.owner
        return owner is None or owner == server or not self.is_alive(owner)

    def named(self, job_id: str) -> tuple[str, Model] | None:
        named = [
            (uid, model)
            for uid, model in self.models.items()
            if model.job_id == job_id and not model.is_deleted
        ]
        assert len(named) <= 1
        return named[0] if named else None

    def picked(self, pick: int) -> tuple[str, Model]:
        return list(self.models.items())[pick % len(self.models)]

    def runs(self, model: Model, seat: int) -> bool:
        return model.state == "running" and model.owner == self.servers[seat]

    @rule(seat=seats)
    def crash(self, seat: int) -> None:
        self.tables[seat].close()
        self.tables[seat] = self.open()
        self.servers[seat] = uuid4().hex

    @rule(seat=seats, job_id=ids)
    def create(self, seat: int, job_id: str) -> None:
        self.now += 1
        new = NewJob(
            job_id=job_id, request=b"", digest="", function="f@1", point_count=100,
            output="", ttl_s=20.0, owner=self.servers[seat],
        )  # fmt: skip
        taken = self.named(job_id)
        job, is_new = self.tables[seat].create(new)
        assert is_new == (taken is None)
        if taken is None:
            self.number += 1
            self.models[job.uid] = Model(job_id, self.servers[seat], self.number)
        else:
            assert job.uid == taken[0]

    @rule(seat=seats, has_lost_track=st.booleans())
    def claim(self, seat: int, has_lost_track: bool) -> None:
        server = self.servers[seat]
        running = set() if has_lost_track else {
            uid for uid, model in self.models.items() if self.runs(model, seat)
        }  # fmt: skip
        may_run = [
            (model.number, uid)
            for uid, model in self.models.items()
            if self.is_left(model, server)
            and (
                (model.state == "running" and uid not in running)
                or (model.state == "queued" and (model.retry_at or 0) <= self.now)
            )
        ]
        job = self.tables[seat].claim(server, ["f@1"], self.is_alive, running=running)
        if not may_run:
            assert job is None
            return
        assert job is not None
        assert job.uid == min(may_run)[1]
        model = self.models[job.uid]
        model.strikes += model.state == "running" and model.owner != server
        model.state, model.owner, model.retry_at = "running", server, None

    @precondition(lambda self: self.models)
    @rule(seat=seats, pick=picks)
    def plan(self, seat: int, pick: int) -> None:
        uid, model = self.picked(pick)
        may_plan = self.runs(model, seat) and model.chunk_size is None
        planned = self.tables[seat].plan(
            uid, self.servers[seat], batch_size=5, chunk_size=ROWS, fingerprint=""
        )
        assert planned == may_plan
        if planned:
            model.chunk_size = ROWS

    @precondition(lambda self: self.models)
    @rule(seat=seats, pick=picks, index=st.integers(0, 5), boot=boots)
    def commit(self, seat: int, pick: int, index: int, boot: str | None) -> None:
        uid, model = self.picked(pick)
        is_ours = self.runs(model, seat)
        if is_ours and index not in model.boots:
            model.boots[index] = boot
            model.attempts = model.strikes = 0
        assert is_ours == self.tables[seat].commit(
            uid,
            self.servers[seat],
            ChunkRecord(index, ROWS, index, 10 * index if index else None, 0.5),
            boot=boot,
            points_per_s=1.0,
            ready_count=model.ready_count,
        )

    @precondition(lambda self: self.models)
    @rule(seat=seats, pick=picks, first=st.integers(0, 2))
    def settle(self, seat: int, pick: int, first: int) -> None:
        uid, model = self.picked(pick)
        indexes = sorted(model.boots)[first:]
        self.tables[seat].settle(uid, self.servers[seat], indexes)
        if self.runs(model, seat):
            model.boots.update(dict.fromkeys(indexes))

    @precondition(lambda self: self.models)
    @rule(seat=seats, pick=picks, boot=boots)
    def unsettle(self, seat: int, pick: int, boot: str | None) -> None:
        uid, model = self.picked(pick)
        self.tables[seat].unsettle(uid, self.servers[seat], boot)
        if self.runs(model, seat):
            model.boots = {
                index: of for index, of in model.boots.items() if of in (None, boot)
            }

    @precondition(lambda self: self.models)
    @rule(seat=seats, pick=picks, retry_in=st.none() | st.integers(1, 3))
    def release(self, seat: int, pick: int, retry_in: int | None) -> None:
        uid, model = self.picked(pick)
        is_ours = self.runs(model, seat)
        retry_at = None if retry_in is None else self.now + retry_in
        error = None if retry_in is None else b"full"
        assert is_ours == self.tables[seat].release(
            uid, self.servers[seat], error=error, retry_at=retry_at
        )
        if is_ours:
            model.state, model.owner, model.retry_at = "queued", None, retry_at
            model.attempts += error is not None

    @precondition(lambda self: self.models)
    @rule(seat=seats, pick=picks, is_good=st.booleans())
    def finish(self, seat: int, pick: int, is_good: bool) -> None:
        uid, model = self.picked(pick)
        is_ours = self.runs(model, seat)
        state = "succeeded" if is_good else "failed"
        assert is_ours == self.tables[seat].finish(uid, self.servers[seat], state)
        if is_ours:
            model.state, model.retry_at = state, None

    @rule(seat=seats, job_id=ids)
    def cancel(self, seat: int, job_id: str) -> None:
        named = self.named(job_id)
        job = self.tables[seat].cancel(job_id)
        assert (job is None) == (named is None)
        if named:
            self.stop(named[1])

    @rule(seat=seats, job_id=ids)
    def delete(self, seat: int, job_id: str) -> None:
        named = self.named(job_id)
        uid = self.tables[seat].delete(job_id)
        assert uid == (named[0] if named else None)
        if named:
            self.stop(named[1])
            named[1].is_deleted = True

    def stop(self, model: Model) -> None:
        if model.state in ("queued", "running"):
            model.state, model.retry_at = "cancelled", None

    @rule(seat=seats)
    def purge(self, seat: int) -> None:
        server = self.servers[seat]
        found = {job.uid for job in self.tables[seat].condemned(server, self.is_alive)}
        assert found == {
            uid
            for uid, model in self.models.items()
            if model.is_deleted and self.is_left(model, server)
        }
        for uid in found:
            self.tables[seat].purge(uid)
            del self.models[uid]

    @invariant()
    def all_is_as_in_the_model(self) -> None:
        if not self.tables:
            return
        named = {model.job_id for model in self.models.values() if not model.is_deleted}
        table = self.tables[0]
        assert {job.job_id for job in table.jobs(limit=99)} == named
        for uid, model in self.models.items():
            job = table.get(uid)
            assert job is not None
            self.check(job, model, table.chunks(uid))
        counts = dict.fromkeys(STATES, 0)
        for model in self.models.values():
            counts[model.state] += not model.is_deleted
        assert table.counts() == counts

    def check(self, job: JobRecord, model: Model, chunks: list[ChunkRecord]) -> None:
        assert (job.job_id, job.state, job.owner) == (
            model.job_id,
            model.state,
            model.owner,
        )
        assert (job.attempts, job.retry_at) == (model.attempts, model.retry_at)
        assert job.strikes == model.strikes
        assert job.chunk_size == model.chunk_size
        assert [chunk.index for chunk in chunks] == sorted(model.boots)
        assert job.done_count == ROWS * len(chunks)
        assert job.non_finite_count == sum(model.boots)
        assert job.execute_s == 0.5 * len(chunks)
        firsts = [10 * index for index in model.boots if index]
        assert job.first_non_finite == min(firsts, default=None)
        assert job.ready_count == model.ready_count
        assert (job.ended_at is None) == (job.state in ("queued", "running"))


def play(url: str, examples: int) -> None:
    machine: Callable[[], Machine] = type("Of", (Machine,), {"url": url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_the_table_does_what_a_simple_model_does() -> None:
    with tempfile.TemporaryDirectory() as folder:
        play(f"sqlite:///{Path(folder)}/jobs.sqlite", 10)


@pytest.mark.slow
def test_it_does_so_for_longer(url: str) -> None:
    play(url, 60)
