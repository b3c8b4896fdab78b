"""What a job is asked with, and what is read of the answers."""

import math
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from google.rpc import code_pb2, status_pb2

import jacserve
from jacserve import framing, sparse, streaming, tensors
from jacserve.evaluation import Received, Receiver
from jacserve.job_messages import (
    JobProgress,
    JobRequest,
    decode_job,
    encode_job,
    encode_read_request,
)
from jacserve.job_reading import News, decode_rows, next_stop
from jacserve.patience import Patience
from jacserve.results import ResultDecoder
from jacserve.sparse import Pattern
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2
from jacserve.vocabulary import JOB_STATES

X = np.random.default_rng(0).normal(size=(100_000, 3))


def request(inputs: Any = X, options=None, **changes) -> JobRequest:
    settled = {
        "id": None, "batch_size": None, "output": None, "ttl_s": None,
        "on_error": "record", **changes,
    }  # fmt: skip
    return encode_job("f", inputs, "value", options or {}, **settled)


def received(made: JobRequest) -> tuple[jobs_pb2.JobSpec, list[bytes]]:
    """Puts the parts of a request together again."""
    first, *rest = made.to_parts()
    part, holes = streaming.read_head(first, jobs_pb2.CreateJobRequest)
    assembly = streaming.Assembly(first, holes)
    for raw in rest:
        assert len(raw) < framing.PIECE_BYTES + 100
        assembly.feed(raw)
    assert assembly.is_complete
    return part.head, [bytes(payload) for payload in assembly.payloads]


def test_arrays_sources_and_files_go_to_their_places(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    swapped = np.asfortranarray(X[:, ::-1]).astype(">f8")
    spec, payloads = received(
        request(
            {
                "a": jacserve.Source("data/points.zarr", "a"),
                "b": tmp_path / "x.npy",
                "c": np.zeros(0),
                "d": swapped,
            },
            {
                "tangents": (jacserve.Source("data/v.npy"),),
                "cotangents": {"u": np.arange(2.0), "w": jacserve.Source("data/w.npy")},
            },
        )
    )
    query = spec.query
    assert [entry.name for entry in query.inputs] == ["a", "b", "c", "d"]
    assert query.inputs[0].source == pb.Source(path="data/points.zarr", array="a")
    assert not query.inputs[0].HasField("tensor")
    assert list(query.inputs[1].tensor.shape) == [100_000, 3]
    assert query.tangents[0].source.path == "data/v.npy"
    assert query.cotangents[1].source.path == "data/w.npy"
    assert payloads == [
        X.tobytes(), np.ascontiguousarray(swapped, "<f8").tobytes(),
        np.arange(2.0).tobytes(),
    ]  # fmt: skip


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    [mapped] = request(tmp_path / "x.npy").arrays
    base = mapped
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert np.shares_memory(tensors.bytes_of(mapped), mapped)


def test_what_a_job_is_told() -> None:
    made = request(
        on_error="fail", id="night-1", batch_size=7, output="out/a.zarr", ttl_s=1.5
    )
    spec = made.spec
    assert (spec.job_id, spec.batch_size, spec.output) == ("night-1", 7, "out/a.zarr")
    assert spec.ttl.ToTimedelta().total_seconds() == 1.5
    assert spec.query.require_finite
    plain = request().spec
    assert not plain.query.require_finite
    assert not plain.HasField("ttl")
    assert len(plain.job_id) == 32
    assert plain.job_id != request().spec.job_id


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"on_error": "skip"}, ValueError, "on_error is 'skip'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"ttl_s": -1}, ValueError, "ttl_s is -1"),
        ({"ttl_s": math.nan}, ValueError, "ttl_s is nan"),
        ({"options": {"exact": True}}, TypeError, "no option exact"),
        ({"options": {"require_finite": True}}, TypeError, "no option require_finite"),
        ({"options": {"mode": "foo"}}, ValueError, "'foo', which does not exist"),
        ({"inputs": {"x": Path("x.npz")}}, ValueError, "x.npz is no .npy file"),
        ({"inputs": Path("nowhere.npz")}, FileNotFoundError, "nowhere.npz"),
        ({"inputs": Path("nowhere.npy")}, FileNotFoundError, "nowhere.npy"),
        ({"inputs": "x.npy"}, ValueError, "can't be sent"),
        (
            {"inputs": jacserve.Source(cast("Any", 3))},
            TypeError,
            "the path of a source is 3",
        ),
    ],
)
def test_what_a_job_can_not_be_told(changes, kind, words: str) -> None:
    with pytest.raises(kind, match=words):
        request(**changes)


