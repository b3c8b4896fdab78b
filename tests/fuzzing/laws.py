"""What must hold of every decoder, whatever it is given.

It takes the message and has read it as plain protobuf would, or it refuses it by the
one error that it has for that. `LAWS` names each decoder with the messages to begin
with. A decoder remembers from one message to the next, so the references never do.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from fuzzing import seeds
from fuzzing.functions import registry
from fuzzing.tensor_bytes import fill, tensors_of
from fuzzing.wire import unpacked
from jacserve import tensors, trees
from jacserve.errors import JacobianError, from_rpc_error, readable
from jacserve.evaluation import Memory, Receiver, evaluation
from jacserve.functions import decode_function, decode_sparsity
from jacserve.job_messages import decode_job
from jacserve.job_reading import decode_rows
from jacserve.queries import Ask, QueryEncoder
from jacserve.results import Result
from jacserve.session import read_response
from jacserve.streaming import Assembly, StreamError, read_head
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2
from jacserve_server.callers import SCOPES, Call, Caller
from jacserve_server.errors import CODES, ServiceError
from jacserve_server.jobs.requests import check_id, fit, spec_of
from jacserve_server.jobs.storage import Location
from jacserve_server.messages import decode_query, decode_sparsity_query
from jacserve_server.planning import plan, plan_sparsity
from jacserve_server.query import Query
from jacserve_server.registration import build_catalog
from jacserve_server.requests import Request, RequestReader
from jacserve_server.sessions import read_request
from jacserve_server.work import Work

MAX_BYTES = 2**20
TARGET = "localhost:1"
SOMEBODY = Call("Session", Caller("", SCOPES, ""), "", 0.0)


@dataclass(frozen=True)
class Law:
    """A decoder with what must hold of it.

    Attributes:
        holds: Decodes bytes; raises AssertionError, or anything else, where the law
            does not hold. Returns whether they were taken.
        seeds: Bytes that are taken.
    """

    holds: Callable[[bytes], bool]
    seeds: list[bytes]


def laws() -> Mapping[str, Law]:
    """Returns decoders that have seen nothing yet."""
    server, client = _Server(), _Client()
    return {
        "query": Law(server.query, seeds.queries()),
        "stream": Law(server.stream, seeds.streams()),
        "session": Law(server.session, seeds.session_requests()),
        "sparsity request": Law(server.sparsity, seeds.sparsity_requests()),
        "job": Law(server.job, seeds.jobs()),
        "result": Law(client.result, seeds.results()),
        "sparse result": Law(client.sparse_result, seeds.results()),
        "result stream": Law(client.result_stream, seeds.result_streams()),
        "job result": Law(client.job_result, seeds.result_streams()),
        "session response": Law(client.session_response, seeds.session_responses()),
        "status": Law(client.status, seeds.statuses()),
        "function": Law(client.function, seeds.functions()),
        "sparsity": Law(client.sparsity, seeds.sparsities()),
        "job info": Law(client.job_info, seeds.job_infos()),
    }


M = TypeVar("M", bound=Message)


def _parsed(kind: type[M], raw: bytes) -> M | None:
    try:
        return kind.FromString(raw)
    except DecodeError:
        return None


def _refused(error: ServiceError) -> bool:
    """Looks at an error of the contract; returns that nothing was taken."""
    assert error.reason in CODES
    assert error.reason != "UNEXPECTED", error
    assert error.message
    return False


class _Server:
    """The decoders of a server."""

    def __init__(self) -> None:
        catalog = build_catalog([registry])
        self._find = lambda name: catalog.find(name).spec
        self._reader = RequestReader(self._find)

    def query(self, raw: bytes) -> bool:
        try:
            found = self._reader.read(raw)
        except ServiceError as error:
            return _refused(error)
        # Once more, when it may be known; and once as nobody ever saw it.
        assert_same_request(found, self._reader.read(raw))
        assert_same_request(found, self._plainly(pb.Query.FromString(raw)))
        return True

    def _plainly(self, message: pb.Query) -> Request:
        """Reads a query by protobuf alone, data and all."""
        query = decode_query(message, tensors.decode)
        return Request(query, plan(query, self._find(query.function)))

    def stream(self, raw: bytes) -> bool:
        parts = unpacked(raw)
        if not parts:
            return False
        try:
            head = self._reader.read_head(parts[0])
            if head.size_bytes > MAX_BYTES:
                return False
            assembly = Assembly(head.raw, head.holes)
            for part in parts[1:]:
                assembly.feed(part)
            if not assembly.is_complete:
                return False
            found = self._reader.read_streamed(head, assembly.payloads)
        except StreamError:
            return False
        except ServiceError as error:
            return _refused(error)
        message = pb.EvaluateStreamRequest.FromString(parts[0]).head
        fill(tensors_of(message), parts[1:])
        assert_same_request(found, self._plainly(message))
        return True

    def session(self, raw: bytes) -> bool:
        try:
            found = read_request(raw, SOMEBODY)
        except ServiceError as error:
            return _refused(error)
        message = _parsed(pb.SessionRequest, raw)
        if message is None:
            assert _parsed(pb.Query, found.query) is None
            return False
        assert found.id == message.id
        if message.HasField("timeout"):
            timeout = message.timeout
            assert found.timeout_s == timeout.seconds + timeout.nanos * 1e-9
        else:
            assert found.timeout_s is None
        assert found.is_cancel == message.cancel
        if message.WhichOneof("ask") == "query":
            assert pb.Query.FromString(found.query) == message.query
        return True

    def sparsity(self, raw: bytes) -> bool:
        try:
            message = pb.GetSparsityRequest.FromString(raw)
            query = decode_sparsity_query(message)
            sought = plan_sparsity(query, self._find(query.function))
        except DecodeError:
            return False
        except ServiceError as error:
            return _refused(error)
        assert sought.function.partition("@")[0] in message.name
        return True

    def job(self, raw: bytes) -> bool:
        parts = unpacked(raw)
        if not parts:
            return False
        try:
            part, holes = read_head(
                parts[0], jobs_pb2.CreateJobRequest, most_fields=20_000
            )
            spec = part.head
            spec.job_id = check_id(spec.job_id)
            if sum(hole.size for hole in holes) > MAX_BYTES:
                return False
            place = Location("data", "/nowhere", "x.npy")
            request = fit(spec, self._find, {}, lambda _: place, place, "job", "")
        except (DecodeError, StreamError):
            return False
        except ServiceError as error:
            return _refused(error)
        plain = jobs_pb2.CreateJobRequest.FromString(parts[0]).head
        for tensor in tensors_of(plain.query):
            if tensor.data:
                tensor.streamed_bytes = len(tensor.data)
                tensor.ClearField("data")
        plain.job_id, plain.query.function = spec.job_id, request.spec.query.function
        assert request.spec == plain
        assert spec_of(request.to_bytes()) == request.spec
        return True


def assert_same_request(found: Request, expected: Request) -> None:
    bare: dict[str, Any] = {"inputs": (), "tangents": (), "cotangents": ()}
    for field in fields(Query):
        if field.name not in bare:
            one = getattr(found.query, field.name)
            assert one == getattr(expected.query, field.name), field.name
    assert_same_work(found.work, expected.work)


def assert_same_work(found: Work, expected: Work) -> None:
    assert found.computation == expected.computation
    assert (found.batch, found.is_exact) == (expected.batch, expected.is_exact)
    for one, other in zip(found.arrays, expected.arrays, strict=True):
        assert_same_array(one, other)


def assert_same_array(one: np.ndarray, other: np.ndarray) -> None:
    """To the bit, so that NaN is equal to itself."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


