"""The servicer: decode, submit, encode. The one place where errors become statuses.

Of the gRPC context only what cluster proxies also offer is used: set_code,
set_details and set_trailing_metadata.
"""

import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from jacserve.vocabulary import Quantity
from jacserve_server.catalog import Catalog
from jacserve_server.errors import ServiceError
from jacserve_server.measurements import Measurement
from jacserve_server.messages import (
    decode_query,
    decode_sparsity_query,
    encode_function,
    encode_outcome,
    encode_sparsity,
    pattern_bytes,
    result_bytes,
)
from jacserve_server.planning import Planner, plan_sparsity
from jacserve_server.query import Query
from jacserve_server.scheduler import Scheduler
from jacserve_server.signature import FunctionSpec
from jacserve_server.work import Outcome

_log = logging.getLogger(__name__)
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000
_MOST_PLANS = 1000

M = TypeVar("M", bound=Message)


class JacobianService(pb_grpc.JacobianServiceServicer):
    """Answers the calls of the contract."""

    def __init__(
        self,
        catalog: Catalog,
        scheduler: Scheduler[Any],
        measured: Callable[[str], Sequence[Measurement]],
        max_result_bytes: int,
    ) -> None:
        """Keeps its collaborators.

        Args:
            catalog: The functions.
            scheduler: Executes queries.
            measured: Returns what was measured of a function, by its qualified name.
            max_result_bytes: The most that an answer may take.
        """
        self._max_result_bytes = max_result_bytes
        self._catalog = catalog
        self._scheduler = scheduler
        self._measured = measured
        self._planner = Planner(capacity=_MOST_PLANS)

    async def ListFunctions(  # noqa: N802, D102
        self, request: pb.ListFunctionsRequest, context: Any
    ) -> pb.ListFunctionsResponse:
        return await _answer(context, pb.ListFunctionsResponse, self._list(request))

    async def GetFunction(  # noqa: N802, D102
        self, request: pb.GetFunctionRequest, context: Any
    ) -> pb.Function:
        return await _answer(context, pb.Function, self._get(request))

    async def GetSparsity(  # noqa: N802, D102
        self, request: pb.GetSparsityRequest, context: Any
    ) -> pb.Sparsity:
        return await _answer(context, pb.Sparsity, self._sparsity(request))

    async def Evaluate(self, request: pb.Query, context: Any) -> pb.Result:  # noqa: N802, D102
        return await _answer(context, pb.Result, self._evaluate(request))

    async def _list(self, request: pb.ListFunctionsRequest) -> pb.ListFunctionsResponse:
        specs = self._catalog.specs
        token, size = request.page_token, request.page_size
        if size < 0:
            raise ServiceError(
                "MALFORMED_REQUEST",
                f"page_size is {size}. Pass 1 to {_LARGEST_PAGE}, or 0 for "
                f"{_DEFAULT_PAGE}.",
                field="page_size",
                page_size=size,
            )
        tokens = {str(place) for place in range(1, len(specs))}
        if token and token not in tokens:
            raise ServiceError(
                "MALFORMED_REQUEST",
                "page_token is not one that this server gave out. Pass the "
                "next_page_token of the page before, or nothing for the first.",
                field="page_token",
            )
        start = int(token or 0)
        end = start + min(size or _DEFAULT_PAGE, _LARGEST_PAGE)
        return pb.ListFunctionsResponse(
            functions=list(map(self._encoded, specs[start:end])),
            next_page_token=str(end) if end < len(specs) else "",
        )

    async def _get(self, request: pb.GetFunctionRequest) -> pb.Function:
        return self._encoded(self._catalog.find(request.name).spec)

    def _encoded(self, spec: FunctionSpec) -> pb.Function:
        return encode_function(spec, self._measured(spec.qualified_name))

    async def _sparsity(self, request: pb.GetSparsityRequest) -> pb.Sparsity:
        with self._scheduler.admitted(request.ByteSize()):
            function = self._catalog.find(request.name).spec
            sought = plan_sparsity(decode_sparsity_query(request), function)
            found = await self._scheduler.sparsity(sought)
            self._check_size(function.resource, pattern_bytes(found.pattern, "coo"))
            return encode_sparsity(found, sought, function)

    async def _evaluate(self, request: pb.Query) -> pb.Result:
        with self._scheduler.admitted(request.ByteSize()):
            function = self._catalog.find(request.function).spec
            query = decode_query(request)
            work = self._planner.plan(query, function)
            outcome = await self._scheduler.submit(work)
            if query.require_finite:
                _check_finite(outcome, query.quantities)
            if outcome.outline.patterns or query.patterns:
                _check_patterns(outcome, query)
                self._check_size(function.resource, result_bytes(outcome, query))
            return encode_outcome(outcome, query)

    def _check_size(self, resource: str, size_bytes: int) -> None:
        if size_bytes > self._max_result_bytes:
            raise ServiceError(
                "RESULT_TOO_LARGE",
                f"the answer of {resource} would take {size_bytes} bytes with its "
                f"sparsity pattern, but this server sends at most "
                f"{self._max_result_bytes}. Ask for less at once, or raise the "
                "server's max_message_bytes.",
                function=resource,
                result_bytes=size_bytes,
                max_result_bytes=self._max_result_bytes,
            )


def _check_patterns(outcome: Outcome, query: Query) -> None:
    outline = outcome.outline
    found = {pattern.hash for pattern in outline.patterns.values()}
    for place, pattern in enumerate(query.patterns):
        if pattern not in found:
            raise ServiceError(
                "PATTERN_UNKNOWN",
                f"functions/{outline.function} does not have the sparsity pattern "
                f"{pattern} now. Ask again without naming it.",
                field=f"patterns[{place}]",
                function=f"functions/{outline.function}",
                pattern=pattern,
            )


def _check_finite(outcome: Outcome, quantities: tuple[Quantity, ...]) -> None:
    finite, resource = outcome.finite, f"functions/{outcome.outline.function}"
    if finite.all():
        return
    where = ""
    if finite.ndim:
        count, first = np.count_nonzero(~finite), np.argmin(finite)
        where = f" at {count} of {len(finite)} points, the first at row {first}"
    raise ServiceError(
        "RESULT_NOT_FINITE",
        f"{', '.join(quantities)} of {resource} has NaN or Inf"
        f"{where}. Pass other points, or leave require_finite out to have it "
        "delivered.",
        field="require_finite",
        function=resource,
        points=finite.size,
        non_finite=np.count_nonzero(~finite),
    )


async def _answer(context: Any, empty: type[M], answer: Awaitable[M]) -> M:
    """Awaits an answer; turns whatever it raises into the call's status."""
    details: list[Message] = []
    try:
        return await answer
    except ServiceError as raised:
        error = raised
    except Exception:
        request_id = uuid.uuid4().hex
        _log.exception("request %s failed", request_id)
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
        error = ServiceError(
            "UNEXPECTED",
            f"the server failed on this call. Its log has more under {request_id}.",
        )
    details.extend(_details(error))
    status = status_pb2.Status(code=error.code, message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_code(_STATUS_CODES[error.code])
    context.set_details(error.message)
    context.set_trailing_metadata(
        (("grpc-status-details-bin", status.SerializeToString()),)
    )
    return empty()


def _details(error: ServiceError) -> list[Message]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain="jacserve", metadata=error.metadata
        )
    ]
    if error.field:
        # Without a description: it would be the status's message once more.
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason == "FUNCTION_NOT_FOUND":
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type="jacserve.v1.Function",
                resource_name=error.metadata["function"],
            )
        )
    if error.retry_after_s is not None:
        delay = Duration(nanos=int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details