def test_a_source_is_for_jobs() -> None:
    with jacserve.Client("127.0.0.1:1") as client:
        with pytest.raises(ValueError, match=r"x: a Source is .* Use submit_job"):
            client.evaluate("f", {"x": jacserve.Source("data/x.npy")})


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 0), (5, -3)])
def test_a_range_that_is_none(start: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"starts at {start} and has {count} points"):
        encode_read_request("a", start, count, None)


def job_message(**fields) -> jobs_pb2.Job:
    query = pb.Query(function="functions/f@2", quantities=[pb.QUANTITY_JACOBIAN])
    return jobs_pb2.Job(name="jobs/night-1", query=query, **fields)


def test_a_job_as_a_value() -> None:
    now = datetime(2031, 5, 1, 12, 30, tzinfo=UTC)
    waits = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="disk is full")
    message = job_message(state=jobs_pb2.JOB_STATE_QUEUED, error=waits, create_time=now)
    info = decode_job(message, "host:1")
    assert (info.id, info.function, info.quantities) == (
        "night-1",
        "f@2",
        ("jacobian",),
    )
    assert info.state == "queued"
    assert not info.has_ended
    assert "disk is full" in str(info.error)
    assert (info.created, info.started, info.retries) == (now, None, None)
    assert (info.batch_size, info.progress.first_non_finite) == (None, None)
    progress = jobs_pb2.JobProgress(first_non_finite=0, non_finite_count=2)
    message = job_message(state=jobs_pb2.JOB_STATE_FAILED, progress=progress)
    info = decode_job(message, "host:1")
    assert info.progress.first_non_finite == 0
    assert info.error is None
    with pytest.raises(jacserve.ServerError, match="night-1 has failed"):
        info.raise_unless_succeeded()


def test_every_state_is_a_word() -> None:
    for word, number in JOB_STATES.items():
        info = decode_job(job_message(state=number), "host:1")
        assert info.state == word
        assert info.has_ended == (word not in {"queued", "running"})


def test_how_much_is_left() -> None:
    def progress(points: int, done: int, rate: float) -> JobProgress:
        return JobProgress(points, done, done, 0, None, rate, None, 0.0)

    half = progress(1000, 500, 50.0)
    assert (half.fraction, half.remaining_s) == (0.5, 10.0)
    assert progress(1000, 500, 0.0).remaining_s is None
    assert progress(1000, 1000, 0.0).remaining_s == 0.0
    assert (progress(0, 0, 0.0).fraction, progress(0, 0, 0.0).remaining_s) == (0, None)


@pytest.mark.parametrize(
    ("start", "ready", "chunk", "stop"),
    [
        (0, 0, 10, None), (0, 7, 10, 7), (7, 30, 10, 10), (10, 30, 10, 20),
        (30, 30, 10, None), (99, 30, 10, None), (5, 30, 0, 30),
    ],
)  # fmt: skip
def test_where_a_chunk_stops(start: int, ready: int, chunk: int, stop) -> None:
    progress = jobs_pb2.JobProgress(point_count=30, ready_count=ready)
    message = job_message(state=2, chunk_size=chunk, progress=progress)
    assert next_stop(start, decode_job(message, "host:1")) == stop


# --- Results of jobs ------------------------------------------------------------------

PATTERN = Pattern.of((2, 2), np.array([0, 1]), np.array([1, 0]))
FINITE = np.array([True, False, True])
VALUES = np.arange(6.0).reshape(3, 2)


def result_parts(*, is_sparse: bool) -> tuple[pb.Result, list[np.ndarray]]:
    head = pb.Result(function="functions/f@1")
    head.timing.SetInParent()
    output = head.outputs.add(quantity=pb.QUANTITY_JACOBIAN)
    payloads = [tensors.describe_into(output.tensor, VALUES)]
    if is_sparse:
        output.pattern = PATTERN.hash
        pattern, indices = sparse.describe_pattern(PATTERN, "csr")
        head.patterns.append(pattern)
        payloads += indices
    payloads.append(tensors.describe_into(head.finite_points, FINITE))
    return head, payloads


