"""Jobs as no client would ask for them: typed errors, and the server goes on."""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, given, settings, strategies as st
from jaxtyping import Array, Float

import jacserve
from jacserve.errors import translated
from jacserve.streaming import pieces
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2
from jacserve_server import Registry, serving

registry = Registry()
SERVICE = "/jacserve.v1.JobService"
POINTS = np.linspace(0.5, 1.5, 15).reshape(5, 3)
LARGE = np.linspace(0.5, 1.5, 180_000).reshape(60_000, 3)


@registry.function
def square(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return x**2


@registry.function
def scaled(x: Float[Array, "n"], k: Float[Array, ""]) -> Float[Array, "n"]:
    return k * x


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "data").mkdir()
    np.save(folder / "data" / "points.npy", POINTS)
    with serving(
        registry,
        jobs_dir=folder / "jobs",
        storage_roots={"data": str(folder / "data")},
        result_roots={"out": str(folder / "data")},
    ) as server:
        yield server.target


class Raw:
    """Calls of bytes; they raise as a client's do."""

    def __init__(self, target: str, channel: grpc.Channel) -> None:
        self._target = target
        self._channel = channel

    def create(self, *parts: bytes) -> jobs_pb2.Job:
        call = self._channel.stream_unary(
            f"{SERVICE}/CreateJob", None, jobs_pb2.Job.FromString
        )
        with translated(self._target):
            return call(iter(parts), timeout=20)

    def ask(self, method: str, request: bytes) -> bytes:
        call = self._channel.unary_unary(f"{SERVICE}/{method}", None, None)
        with translated(self._target):
            return call(request, timeout=20)

    def follow(self, method: str, request: bytes) -> list[bytes]:
        call: Any = self._channel.unary_stream(f"{SERVICE}/{method}", None, None)
        with translated(self._target):
            return list(call(request, timeout=20))

    def end(self, job: jobs_pb2.Job) -> jobs_pb2.Job:
        """Returns a job at its end."""
        request = jobs_pb2.WatchJobRequest(name=job.name).SerializeToString()
        last = self.follow("WatchJob", request)[-1]
        return jobs_pb2.WatchJobResponse.FromString(last).job


@pytest.fixture(scope="module")
def raw(target: str) -> Iterator[Raw]:
    with grpc.insecure_channel(target) as channel:
        yield Raw(target, channel)


@pytest.fixture(autouse=True)
def _clean_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING)
    yield
    assert not [record for record in caplog.records if record.exc_info]


@pytest.fixture(autouse=True, scope="module")
def _whole_afterwards(raw: Raw) -> Iterator[None]:
    yield
    assert raw.end(raw.create(GOOD)).state == jobs_pb2.JOB_STATE_SUCCEEDED


def array(
    shape: tuple[int, ...] = (5, 3),
    dtype: Any = pb.DTYPE_FLOAT64,
    data: bytes | None = None,
    streamed_bytes: int | None = None,
) -> pb.Input:
    tensor = pb.Tensor(dtype=dtype, shape=shape)
    if data is not None:
        tensor.data = data
    if streamed_bytes is not None:
        tensor.streamed_bytes = streamed_bytes
    return pb.Input(tensor=tensor)


def head(
    *inputs: pb.Input,
    spec: dict[str, Any] | None = None,
    function: str = "functions/square",
    quantities: Any = (pb.QUANTITY_VALUE,),
    **query: Any,
) -> bytes:
    given = inputs or (array(data=POINTS.tobytes()),)
    asked = pb.Query(function=function, inputs=given, quantities=quantities, **query)
    made = jobs_pb2.JobSpec(query=asked, **(spec or {}))
    return jobs_pb2.CreateJobRequest(head=made).SerializeToString()


def source(path: str, name: str = "") -> pb.Input:
    return pb.Input(source=pb.Source(path=path, array=name))


BOTH = array(data=POINTS.tobytes())
BOTH.source.path = "data/points.npy"
GOOD = head()
STREAMED = head(array(LARGE.shape, streamed_bytes=LARGE.nbytes))
PIECES = list(pieces(0, 0, LARGE.view(np.uint8).reshape(-1)))
AXIS = 2**31 - 1

