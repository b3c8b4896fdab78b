"""Whatever is sent, the answer is right or says what was wrong; nothing dies of it.

What fuzzing has found are tests of their own here, which take no time.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

import jacserve
from fuzzing import functions, seeds
from fuzzing.laws import SOMEBODY, Failed
from fuzzing.live import LiveFuzz
from fuzzing.mad_server import mad_server
from fuzzing.wire import BYTES, FIXED64, VARINT, WireField
from jacserve import framing, tensors, trees
from jacserve.errors import ServerError, from_rpc_error
from jacserve.functions import decode_function, decode_sparsity
from jacserve.job_messages import decode_job
from jacserve.results import ResultDecoder
from jacserve.session import read_response
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2
from jacserve_server import tokens
from jacserve_server.errors import ServiceError
from jacserve_server.sessions import read_request
from server_process import server_process

TESTS = Path(__file__).parent
MIB = 2**20


def fuzz(*arguments: str | int) -> dict:
    """Fuzzes the decoders in a process of its own; returns what it tells."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzzing", *map(str, arguments)],
        cwd=TESTS,
        env={**os.environ, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_told(told: dict, count: int) -> None:
    assert sum(told["taken"].values()) + sum(told["refused"].values()) == count
    # Neither too wild to get anywhere, nor too tame to be refused.
    for kind in ("taken", "refused"):
        assert len(told[kind]) == 14, told
    # A leak of one small object for each message would be more.
    assert told["grown_bytes"] < 16 * MIB, told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_decoders_take_or_refuse_200000_messages() -> None:
    assert_told(fuzz(200_000, 1), 200_000)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed"
)
def test_decoders_take_or_refuse_messages_that_coverage_chose() -> None:
    assert_told(fuzz("--guided", 20_000, 1), 20_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_answers_or_refuses_20000_messages(tmp_path: Path) -> None:
    every = ("read", "compute", "jobs", "admin")
    _, token = tokens.create(tmp_path / "tokens.json", "fuzz", every, None)
    settings = {
        "JACSERVE_DEVICE": "cpu",
        "JACSERVE_JOBS_DIR": str(tmp_path / "jobs"),
        "JACSERVE_TOKENS_FILE": str(tmp_path / "tokens.json"),
        "JACSERVE_LOG_LEVEL": "error",
        # Few, so that what programs take is level soon.
        "JACSERVE_MAX_PROGRAMS": "16",
        "JACSERVE_MAX_PAYLOAD_BYTES": str(MIB),
        "JACSERVE_MAX_UPLOAD_BYTES": str(MIB),
    }
    registry = functions.__file__
    with server_process(registry, **settings) as served:
        process = psutil.Process(served.process.pid)
        memory: list[int] = []
        with LiveFuzz(served.target, seed=1, token=token) as live:
            for _ in range(10):
                live.evaluate(800)
                live.session(600)
                live.evaluate_stream(250)
                live.create_jobs(50)
                live.unary("JacobianService", seeds.function_calls(), 150)
                live.unary("AdminService", seeds.admin_calls(), 150)
                with live.a_job():
                    live.unary("JobService", seeds.job_calls(), 150)
                memory.append(process.memory_info().rss)
                assert served.process.poll() is None, served.errors()
            print(*sorted(live.told.items()), sep="\n")
        print([each // MIB for each in memory])
        with LiveFuzz(served.target, seed=2) as stranger:
            stranger.evaluate(200)
            stranger.session(200)
            stranger.evaluate_stream(100)
            stranger.create_jobs(50)
            stranger.unary("JacobianService", seeds.function_calls(), 90)
            stranger.unary("AdminService", seeds.admin_calls(), 90)
            stranger.unary("JobService", seeds.job_calls(), 90)
            assert {reason for _, reason in stranger.told} == {"TOKEN_INVALID"}
            assert len(stranger.told) == 15, stranger.told
        with jacserve.Client(served.target, token=token) as client:
            x = np.ones(3)
            np.testing.assert_array_equal(client.jacobian("five", x), 5 * np.eye(3))
        log = served.errors()
        assert "Traceback" not in log, log
    assert memory[-1] - memory[4] < 32 * MIB, [each // MIB for each in memory]


def calls_of(client: jacserve.Client) -> list[Callable[[], object]]:
    """Calls of every RPC that a client makes; what is made of the answers is used."""
    x, large = seeds.X, np.ones(2**18)

    def of_a_job() -> None:
        job = client.job("night-1", timeout_s=5.0)
        assert f"{job!r} {job.read(0, 2, timeout_s=5.0)!r}"

    def of_a_session() -> None:
        every: Any = ("value", ("value", "jacobian"))
        with client.session() as session:
            for quantities in every:
                session.evaluate("triple", x, quantities=quantities, timeout_s=5.0)

    return [
        lambda: client.jacobian("triple", x, timeout_s=5.0),
        lambda: repr(client.evaluate("triple", x, timeout_s=5.0)),
        lambda: client.jacobian("stencil", x, layout="csr", timeout_s=5.0),
        lambda: client.evaluate("seven", large, quantities="value", timeout_s=5.0),
        lambda: client.describe("triple", timeout_s=5.0).signature,
        lambda: list(client.functions(timeout_s=5.0)),
        lambda: client.sparsity("stencil", timeout_s=5.0),
        lambda: client.jobs(timeout_s=5.0),
        of_a_job,
        of_a_session,
    ]


def ask_a_mad_server(rounds: int) -> Counter[str]:
    told: Counter[str] = Counter()
    with mad_server(seed=1) as target, jacserve.Client(target) as client:
        for _ in range(rounds):
            for call in calls_of(client):
                try:
                    call()
                    told["answered"] += 1
                except jacserve.JacobianError as error:
                    told[error.code] += 1
    return told


def test_a_client_survives_a_mad_server() -> None:
    told = ask_a_mad_server(20)
    assert told["answered"] > 5
    assert told["DATA_LOSS"] > 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_client_survives_a_mad_server_for_long() -> None:
    told = ask_a_mad_server(500)
    assert told["answered"] > 250
    assert told["DATA_LOSS"] > 250


ID = WireField(1, FIXED64, bytes(8)).encoded()
QUERY = WireField(15, BYTES, seeds.queries()[0]).encoded()
OTHER_QUERY = WireField(15, BYTES, seeds.queries()[3]).encoded()


@pytest.mark.parametrize(
    "parts",
    [
        # Protobuf merges what comes twice: the query would be neither of both.
        (ID, QUERY, OTHER_QUERY),
        (ID, ID, QUERY),
        (ID, WireField(2, BYTES, b"").encoded() * 2, QUERY),
        (ID, WireField(3, VARINT, b"\0").encoded(), QUERY),
        (ID, QUERY, WireField(3, VARINT, b"\1").encoded()),
        # Larger than any number that a field may have.
        (ID, framing.varint((2**29 + 3) << 3) + b"\0"),
    ],
)
def test_a_message_of_a_session_says_one_thing(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(ServiceError, match="a message of the session can't be read"):
        read_request(b"".join(parts), SOMEBODY)


def test_an_id_of_another_wire_type_is_none() -> None:
    alike = WireField(1, BYTES, b"12345678").encoded()
    assert pb.SessionRequest.FromString(alike + QUERY).id == 0
    assert read_request(alike + QUERY, SOMEBODY).id == 0
    answer = WireField(15, BYTES, b"").encoded()
    assert read_response(alike + answer, "there") == (0, b"")


def test_an_answer_with_a_timing_of_another_wire_type_reads_alike_again() -> None:
    alike = WireField(pb.Result.TIMING_FIELD_NUMBER, VARINT, b"\1").encoded()
    raw = alike + output(pb.QUANTITY_VALUE).SerializeToString()
    decoder = ResultDecoder()
    for _ in range(2):
        np.testing.assert_array_equal(decoder.decode(raw).value, np.ones((2, 2)))


RESULT = WireField(15, BYTES, seeds.results()[0]).encoded()
ERROR = WireField(2, BYTES, seeds.statuses()[0]).encoded()


@pytest.mark.parametrize(
    "raw",
    [
        ID + RESULT + RESULT,
        ID + ID + RESULT,
        ID + ERROR + RESULT,
        ID + WireField(15, VARINT, b"\1").encoded(),
    ],
)
def test_an_answer_of_a_session_says_one_thing(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        read_response(raw, "there")


def test_details_that_are_broken_leave_the_error() -> None:
    broken = AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"?")
    whole = status_pb2.Status.FromString(seeds.statuses()[0]).details
    status = status_pb2.Status(details=[broken, *whole]).SerializeToString()
    error = from_rpc_error(cast("grpc.Call", Failed(status)), "there")
    assert (error.reason, error.request_id) == ("SHAPE_MISMATCH", "r")


def unnamed() -> None:
    decode_function(pb.Function(name="functions/polar"))


def unknown_mode() -> None:
    decode_function(pb.Function(name="functions/polar@1", modes=[cast("Any", 77)]))


def no_tensor() -> None:
    decode_sparsity(pb.Sparsity(mode=pb.MODE_FORWARD).SerializeToString())


def no_state() -> None:
    decode_job(jobs_pb2.Job(name="jobs/a"), "there")


def beyond_time() -> None:
    job = jobs_pb2.Job(name="jobs/a", state=jobs_pb2.JOB_STATE_RUNNING)
    job.create_time.seconds = 2**62
    decode_job(job, "there")


@pytest.mark.parametrize(
    "decode", [unnamed, unknown_mode, no_tensor, no_state, beyond_time]
)
def test_descriptions_that_are_none_are_a_fault_of_the_server(
    decode: Callable[[], None],
) -> None:
    with pytest.raises(ServerError, match="the server's answer can't be read"):
        decode()


def output(quantity: Any, *keys: str) -> pb.Result:
    result = pb.Result(function="functions/polar@1")
    output = result.outputs.add(quantity=quantity)
    for key in keys:
        output.path.add(key=key)
    tensors.encode_into(output.tensor, np.ones((2, 2)))
    return result


@pytest.mark.parametrize(
    ("result", "layout"),
    [
        (output(pb.QUANTITY_VALUE, "a\0b"), None),
        (output(pb.QUANTITY_VALUE, *["deep"] * 1000), None),
        (output(pb.QUANTITY_JACOBIAN, "part"), "csr"),
    ],
)
def test_trees_that_no_function_returns_are_refused(
    result: pb.Result, layout: Any
) -> None:
    with pytest.raises(ValueError, match=r"tree|in parts"):
        ResultDecoder().decode(result.SerializeToString(), layout)


def test_a_tree_of_a_hundred_levels_is_one() -> None:
    path = ("deep",) * 100
    [(found, leaf)] = trees.flatten(trees.unflatten([(path, 1.0)]))
    assert (found, leaf) == (path, 1.0)
