"""Queries as messages, also such as the client would not send."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

import grpc

from jacserve.errors import translated
from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc


@contextmanager
def sender(target: str) -> Generator[Callable[[pb.Query], pb.Result]]:
    """Yields a call of Evaluate on a connection of its own; raises as a client does."""
    # Else it would share the connection of any client in this process.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options=options) as channel:
        stub = pb_grpc.JacobianServiceStub(channel)

        def call(query: pb.Query) -> pb.Result:
            with translated(target):
                return stub.Evaluate(query)

        yield call