BROKEN: dict[str, tuple[bytes, ...]] = {
    "nothing": (),
    "empty": (b"",),
    "noise": (bytes(range(255, 0, -1)),),
    **{f"cut at {n}": (GOOD[:n],) for n in (1, 2, 5, 10, 20, len(GOOD) - 1)},
    "without a head": (PIECES[0],),
    "two heads": (STREAMED, STREAMED),
    "without the last piece": (STREAMED, *PIECES[:-1]),
    "out of order": (STREAMED, PIECES[1], PIECES[0]),
    "a piece twice": (STREAMED, PIECES[0], PIECES[0]),
    "a piece too many": (STREAMED, *PIECES, PIECES[0]),
    "an empty piece": (STREAMED, b"\x7a\x02\x1a\x00"),
    "noise for a piece": (STREAMED, b"xx"),
    "a piece of what the head has": (GOOD, PIECES[0]),
    "a piece of a source": (head(source("data/points.npy")), PIECES[0]),
    "data and streamed_bytes": (
        head(array(data=POINTS.tobytes(), streamed_bytes=POINTS.nbytes)),
    ),
    "as many as no disk": (head(array((AXIS, 3), streamed_bytes=AXIS * 24)),),
}


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN)
def test_broken_streams(raw: Raw, parts: tuple[bytes, ...]) -> None:
    with pytest.raises(jacserve.JacobianError) as caught:
        raw.create(*parts)
    assert caught.value.reason in {"STREAM_BROKEN", "STORAGE_UNAVAILABLE"}


WRONG: dict[str, tuple[bytes, str]] = {
    "without bytes": (head(array((AXIS, 3))), "MALFORMED_TENSOR"),
    "2^93 numbers": (
        head(array((AXIS,) * 3, streamed_bytes=2**62)),
        "QUERY_TOO_LARGE",
    ),
    "2^64 numbers, wrapped": (
        head(array((2**32, 2**32), streamed_bytes=0)),
        "MALFORMED_TENSOR",
    ),
    "an empty array of 2^62": (
        head(array((AXIS, 0, AXIS), streamed_bytes=0)),
        "MALFORMED_TENSOR",
    ),
    "a negative axis": (head(array((-1, 3), data=b"")), "MALFORMED_TENSOR"),
    "no points": (head(array((0, 3), data=b"")), "SHAPE_MISMATCH"),
    "one point": (head(array((3,), data=POINTS[0].tobytes())), "SHAPE_MISMATCH"),
    "no tensor": (head(pb.Input()), "MALFORMED_TENSOR"),
    "no dtype": (head(array(dtype=0, data=POINTS.tobytes())), "MALFORMED_TENSOR"),
    "dtype 99": (head(array(dtype=99, data=POINTS.tobytes())), "MALFORMED_TENSOR"),
    "quantity 99": (head(quantities=[99]), "MALFORMED_REQUEST"),
    "no quantity": (head(quantities=[]), "MALFORMED_REQUEST"),
    "mode 77": (head(mode=77), "MALFORMED_REQUEST"),
    "layout -1": (head(layout=-1), "MALFORMED_REQUEST"),
    "exact": (head(exact=True), "MALFORMED_REQUEST"),
    "patterns": (head(patterns=["x"]), "MALFORMED_REQUEST"),
    "no function": (head(function=""), "FUNCTION_NOT_FOUND"),
    "both": (head(BOTH), "MALFORMED_REQUEST"),
    "no such root": (head(source("etc/passwd")), "SOURCE_FORBIDDEN"),
    "out of the root": (head(source("data/../points.npy")), "SOURCE_FORBIDDEN"),
    "no such file": (head(source("data/none.npy")), "SOURCE_UNREADABLE"),
    "no such array": (head(source("data/points.npy", "x")), "SOURCE_UNREADABLE"),
    "batch_size -1": (head(spec={"batch_size": -1}), "MALFORMED_REQUEST"),
    "output out of the root": (
        head(spec={"output": "out/../x.zarr"}),
        "SOURCE_FORBIDDEN",
    ),
    **{
        f"ttl {ttl.seconds} {ttl.nanos}": (
            head(spec={"ttl": ttl}),
            "MALFORMED_REQUEST",
        )
        for ttl in (
            Duration(seconds=-1),
            Duration(seconds=2**63 - 1),
            Duration(seconds=-(2**63)),
            Duration(seconds=315_576_000_001),
            Duration(nanos=-1),
            Duration(nanos=10**9),
        )
    },
    **{
        f"id {name!r}": (head(spec={"job_id": name}), "MALFORMED_REQUEST")
        for name in ("a/b", "..", "-x", "a" * 64, "é", "a\n", "jobs/x", "a\0", "٣")
    },
}


