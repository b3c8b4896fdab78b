"""A job belongs to who made it; nobody else finds, stops or reads it."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import grpc
import jax
import numpy as np
import pytest
from google.protobuf.message import Message
from jaxtyping import Array, Float

from guarded import Answer, Tokens, ask, bearer, connected
from jacserve.v1 import jobs_pb2 as pb
from jacserve_server import Registry, serving
from job_calls import FINAL, QUEUED, RUNNING, SUCCEEDED, upload

registry = Registry()


@registry.function
def slow(x: Float[Array, "3"]) -> Float[Array, "3"]:
    def waited(x: np.ndarray) -> np.ndarray:
        time.sleep(0.02)
        return x

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(waited, shape, x, vmap_method="sequential")


_JOBS = "/jacserve.v1.JobService/"


@registry.function
def double(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return 2 * x


class Caller:
    """Calls JobService with a token."""

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = bearer(token)

    def ask(self, method: str, *requests: bytes | Message) -> Answer:
        raws = [x if isinstance(x, bytes) else x.SerializeToString() for x in requests]
        return ask(self._channel, f"{_JOBS}{method}", raws, self._metadata)

    def create(self, job_id: str, count: int = 10, **spec: Any) -> Answer:
        x = np.arange(3.0 * count).reshape(count, 3)
        return self.ask("CreateJob", *upload(job_id, "double", x, **spec))

    def job(self, job_id: str, owner: str = "") -> pb.Job:
        found = self.ask("GetJob", pb.GetJobRequest(name=job_id, owner=owner))
        assert found.code is grpc.StatusCode.OK, found
        return pb.Job.FromString(found.parts[0])

    def listed(self, owner: str = "", **page: Any) -> list[tuple[str, str]]:
        found = self.ask("ListJobs", pb.ListJobsRequest(owner=owner, **page))
        assert found.code is grpc.StatusCode.OK, found
        jobs = pb.ListJobsResponse.FromString(found.parts[0]).jobs
        return [(job.owner, job.name) for job in jobs]

    def wait(self, job_id: str) -> None:
        found = self.ask("WatchJob", pb.WatchJobRequest(name=job_id))
        job = pb.WatchJobResponse.FromString(found.parts[-1]).job
        assert job.state in FINAL, found


Serve = Callable[..., Callable[..., Caller]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serves, and returns what makes callers of names and scopes."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Callable[..., Caller]:
            tokens = Tokens(tmp_path)
            made = {
                "ada": tokens.make("ada", "jobs"),
                "bob": tokens.make("bob", "jobs"),
                "root": tokens.make("root", "jobs", "admin"),
                "status": tokens.make("status", "admin"),
            }
            settings |= {"tokens_file": tokens.path, "jobs_dir": tmp_path / "jobs"}
            server = stack.enter_context(serving(registry, **settings))
            channel = stack.enter_context(connected(server.target))
            return lambda name: Caller(channel, made[name])

        yield start


REQUESTS: dict[str, Callable[..., Message]] = {
    "GetJob": pb.GetJobRequest,
    "WatchJob": pb.WatchJobRequest,
    "CancelJob": pb.CancelJobRequest,
    "ReadJobResult": pb.ReadJobResultRequest,
    "DeleteJob": pb.DeleteJobRequest,
}


def test_a_job_is_its_owners_alone(serve: Serve) -> None:
    caller = serve()
    ada, bob, root, status = map(caller, ("ada", "bob", "root", "status"))
    assert ada.create("night").code is grpc.StatusCode.OK
    assert ada.job("night").owner == "token:ada"
    ada.wait("night")
    uid_path = ada.job("night").output.partition("/")[2]
    for method, request in REQUESTS.items():
        absent = bob.ask(method, request(name="absent"))
        for name in ("night", "jobs/night", uid_path, uid_path.partition(".")[0]):
            found = bob.ask(method, request(name=name))
            assert found.reason == "JOB_NOT_FOUND", found
            # Nor does it show in any other way that the id is known.
            bare = name.removeprefix("jobs/")
            assert found.text.count(bare) == absent.text.count("absent")
        found = bob.ask(method, request(name="night", owner="token:ada"))
        assert found.reason == "SCOPE_MISSING"
        assert bob.ask(method, request(name="night", owner="-")).reason == (
            "SCOPE_MISSING"
        )
        # Another's scope is not enough without that of jobs.
        found = status.ask(method, request(name="night", owner="token:ada"))
        assert found.reason == "SCOPE_MISSING"
        # Of its own, an administrator has no such job.
        assert root.ask(method, request(name="night")).reason == "JOB_NOT_FOUND"
    assert bob.listed() == []
    for owner in ("token:ada", "-", "token:root"):
        found = bob.ask("ListJobs", pb.ListJobsRequest(owner=owner))
        assert found.reason == "SCOPE_MISSING"
    assert ada.job("night").state == SUCCEEDED
    assert ada.job("night", owner="token:ada").state == SUCCEEDED


def test_administrators_may_name_whose_job_it_is(serve: Serve) -> None:
    caller = serve()
    ada, bob, root = map(caller, ("ada", "bob", "root"))
    for owner in (ada, bob):
        assert owner.create("same").code is grpc.StatusCode.OK
        owner.wait("same")
    mine, theirs = ("token:ada", "jobs/same"), ("token:bob", "jobs/same")
    assert root.listed("-") == [theirs, mine]
    assert root.listed("token:ada") == [mine]
    assert root.listed("token:ada", states=[pb.JOB_STATE_FAILED]) == []
    assert root.listed() == []
    assert ada.listed() == ada.listed("token:ada") == [mine]
    for method, request in REQUESTS.items():
        found = root.ask(method, request(name="same", owner="token:ada"))
        assert found.code is grpc.StatusCode.OK, found
    assert ada.listed() == []
    assert bob.listed() == [theirs]
    assert bob.job("same").state == SUCCEEDED


def test_ids_are_everybodys_own(serve: Serve) -> None:
    caller = serve()
    ada, bob = caller("ada"), caller("bob")
    assert ada.create("j", 10).code is grpc.StatusCode.OK
    assert bob.create("j", 20).code is grpc.StatusCode.OK
    assert bob.create("j", 20).code is grpc.StatusCode.OK
    assert bob.create("j", 10).reason == "JOB_ALREADY_EXISTS"
    assert ada.job("j").progress.point_count == 10
    assert bob.job("j").progress.point_count == 20
    assert ada.job("j").output != bob.job("j").output


def test_nobody_reads_the_results_of_others_from_storage(
    serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    caller = serve(
        storage_roots={"data": str(tmp_path / "data")},
        result_roots={"out": str(tmp_path / "out")},
    )
    ada, bob = caller("ada"), caller("bob")
    ada.create("night")
    ada.create("named", output="out/named.zarr")
    for job_id in ("night", "named"):
        ada.wait(job_id)
    output = ada.job("night").output
    uid = output.partition("/")[2]
    [head, *_] = upload("theft", "double", np.zeros((1, 3)))
    for path in (output, f"data/../{output}", f"data/{uid}", "out/named.zarr"):
        part = pb.CreateJobRequest.FromString(head)
        part.head.query.inputs[0].ClearField("tensor")
        part.head.query.inputs[0].source.path = path
        part.head.query.inputs[0].source.array = "jacobian"
        assert bob.ask("CreateJob", part).reason in (
            "SOURCE_FORBIDDEN",
            "SOURCE_UNREADABLE",
        )
    # Nor are they written over.
    found = bob.create("over", output="out/named.zarr")
    assert found.code is not grpc.StatusCode.OK
    assert bob.create("over", output=output).reason == "SOURCE_FORBIDDEN"
    assert bob.listed() == []


def test_one_identity_has_its_part_of_the_jobs(serve: Serve) -> None:
    caller = serve(max_identity_jobs=2, max_jobs=100, max_running_jobs=1)
    ada, bob = caller("ada"), caller("bob")
    # These take long enough for all to be there at once.
    for number in range(2):
        assert ada.create(f"j{number}", 200_000).code is grpc.StatusCode.OK
    unfinished = {QUEUED, RUNNING}
    if {ada.job("j0").state, ada.job("j1").state} <= unfinished:
        found = ada.create("j2", 200_000)
        assert found.reason == "TOO_MANY_JOBS", found
        assert "of one identity" in found.text
    assert bob.create("j2").code is grpc.StatusCode.OK
    for number in range(2):
        ada.ask("CancelJob", pb.CancelJobRequest(name=f"j{number}"))
    assert ada.create("j2").code is grpc.StatusCode.OK


def test_jobs_keep_their_owner_across_restarts(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    ada, bob = tokens.make("ada", "jobs"), tokens.make("bob", "jobs")
    settings: dict[str, Any] = {
        "tokens_file": tokens.path,
        "jobs_dir": tmp_path / "jobs",
    }
    with serving(registry, **settings) as server:
        with closing(grpc.insecure_channel(server.target)) as channel:
            caller = Caller(channel, ada)
            assert caller.create("night").code is grpc.StatusCode.OK
            caller.wait("night")
    # A new token of the same name has the same jobs.
    tokens.revoke("ada")
    with serving(registry, **settings) as server:
        with connected(server.target) as channel:
            assert Caller(channel, ada).create("x").reason == "TOKEN_INVALID"
    renewed = tokens.make("ada", "jobs")
    with serving(registry, **settings) as server:
        with connected(server.target) as channel:
            assert Caller(channel, renewed).job("night").owner == "token:ada"
            assert Caller(channel, bob).listed() == []
            found = Caller(channel, renewed).ask(
                "ReadJobResult", pb.ReadJobResultRequest(name="night")
            )
            assert found.code is grpc.StatusCode.OK


def test_administrators_have_the_jobs_of_nobody(tmp_path: Path) -> None:
    tokens, jobs_dir = Tokens(tmp_path), tmp_path / "jobs"
    ada, root = tokens.make("ada", "jobs"), tokens.make("root", "jobs", "admin")
    with serving(registry, jobs_dir=jobs_dir) as server:
        with connected(server.target) as channel:
            nobody = Caller(channel, "")
            assert nobody.create("old").code is grpc.StatusCode.OK
            nobody.wait("old")
            assert nobody.listed() == [("", "jobs/old")]
    with serving(registry, jobs_dir=jobs_dir, tokens_file=tokens.path) as server:
        with connected(server.target) as channel:
            user, admin = Caller(channel, ada), Caller(channel, root)
            refused = user.ask("GetJob", pb.GetJobRequest(name="old", owner="nobody"))
            assert refused.reason == "SCOPE_MISSING"
            assert user.listed() == []
            assert admin.listed("nobody") == admin.listed("-") == [("", "jobs/old")]
            for method, request in REQUESTS.items():
                found = admin.ask(method, request(name="old", owner="nobody"))
                assert found.code is grpc.StatusCode.OK, found
            assert admin.listed("nobody") == []


@pytest.mark.slow
def test_who_watches_a_job_is_asked_again(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    ada = tokens.make("ada", "jobs")
    settings = {"tokens_file": tokens.path, "jobs_dir": tmp_path / "jobs"}
    with serving(registry, **settings) as server, connected(server.target) as channel:
        x = np.zeros((100_000, 3))
        parts = upload("night", "slow", x, "value", batch_size=10)
        assert Caller(channel, ada).ask("CreateJob", *parts).code is grpc.StatusCode.OK
        request = pb.WatchJobRequest(name="night").SerializeToString()
        watching = channel.unary_stream(f"{_JOBS}WatchJob")(
            request, metadata=bearer(ada), timeout=60
        )
        next(watching)
        tokens.revoke("ada")
        with suppress(grpc.RpcError):
            for _ in watching:
                pass
        assert watching.code() is grpc.StatusCode.UNAUTHENTICATED
        # Not because the job has ended.
        renewed = Caller(channel, tokens.make("ada", "jobs"))
        while renewed.ask("ListJobs", b"").reason == "TOKEN_INVALID":
            time.sleep(0.05)
        assert renewed.job("night").state in (QUEUED, RUNNING)
        renewed.ask("CancelJob", pb.CancelJobRequest(name="night"))


def test_who_uploads_points_is_asked_again(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    ada, bob = tokens.make("ada", "jobs"), tokens.make("bob", "jobs")
    settings = {"tokens_file": tokens.path, "jobs_dir": tmp_path / "jobs"}
    with serving(registry, **settings) as server, connected(server.target) as channel:
        head, *pieces = upload("night", "double", np.zeros((100_000, 3)))

        def parts() -> Iterator[bytes]:
            yield head
            tokens.revoke("ada")
            while Caller(channel, ada).ask("ListJobs", b"").reason != "TOKEN_INVALID":
                time.sleep(0.05)
            yield from pieces

        assert pieces
        found = ask(channel, f"{_JOBS}CreateJob", parts(), bearer(ada))
        assert found.reason == "TOKEN_INVALID"
        renewed = Caller(channel, tokens.make("ada", "jobs"))
        while renewed.ask("ListJobs", b"").reason == "TOKEN_INVALID":
            time.sleep(0.05)
        assert renewed.listed() == []
        assert Caller(channel, bob).listed() == []