@pytest.mark.parametrize("is_sparse", [False, True])
def test_finite_points_come_after_patterns(is_sparse: bool) -> None:
    receiver = Receiver(jobs_pb2.ReadJobResultResponse)
    for raw in streaming.parts(*result_parts(is_sparse=is_sparse)):
        receiver.feed(raw)
    result = decode_rows(receiver.received(), "csr" if is_sparse else None)
    assert result.finite_points is not None
    np.testing.assert_array_equal(result.finite_points, FINITE)
    result.finite_points[:] = True  # The caller's own.
    jacobian = result.quantities["jacobian"]
    np.testing.assert_array_equal(jacobian.data if is_sparse else jacobian, VALUES)


def test_finite_points_of_an_answer_that_is_known_again() -> None:
    head, payloads = result_parts(is_sparse=False)
    decoder = ResultDecoder()
    for flags in (FINITE, ~FINITE):
        # As servers send it: the timing first.
        timing = framing.bytes_field(pb.Result.TIMING_FIELD_NUMBER, 0)
        head.ClearField("timing")
        raw = framing.Frame(head).filled([payloads[0], flags], timing)
        result = decoder.decode(raw)
        assert result.finite_points is not None
        np.testing.assert_array_equal(result.finite_points, flags)
        np.testing.assert_array_equal(result.jacobian, VALUES)


@pytest.mark.parametrize("wrong", [np.ones(3), np.ones((3, 1), bool)])
def test_finite_points_that_are_none(wrong: np.ndarray) -> None:
    head, [values, _] = result_parts(is_sparse=False)
    head.ClearField("finite_points")
    flags = tensors.describe_into(head.finite_points, wrong)
    with pytest.raises(jacserve.ServerError, match="not a row of bool"):
        decode_rows(Received(head, [values, flags]), None)


# --- Patience -------------------------------------------------------------------------

AWAY = jacserve.UnavailableError("away", code="UNAVAILABLE")


def test_patience_waits_longer_and_longer_and_then_gives_up() -> None:
    random.seed(0)
    patience = Patience(0.2)
    waits = [patience.wait_s(AWAY) for _ in range(3)]
    assert 0 < waits[0] <= 0.2
    time.sleep(0.21)
    with pytest.raises(jacserve.UnavailableError, match="away"):
        patience.wait_s(AWAY)
    patience.renew()
    assert 0 < patience.wait_s(AWAY) <= 0.2
    waits = [Patience.wait_s(patient, AWAY) for patient in [Patience(60)] * 9]
    assert max(waits) <= 5
    assert waits[-1] > waits[0]


def news(patience_s: float = 60.0, timeout_s: float | None = None) -> News:
    last = decode_job(job_message(state=jobs_pb2.JOB_STATE_RUNNING), "host:1")
    return News(last, "host:1", patience_s=patience_s, timeout_s=timeout_s)


def test_news_that_is_known_is_no_news() -> None:
    follower = news()
    follower.opens()
    running = job_message(state=jobs_pb2.JOB_STATE_RUNNING)
    assert follower.hears(running)
    assert follower.hears(running) is None
    ended = job_message(state=jobs_pb2.JOB_STATE_SUCCEEDED)
    assert follower.hears(ended) is follower.last


def test_a_stream_that_ends_before_its_job_is_opened_again() -> None:
    follower = news()
    late = jacserve.DeadlineError("late", code="DEADLINE_EXCEEDED")
    follower.opens()
    assert follower.pause_s(AWAY) > 0
    assert follower.pause_s(None) > 0
    assert follower.pause_s(late) > 0
    follower.hears(job_message(state=jobs_pb2.JOB_STATE_RUNNING))
    # It was heard until its time was up, so nobody is away.
    assert follower.pause_s(late) == 0
    gone = jacserve.NotFoundError("gone", code="NOT_FOUND")
    with pytest.raises(jacserve.NotFoundError, match="gone"):
        follower.pause_s(gone)
    with pytest.raises(jacserve.UnavailableError, match="says no more of job night-1"):
        news(patience_s=0).pause_s(None)
    with pytest.raises(jacserve.DeadlineError, match="not ended within 0 s"):
        news(timeout_s=0.0).pause_s(late)