@pytest.mark.parametrize(("part", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_jobs(raw: Raw, part: bytes, reason: str) -> None:
    with pytest.raises(jacserve.JacobianError) as caught:
        raw.create(part)
    assert caught.value.reason == reason


@pytest.mark.parametrize("batch_size", [6, 2**20, 2**31, 2**40, 2**63 - 1])
def test_a_batch_is_no_larger_than_its_job(raw: Raw, batch_size: int) -> None:
    job = raw.end(raw.create(head(spec={"batch_size": batch_size})))
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED
    assert (job.batch_size, job.chunk_size) == (5, 5)


@pytest.mark.parametrize(
    "method",
    ["GetJob", "ListJobs", "CancelJob", "DeleteJob", "WatchJob", "ReadJobResult"],
)
@pytest.mark.parametrize("request_bytes", [b"\xff\xff\xff", b"\x0a\x05x"])
def test_requests_that_cant_be_read(
    raw: Raw, method: str, request_bytes: bytes
) -> None:
    is_stream = method in {"WatchJob", "ReadJobResult"}
    call = raw.follow if is_stream else raw.ask
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        call(method, request_bytes)
    assert caught.value.reason == "MALFORMED_REQUEST"


@pytest.mark.parametrize("method", ["GetFunction", "ListFunctions", "GetSparsity"])
def test_other_requests_that_cant_be_read(target: str, method: str) -> None:
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(f"/jacserve.v1.JacobianService/{method}", None, None)
        with pytest.raises(jacserve.InvalidRequestError) as caught, translated(target):
            call(b"\xff\xff\xff", timeout=20)
    assert caught.value.reason == "MALFORMED_REQUEST"


@pytest.mark.parametrize(
    "name",
    ["", "jobs/", "jobs/jobs/x", "x" * 100_000, "\0", "jobs/../..", "' or 1; --"],
)
def test_jobs_that_are_not_there(raw: Raw, name: str) -> None:
    request = jobs_pb2.GetJobRequest(name=name).SerializeToString()
    asks: list[Callable[[], object]] = [
        *(
            lambda method=method: raw.ask(method, request)
            for method in ("GetJob", "CancelJob", "DeleteJob")
        ),
        *(
            lambda method=method: raw.follow(method, request)
            for method in ("WatchJob", "ReadJobResult")
        ),
    ]
    for ask in asks:
        with pytest.raises(jacserve.NotFoundError) as caught:
            ask()
        assert caught.value.reason == "JOB_NOT_FOUND"


@pytest.mark.parametrize(
    "fields",
    [
        {"page_size": -1},
        {"page_token": "x"},
        {"page_token": f"nan-{'0' * 32}"},
        {"page_token": f"{'1' * 400}.0-{'0' * 32}"},
        {"states": [0]},
        {"states": [9]},
    ],
)
def test_pages_that_are_none(raw: Raw, fields: dict[str, Any]) -> None:
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        raw.ask("ListJobs", jobs_pb2.ListJobsRequest(**fields).SerializeToString())
    assert caught.value.reason == "MALFORMED_REQUEST"
    assert str(caught.value.field).startswith(next(iter(fields)))


def test_a_state_named_very_often(raw: Raw) -> None:
    raw.end(raw.create(GOOD))
    states: Any = [3] * 200_000
    request = jobs_pb2.ListJobsRequest(states=states, page_size=1)
    large = jobs_pb2.ListJobsRequest(states=states * 2).SerializeToString()
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        raw.ask("ListJobs", large)
    assert caught.value.reason == "MALFORMED_REQUEST"
    page = raw.ask("ListJobs", request.SerializeToString())
    assert len(jobs_pb2.ListJobsResponse.FromString(page).jobs) == 1


def read(raw: Raw, job: jobs_pb2.Job, **fields: Any) -> list[bytes]:
    request = jobs_pb2.ReadJobResultRequest(name=job.name, **fields)
    return raw.follow("ReadJobResult", request.SerializeToString())


@pytest.mark.parametrize(
    ("start", "count"),
    [(-1, 1), (0, -1), (5, 0), (0, 6), (2**62, 2**62), (-(2**63), 2**63 - 1)],
)
def test_ranges_that_are_none(raw: Raw, start: int, count: int) -> None:
    job = raw.end(raw.create(GOOD))
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        read(raw, job, start=start, count=count)
    assert caught.value.reason == "MALFORMED_REQUEST"


def test_quantities_that_are_not_there_or_named_very_often(raw: Raw) -> None:
    job = raw.end(raw.create(GOOD))
    for number in (pb.QUANTITY_JACOBIAN, 0, 99):
        with pytest.raises(jacserve.InvalidRequestError) as caught:
            read(raw, job, quantities=[pb.QUANTITY_VALUE, number])
        assert caught.value.reason == "QUANTITY_UNSUPPORTED"
    often = read(raw, job, quantities=[pb.QUANTITY_VALUE] * 100_000)
    assert often == read(raw, job)


def test_a_source_is_for_jobs_alone(target: str) -> None:
    query = pb.Query(
        function="functions/square",
        inputs=[source("data/points.npy")],
        quantities=[pb.QUANTITY_VALUE],
    )
    service = "/jacserve.v1.JacobianService"
    with grpc.insecure_channel(target) as channel:
        unary = channel.unary_unary(f"{service}/Evaluate", None, None)
        with pytest.raises(jacserve.InvalidRequestError), translated(target):
            unary(query.SerializeToString(), timeout=20)
        stream: Any = channel.stream_stream(f"{service}/EvaluateStream", None, None)
        part = pb.EvaluateStreamRequest(head=query).SerializeToString()
        with pytest.raises(jacserve.InvalidRequestError), translated(target):
            list(stream(iter([part]), timeout=20))


# --- Noise ----------------------------------------------------------------------------


@st.composite
def mangled(draw: st.DrawFn) -> list[bytes]:
    """The parts of a job, of which some bytes are others."""
    whole = draw(st.sampled_from([GOOD, head(source("data/points.npy")), STREAMED]))
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(changed) - 1))
        match draw(st.sampled_from(["set", "cut", "insert", "double"])):
            case "set":
                changed[place] = draw(st.integers(0, 255))
            case "cut":
                del changed[place : place + draw(st.integers(1, 8))]
            case "insert":
                changed[place:place] = draw(st.binary(min_size=1, max_size=8))
            case _:
                changed[place:place] = changed[place : place + 16]
        if not changed:
            break
    more = draw(st.sampled_from([(), PIECES, PIECES[:1]]))
    return [bytes(changed), *more]


