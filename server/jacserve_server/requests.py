"""Serialized queries in, work out.

Callers ask the same function at the same shapes again and again. So a query that
differs from an earlier one in numbers alone is not parsed, checked and planned again:
its bytes say what to do with its numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from jacserve import framing
from jacserve.framing import Hole, Recognizer
from jacserve.streaming import StreamError, read_head
from jacserve.tensors import MAX_RANK, TensorSpec
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server.errors import ServiceError
from jacserve_server.messages import arrays_of, decode_query, placeholder
from jacserve_server.planning import Plan, plan
from jacserve_server.query import Query
from jacserve_server.signature import FunctionSpec
from jacserve_server.work import Work

_MOST_KNOWN = 1000
# Longer ones cost more to compare than to parse.
_LONGEST_KNOWN = 2**16
# Each takes about a microsecond of the event loop.
_MOST_FIELDS = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A query that fits its function.

    Attributes:
        query: What was asked, for the answer; without its arrays.
        work: What to do.
    """

    query: Query
    work: Work


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """A request without its numbers."""

    query: Query
    plan: Plan
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StreamedHead:
    """The head of a query that comes in parts.

    Attributes:
        query: The hollow message.
        raw: The part that it came in.
        holes: Where the bytes of its tensors are.
        size_bytes: How many bytes they take.
    """

    query: pb.Query
    raw: bytes
    holes: list[Hole]
    size_bytes: int


class RequestReader:
    """Reads queries from anywhere."""

    def __init__(
        self, find: Callable[[str], FunctionSpec], *, max_rank: int = MAX_RANK
    ) -> None:
        """Has read nothing yet.

        Args:
            find: Finds a function by the name that a query gives.
            max_rank: The most axes of an array.
        """
        self._find = find
        self._max_rank = max_rank
        self._recognizer = Recognizer[_Known](capacity=_MOST_KNOWN)

    def read(self, raw: bytes) -> Request:
        """Reads a query.

        Args:
            raw: A serialized Query.

        Returns:
            The request; its arrays are views of the bytes.

        Raises:
            ServiceError: It is no query, or does not fit its function.
        """
        if found := self._recognizer.find(raw):
            known, payloads = found
            arrays = [
                spec.array(payload)
                for spec, payload in zip(known.specs, payloads, strict=True)
            ]
            return Request(known.query, known.plan.work(arrays))
        try:
            message, payloads = framing.opened(raw, pb.Query, most_fields=_MOST_FIELDS)
        except DecodeError as error:
            raise _malformed("the query", error) from error
        query = decode_query(message, arrays_of(payloads), max_rank=self._max_rank)
        work = plan(query, self._find(query.function))
        request = Request(_without_arrays(query), work)
        # Whether numbers can be converted, and are truth values, is up to them.
        depends = query.cast or any(x.dtype == bool or not x.size for x in query.arrays)
        if len(raw) <= _LONGEST_KNOWN and not depends:
            _, holes = framing.cut(raw, pb.Query)
            spans = [(h.start, h.start + h.size) for h in holes if h.start is not None]
            if sorted(spans) == spans:
                specs = tuple(TensorSpec(x.dtype, x.shape) for x in query.arrays)
                known = _Known(request.query, Plan.of(work, query), specs)
                self._recognizer.learn(raw, spans, known)
        return request

    def read_head(self, raw: bytes) -> StreamedHead:
        """Reads the first part of a query, and refuses it as early as can be.

        Args:
            raw: A serialized EvaluateStreamRequest.

        Returns:
            The head.

        Raises:
            ServiceError: It is no head, or the query does not fit its function.
        """
        try:
            part, holes = read_head(
                raw, pb.EvaluateStreamRequest, most_fields=_MOST_FIELDS
            )
        except (DecodeError, StreamError) as error:
            raise _malformed("the stream", error) from error
        query = decode_query(part.head, placeholder, max_rank=self._max_rank)
        function = self._find(query.function)
        if not query.cast:  # Whether numbers can be converted, is up to them.
            plan(query, function)
        return StreamedHead(part.head, raw, holes, sum(hole.size for hole in holes))

    def read_streamed(self, head: StreamedHead, payloads: Sequence[object]) -> Request:
        """Reads a query of which all parts are there.

        Args:
            head: Its head.
            payloads: The bytes of its tensors.

        Returns:
            The request.

        Raises:
            ServiceError: It does not fit its function.
        """
        query = decode_query(head.query, arrays_of(payloads))
        return Request(_without_arrays(query), plan(query, self._find(query.function)))


def _without_arrays(query: Query) -> Query:
    return replace(query, inputs=(), tangents=(), cotangents=())


def _malformed(what: str, error: Exception) -> ServiceError:
    text = str(error)
    if isinstance(error, StreamError):
        return ServiceError("STREAM_BROKEN", f"{what} is broken: {text}")
    return ServiceError(
        "MALFORMED_REQUEST",
        f"{what} can't be read: {text or 'it is no message of the contract'}. Send "
        "messages as the contract has them.",
    )
