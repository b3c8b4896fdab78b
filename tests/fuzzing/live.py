"""Almost right messages to a server that runs, and what must hold of its answers."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import islice, repeat
from random import Random
from typing import Any, Self, cast

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from fuzzing import seeds
from fuzzing.functions import closed_forms
from fuzzing.mutations import mutated
from fuzzing.tensor_bytes import fill, fill_with, tensors_of
from fuzzing.wire import BYTES, WireField, unpacked
from jacserve import tensors
from jacserve.streaming import Assembly, read_head
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2
from jacserve.vocabulary import QUANTITIES, word
from jacserve_server.errors import CODES, Reason

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_PATIENCE_S = 60.0
# How many queries go on one session.
_A_SESSION = 20


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Has each call bear a token, or none where that is empty."""

    def __init__(self, token: str) -> None:
        self._metadata = [("authorization", f"Bearer {token}")] if token else None

    def _bear(self, call: Any, details: Any, request: Any) -> Any:
        return call(details._replace(metadata=self._metadata), request)

    intercept_unary_unary: Any = _bear
    intercept_unary_stream: Any = _bear
    intercept_stream_unary: Any = _bear
    intercept_stream_stream: Any = _bear


class LiveFuzz(AbstractContextManager["LiveFuzz"]):
    """A connection over which messages go that nobody should send.

    Attributes:
        told: How often each RPC has answered, and with which reason it has refused.
    """

    def __init__(self, target: str, seed: int, token: str = "") -> None:
        self.told: Counter[tuple[str, str]] = Counter()
        self._random = Random(seed)
        # Else it would share the connection of any client in this process.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._plain = grpc.insecure_channel(target, options=options)
        self._channel = grpc.intercept_channel(self._plain, _Bearer(token))
        self._others = [*seeds.queries(), *seeds.jobs(), *seeds.session_requests()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._plain.close()

    def _drawn(self, pool: list[bytes], count: int) -> Iterator[bytes]:
        """Yields messages, now and then one that is right."""
        for _ in range(count):
            raw = self._random.choice(pool)
            if self._random.random() < 0.9:
                raw = mutated(raw, self._random, self._others)
            yield raw

    def evaluate(self, count: int) -> None:
        """Sends queries."""
        call = self._channel.unary_unary("/jacserve.v1.JacobianService/Evaluate")
        for raw in self._drawn(seeds.queries(), count):
            answer = self._one(
                "Evaluate", lambda raw=raw: call(raw, timeout=_PATIENCE_S)
            )
            if answer is not None:
                query, result = pb.Query.FromString(raw), pb.Result.FromString(answer)
                assert is_answer(query, result), (query, result)

    def evaluate_stream(self, count: int) -> None:
        """Sends queries in parts."""
        call = self._channel.stream_stream(
            "/jacserve.v1.JacobianService/EvaluateStream"
        )
        for raw in self._drawn(seeds.streams(), count):
            sent = unpacked(raw)

            def ask(sent: list[bytes] = sent) -> list[bytes]:
                return [*call(iter(sent), timeout=_PATIENCE_S)]

            answer = self._one("EvaluateStream", ask)
            if answer is not None:
                query = pb.EvaluateStreamRequest.FromString(sent[0]).head
                first, *others = answer
                part, holes = read_head(first, pb.EvaluateStreamResponse)
                assembly = Assembly(first, holes)
                for each in others:
                    assembly.feed(each)
                assert assembly.is_complete
                fill(tensors_of(query), sent[1:])
                result = part.head
                fill_with([output.tensor for output in result.outputs], assembly)
                assert is_answer(query, result), (query, result)

    def session(self, count: int) -> None:
        """Sends queries on sessions, and now and then what breaks the stream."""
        call = self._channel.stream_stream("/jacserve.v1.JacobianService/Session")
        queries = self._drawn(seeds.queries(), count)
        while batch := [*islice(queries, _A_SESSION)]:
            sent = [_asking(place, raw) for place, raw in enumerate(batch)]
            if self._random.random() < 0.3:
                [broken] = self._drawn(seeds.session_requests(), 1)
                sent.insert(self._random.randrange(len(sent)), broken)
            answers: list[bytes] = []

            def ask(sent: list[bytes] = sent, answers: list[bytes] = answers) -> bool:
                answers.extend(call(iter(sent), timeout=_PATIENCE_S))
                return True

            is_whole = self._one("Session", ask)
            answered = Counter(map(self._take, answers, repeat(sent)))
            if is_whole and len(sent) == len(batch):
                assert answered == Counter(range(len(batch))), answered

    def _take(self, raw: bytes, sent: list[bytes]) -> int:
        """Looks at an answer of a session; returns the id."""
        answer = pb.SessionResponse.FromString(raw)
        if answer.WhichOneof("answer") == "error":
            self._refused("a query of Session", _CODES[answer.error.code], answer.error)
        else:
            self.told["a query of Session", "answered"] += 1
            # Of several with one id, one must have this answer.
            asked = [query for id_, query in _queries_of(sent) if id_ == answer.id]
            assert any(is_answer(query, answer.result) for query in asked), asked
        return answer.id

    @contextmanager
    def a_job(self) -> Generator[None]:
        """There is a job meanwhile that requests of jobs may find."""
        service = "/jacserve.v1.JobService"
        create = self._channel.stream_unary(f"{service}/CreateJob")
        create(iter(unpacked(seeds.jobs()[0])), timeout=_PATIENCE_S)
        yield
        request = jobs_pb2.DeleteJobRequest(name="night-1").SerializeToString()
        with suppress(grpc.RpcError):  # It was deleted, maybe.
            self._channel.unary_unary(f"{service}/DeleteJob")(request)

    def unary(self, service: str, calls: dict[str, list[bytes]], count: int) -> None:
        """Sends requests of RPCs that take one message."""
        for method, pool in calls.items():
            path = f"/jacserve.v1.{service}/{method}"
            call: Any = self._channel.unary_unary(path)
            if method in ("WatchJob", "ReadJobResult"):
                call = partial(_drained, self._channel.unary_stream(path))
            for raw in self._drawn(pool, count // len(calls)):
                self._one(method, partial(call, raw, timeout=_PATIENCE_S))

    def create_jobs(self, count: int) -> None:
        """Sends jobs in parts, and forgets those that were taken."""
        service = "/jacserve.v1.JobService"
        create = self._channel.stream_unary(
            f"{service}/CreateJob", None, jobs_pb2.Job.FromString
        )
        delete = self._channel.unary_unary(f"{service}/DeleteJob")
        for raw in self._drawn(seeds.jobs(), count):

            def ask(raw: bytes = raw) -> jobs_pb2.Job:
                return create(iter(unpacked(raw)), timeout=_PATIENCE_S)

            job = self._one("CreateJob", ask)
            if job is not None:
                request = jobs_pb2.DeleteJobRequest(name=job.name)
                self._one("DeleteJob", lambda r=request: delete(r.SerializeToString()))

    def _one(self, method: str, ask: Any) -> Any:
        try:
            answer = ask()
        except grpc.RpcError as raised:
            error: Any = raised
            status = status_pb2.Status()
            for key, value in error.trailing_metadata() or ():
                if key == "grpc-status-details-bin":
                    status.ParseFromString(value)
            self._refused(method, error.code(), status, error.details())
            return None
        self.told[method, "answered"] += 1
        return answer

    def _refused(
        self,
        method: str,
        code: grpc.StatusCode,
        status: status_pb2.Status,
        details: str = "",
    ) -> None:
        infos = [
            info
            for detail in status.details
            if detail.Unpack(info := error_details_pb2.ErrorInfo())
        ]
        if not infos:
            # A query of a session that was cancelled, or ran out of its own time.
            known = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
            assert "Session" in method, (method, code, details)
            assert code in known, (code, details, status)
            self.told[method, code.name] += 1
            return
        [info] = infos
        assert info.domain == "jacserve"
        assert info.reason in CODES, info
        assert info.reason != "UNEXPECTED", (method, status)
        assert CODES[cast("Reason", info.reason)] == code.value[0], (info, code)
        assert status.message, info
        assert "Traceback" not in status.message
        self.told[method, info.reason] += 1


def _drained(call: Any, raw: bytes, **options: Any) -> list[bytes]:
    return [*call(raw, **options)]


def _asking(id_: int, query: bytes) -> bytes:
    """A message of a session, around a query that may be none."""
    number = pb.SessionRequest.QUERY_FIELD_NUMBER
    return (
        b"\x09" + id_.to_bytes(8, "little") + WireField(number, BYTES, query).encoded()
    )


def _queries_of(sent: Iterable[bytes]) -> Iterator[tuple[int, pb.Query]]:
    for raw in sent:
        try:
            message = pb.SessionRequest.FromString(raw)
        except DecodeError:
            continue
        yield message.id, message.query


def is_answer(query: pb.Query, result: pb.Result) -> bool:
    """Whether a result is that of a query, and right where a closed form is known."""
    name = query.function.removeprefix("functions/")
    found = result.function.removeprefix("functions/")
    asked = list(dict.fromkeys(query.quantities))
    given = list(dict.fromkeys(output.quantity for output in result.outputs))
    if found.partition("@")[0] != name.partition("@")[0] or asked != given:
        return False
    is_dense = query.layout in (pb.LAYOUT_UNSPECIFIED, pb.LAYOUT_MATRIX)
    if len(query.inputs) != 1 or query.mode == pb.MODE_SPARSE or not is_dense:
        return True
    x = tensors.decode(query.inputs[0].tensor)
    if x.dtype.name not in ("float32", "float64", "complex128"):
        return True
    largest = np.finfo(x.dtype).max ** 0.25
    expected = closed_forms(found, x) if (abs(x) < largest).all() else None
    # A device takes numbers next to zero for zero.
    tiny = 1e3 * np.finfo(x.dtype).tiny
    return expected is None or all(
        np.allclose(tensors.decode(output.tensor), expected[quantity], 1e-5, tiny)
        for output in result.outputs
        if (quantity := word(QUANTITIES, output.quantity)) in expected
    )
