"""A server that stands before a real one: it sees each call, and may spoil some."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from jacserve.v1 import jacobian_pb2 as pb

_STREAMS = {"EvaluateStream", "Session"}


def status(
    code: grpc.StatusCode, reason: str = "", retry_after_s: float | None = None
) -> status_pb2.Status:
    found = status_pb2.Status(code=code.value[0], message="spoiled")
    if reason:
        info = error_details_pb2.ErrorInfo(reason=reason, domain="jacserve")
        found.details.add().Pack(info)
    if retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        found.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return found


class Between(grpc.GenericRpcHandler):
    """Hands calls on.

    Attributes:
        calls: The method and metadata of each call.
        spoiled: The next calls fail with these; a query of a session does, too, which
            leaves its stream open.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.spoiled: deque[status_pb2.Status] = deque()
        self.health = health.HealthServicer()
        self.health.set("", health_pb2.HealthCheckResponse.SERVING)

    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]

    def service(self, handler_call_details: Any) -> Any:
        path = handler_call_details.method
        name = path.rpartition("/")[2]
        self.calls.append((name, dict(handler_call_details.invocation_metadata)))
        if name in _STREAMS:
            onward = self._channel.stream_stream(path)
            streaming = self._session if name == "Session" else self._stream
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, context: streaming(onward, requests, context)
            )
        onward = self._channel.unary_unary(path)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._unary(onward, request, context)
        )

    def _spoil(self, context: grpc.ServicerContext) -> None:
        if self.spoiled:
            found = self.spoiled.popleft()
            codes = {code.value[0]: code for code in grpc.StatusCode}
            raw = found.SerializeToString()
            context.set_trailing_metadata((("grpc-status-details-bin", raw),))
            context.abort(codes[found.code], found.message)

    def _unary(
        self, onward: Any, request: bytes, context: grpc.ServicerContext
    ) -> bytes:
        self._spoil(context)
        try:
            return onward(request)
        except grpc.RpcError as raised:
            error: Any = raised
            context.set_trailing_metadata(error.trailing_metadata())
            context.abort(error.code(), error.details())
            raise

    def _stream(
        self, onward: Any, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        self._spoil(context)
        yield from onward(requests)

    def _session(
        self, onward: Any, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        del context
        for request in requests:
            if self.spoiled:
                id_ = pb.SessionRequest.FromString(request).id
                error = self.spoiled.popleft()
                yield pb.SessionResponse(id=id_, error=error).SerializeToString()
            else:
                yield from onward(iter([request]))


@contextmanager
def between(
    target: str, credentials: grpc.ServerCredentials | None = None
) -> Generator[tuple[Between, str]]:
    """Stands before a server.

    Args:
        target: Its address.
        credentials: Has TLS spoken with those who call.

    Yields:
        What it sees, and the address to call.
    """
    pool = ThreadPoolExecutor(16)
    with grpc.insecure_channel(target) as channel:
        handler = Between(channel)
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(handler.health, server)
        server.add_generic_rpc_handlers((handler,))
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield handler, f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()
    pool.shutdown()