class _Client:
    """The decoders of a client."""

    def __init__(self) -> None:
        self._memory = Memory()
        encode = QueryEncoder().encode
        # An answer has to have what was asked for, so several are.
        asked: Any = (("value",), ("value", "jacobian"), ("jacobian",))
        self._asks = [encode("triple", seeds.X, each, {}) for each in asked]
        self._sparse_ask = encode("stencil", seeds.X, "jacobian", {"layout": "csr"})

    def result(self, raw: bytes) -> bool:
        message = _parsed(pb.Result, raw)
        ask = self._asking_for(message)
        found = self._evaluated(raw, self._memory, ask)
        again = self._evaluated(raw, Memory(), ask)
        assert (found is None) == (again is None)
        if found is None or again is None:
            return False
        assert message is not None
        assert_same_result(found, again)
        assert_says(found, message)
        return True

    def _asking_for(self, message: pb.Result | None) -> Ask:
        """Returns a query that has what a result has, if there is one."""
        outputs = message.outputs if message is not None else ()
        given = {output.quantity for output in outputs}
        exact = (ask for ask in self._asks if {*ask.form.query.quantities} == given)
        return next(exact, self._asks[0])

    def _evaluated(self, raw: bytes, memory: Memory, ask: Ask) -> Result | None:
        steps = evaluation(ask, memory, timeout_s=None, retries=0)
        next(steps)
        try:
            steps.send(raw)
        except StopIteration as stop:
            look_at(stop.value)
            return stop.value
        except JacobianError:
            return None
        raise AssertionError("an answer is asked for again")

    def sparse_result(self, raw: bytes) -> bool:
        found = self._evaluated(raw, self._memory, self._sparse_ask)
        return found is not None

    def result_stream(self, raw: bytes) -> bool:
        receiver = Receiver()
        try:
            for part in unpacked(raw):
                if _announced(part) > MAX_BYTES:
                    return False
                receiver.feed(part)
            received = receiver.received()
        except JacobianError:
            return False
        steps = evaluation(
            self._asking_for(received.head), self._memory, timeout_s=None, retries=0
        )
        next(steps)
        try:
            steps.send(received)
        except StopIteration as stop:
            look_at(stop.value)
            return True
        except JacobianError:
            return False
        raise AssertionError("an answer is asked for again")

    def job_result(self, raw: bytes) -> bool:
        receiver = Receiver(jobs_pb2.ReadJobResultResponse)
        try:
            for part in unpacked(raw):
                if _announced(part) > MAX_BYTES:
                    return False
                receiver.feed(part)
            look_at(decode_rows(receiver.received(), "csr", keep_dense=True))
        except JacobianError:
            return False
        return True

    def session_response(self, raw: bytes) -> bool:
        try:
            id_, answer = read_response(raw, TARGET)
        except DecodeError:
            return False
        message = _parsed(pb.SessionResponse, raw)
        if message is None:
            assert isinstance(answer, bytes)
            assert _parsed(pb.Result, answer) is None
            return False
        assert id_ == message.id
        if isinstance(answer, bytes):
            assert message.result == pb.Result.FromString(answer)
        else:
            assert message.WhichOneof("answer") == "error"
        return True

    def status(self, raw: bytes) -> bool:
        error = from_rpc_error(cast("grpc.Call", Failed(raw)), TARGET)
        assert isinstance(error, JacobianError)
        assert f"{error} {error!r}"
        return bool(error.reason)

    def function(self, raw: bytes) -> bool:
        return _is_read(lambda: repr(decode_function(pb.Function.FromString(raw))))

    def sparsity(self, raw: bytes) -> bool:
        return _is_read(lambda: repr(decode_sparsity(raw)))

    def job_info(self, raw: bytes) -> bool:
        def decode() -> None:
            info = decode_job(jobs_pb2.Job.FromString(raw), TARGET)
            assert f"{info} {info.headline} {info.progress.remaining_s}"

        return _is_read(decode)