def check_noise(raw: Raw, parts: list[bytes]) -> None:
    """It is a job, or a typed error; never a fault of the server."""
    try:
        job = raw.create(*parts)
    except jacserve.JacobianError as error:
        assert error.reason not in {None, "", "UNEXPECTED"}, error  # noqa: PT017
        return
    raw.ask("DeleteJob", jobs_pb2.DeleteJobRequest(name=job.name).SerializeToString())


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(mangled())
def test_noise_in_a_job(raw: Raw, parts: list[bytes]) -> None:
    check_noise(raw, parts)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=QUIET)
@given(mangled())
def test_much_noise_in_jobs(raw: Raw, parts: list[bytes]) -> None:
    check_noise(raw, parts)


def test_nothing_is_left_of_what_was_refused(tmp_path: Path) -> None:
    """No file, thread or open file after all of the above."""

    def counts() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with serving(registry, jobs_dir=tmp_path / "jobs") as server:
        with grpc.insecure_channel(server.target) as channel:
            calls = Raw(server.target, channel)
            calls.end(calls.create(GOOD))
            bad = [*BROKEN.values(), *((part,) for part, _ in WRONG.values())]

            def refuse() -> None:
                for parts in bad:
                    with pytest.raises(jacserve.JacobianError):
                        calls.create(*parts)

            refuse()
            before = counts()
            refuse()
            deadline = time.monotonic() + 10
            while counts() > before and time.monotonic() < deadline:
                time.sleep(0.05)  # Threads of other servers may be ending.
            assert counts() <= before
    [upload] = (tmp_path / "jobs" / "uploads").iterdir()
    assert upload.is_dir()


def test_a_table_that_cant_be_opened_holds_nothing(tmp_path: Path) -> None:
    """However often it is tried; and once it is mended, jobs run."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as newer:
        newer.execute("create table jacserve_schema (version integer primary key)")
        newer.execute("insert into jacserve_schema values (99)")
        newer.commit()
    with serving(registry, jobs_dir=folder) as server:
        with grpc.insecure_channel(server.target) as channel:
            calls = Raw(server.target, channel)
            for _ in range(3):
                with pytest.raises(
                    jacserve.JacobianError, match=r"version 99.*database\. Mend"
                ):
                    calls.create(GOOD)
            assert not list((folder / "servers").iterdir())
            (folder / "jobs.sqlite").unlink()
            job = calls.end(calls.create(GOOD))
            assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED
