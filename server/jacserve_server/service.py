"""The servicer: decode, submit, encode. The one place where errors become statuses.

Of the gRPC context only what cluster proxies also offer is used: set_code,
set_details and set_trailing_metadata.
"""

import logging
import uuid
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from jacserve_server.catalog import Catalog
from jacserve_server.errors import ServiceError
from jacserve_server.messages import decode_query, encode_function, encode_outcome
from jacserve_server.planning import plan
from jacserve_server.query import Outcome
from jacserve_server.scheduler import Scheduler

_log = logging.getLogger(__name__)
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000

M = TypeVar("M", bound=Message)


class JacobianService(pb_grpc.JacobianServiceServicer):
    """Answers the calls of the contract."""

    def __init__(self, catalog: Catalog, scheduler: Scheduler) -> None:
        """Keeps its collaborators.

        Args:
            catalog: The functions.
            scheduler: Executes queries.
        """
        self._catalog = catalog
        self._scheduler = scheduler

    async def ListFunctions(  # noqa: N802, D102
        self, request: pb.ListFunctionsRequest, context: Any
    ) -> pb.ListFunctionsResponse:
        return await _answer(context, pb.ListFunctionsResponse, self._list(request))

    async def GetFunction(  # noqa: N802, D102
        self, request: pb.GetFunctionRequest, context: Any
    ) -> pb.Function:
        return await _answer(context, pb.Function, self._get(request))

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
        if token and not (token.isdecimal() and 0 < int(token[:9]) < len(specs)):
            raise ServiceError(
                "MALFORMED_REQUEST",
                "page_token is not one that this server gave out. Pass the "
                "next_page_token of the page before, or nothing for the first.",
                field="page_token",
            )
        start = int(token or 0)
        end = start + min(size or _DEFAULT_PAGE, _LARGEST_PAGE)
        return pb.ListFunctionsResponse(
            functions=[encode_function(spec) for spec in specs[start:end]],
            next_page_token=str(end) if end < len(specs) else "",
        )

    async def _get(self, request: pb.GetFunctionRequest) -> pb.Function:
        return encode_function(self._catalog.find(request.name).spec)

    async def _evaluate(self, request: pb.Query) -> pb.Result:
        query = decode_query(request)
        function = self._catalog.find(query.function).spec
        outcome = await self._scheduler.submit(plan(query, function))
        if query.require_finite:
            _check_finite(outcome)
        return encode_outcome(outcome)


def _check_finite(outcome: Outcome) -> None:
    finite = np.atleast_1d(outcome.finite)
    if finite.all():
        return
    first = int(np.argmin(finite))
    count = int(np.count_nonzero(~finite))
    raise ServiceError(
        "RESULT_NOT_FINITE",
        f"{', '.join(outcome.key.quantities)} of functions/{outcome.key.function} has "
        f"NaN or Inf at {count} of {len(finite)} points, the first at row {first}. "
        "Pass other points, or leave require_finite out to have it delivered.",
        field="require_finite",
        non_finite=count,
        points=len(finite),
        first=first,
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
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration(nanos=int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details