def _is_read(decode: Callable[[], Any]) -> bool:
    try:
        with readable():
            decode()
    except JacobianError:
        return False
    return True


def _announced(part: bytes) -> int:
    """The bytes that a head says will come; a client takes a server's word for them."""
    try:
        head = pb.EvaluateStreamResponse.FromString(part).head
    except DecodeError:
        return 0
    announced = [output.tensor.streamed_bytes for output in head.outputs]
    announced += [
        tensor.streamed_bytes
        for pattern in head.patterns
        for tensor in (pattern.columns, pattern.rows, pattern.row_starts)
    ]
    return sum(announced) + head.finite_points.streamed_bytes


def look_at(result: Result) -> None:
    """Uses an answer as callers do."""
    repr(result)
    assert result.timing.execute_s is not None
    for name in result.quantities:
        getattr(result, name)


def assert_same_result(one: Result, other: Result) -> None:
    assert list(one.quantities) == list(other.quantities)
    assert (one.function, one.modes, one.device) == (
        other.function,
        other.modes,
        other.device,
    )
    assert (one.finite, one.timing, one.bucket) == (
        other.finite,
        other.timing,
        other.bucket,
    )
    for name in one.quantities:
        pairs = zip(_leaves(one, name), _leaves(other, name), strict=True)
        for mine, its in pairs:
            assert_same_array(mine, its)


def _leaves(result: Result, name: str) -> Iterator[np.ndarray]:
    for _, leaf in trees.flatten(result.quantities[name]):
        if leaf is not None:
            yield leaf


def assert_says(result: Result, message: pb.Result) -> None:
    """An answer is what plain protobuf reads."""
    assert result.function == message.function.removeprefix("functions/")
    assert result.finite == message.finite
    timing = message.timing.execute_duration
    assert result.timing.execute_s == timing.seconds + timing.nanos * 1e-9
    expected = {
        (output.quantity, trees.decode_path(output.path)): output.tensor
        for output in message.outputs
    }
    names = {pb.Quantity.Value(f"QUANTITY_{n.upper()}"): n for n in result.quantities}
    for (quantity, path), tensor in expected.items():
        found = result.quantities[names[quantity]]
        for step in path:
            found = found[step]
        assert_same_array(found, tensors.decode(tensor))


class Failed:
    """A call that has failed, with details from anywhere."""

    def __init__(self, details: bytes) -> None:
        self._details = details

    def trailing_metadata(self) -> Any:
        return (("grpc-status-details-bin", self._details),)

    def details(self) -> str:
        return "refused"

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT
