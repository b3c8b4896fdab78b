"""The bytes of streamed tensors, put where a whole message has them."""

from collections.abc import Iterable, Sequence

from jacserve.streaming import Assembly
from jacserve.v1 import jacobian_pb2 as pb


def tensors_of(query: pb.Query) -> list[pb.Tensor]:
    """The tensors of a query, in the order of its fields."""
    given = [*query.inputs, *query.tangents, *query.cotangents]
    return [each.tensor for each in given if each.HasField("tensor")]


def fill(hollow: Iterable[pb.Tensor], parts: Sequence[bytes]) -> None:
    """Puts the bytes of pieces into the tensors of a head."""
    awaiting = [tensor for tensor in hollow if tensor.streamed_bytes]
    data = [b""] * len(awaiting)
    for raw in parts:
        piece = pb.EvaluateStreamRequest.FromString(raw).piece
        assert piece.offset == len(data[piece.tensor])
        data[piece.tensor] += piece.data
    for tensor, whole in zip(awaiting, data, strict=True):
        tensor.data = whole
        tensor.ClearField("streamed_bytes")


def fill_with(hollow: Iterable[pb.Tensor], assembly: Assembly) -> None:
    """Puts what pieces have brought into the tensors of a head."""
    awaiting = [tensor for tensor in hollow if tensor.streamed_bytes]
    for tensor, payload in zip(awaiting, assembly.payloads, strict=False):
        tensor.data = bytes(payload)
        tensor.ClearField("streamed_bytes")
