"""Messages in parts: a head, then the bytes of its tensors in pieces.

`parts` makes them of a hollow message and `Assembly` puts them together again, into
buffers that are made once. Both directions of EvaluateStream go the same way, and so
do the points of a job and its results: all their parts have the same two fields.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from jacserve import framing
from jacserve.framing import PIECE_BYTES, Frame, Hole
from jacserve.tensors import Array
from jacserve.v1 import jacobian_pb2 as pb, jobs_pb2

_HEAD = pb.EvaluateStreamResponse.HEAD_FIELD_NUMBER
_PIECE = pb.EvaluateStreamResponse.PIECE_FIELD_NUMBER
_MOST_FIELDS = 16  # A piece has three, and may get some more.
_PIECE_FIELDS = (
    pb.Piece.TENSOR_FIELD_NUMBER,
    pb.Piece.OFFSET_FIELD_NUMBER,
    pb.Piece.DATA_FIELD_NUMBER,
)


class StreamError(ValueError):
    """The parts of a stream don't follow each other as they must."""


def parts(hollow: Message, payloads: Sequence[Array]) -> Iterator[bytes]:
    """Yields a message in parts.

    Args:
        hollow: A Query, Result or JobSpec whose tensors have `streamed_bytes`.
        payloads: The bytes of those that have any, each in one row, in the order of
            the message's fields.

    Yields:
        The parts, serialized. Where all tensors together fit into one piece, the head
        has them.
    """
    if sum(len(payload) for payload in payloads) <= PIECE_BYTES:
        whole = Frame(hollow).filled(payloads)
        yield framing.bytes_field(_HEAD, len(whole)) + whole
        return
    yield head_part(hollow)
    for place, payload in enumerate(payloads):
        yield from pieces(place, 0, payload)


def head_part(hollow: Message) -> bytes:
    """Returns the first part of a message whose tensors all come in pieces."""
    head = hollow.SerializeToString()
    return framing.bytes_field(_HEAD, len(head)) + head


def pieces(tensor: int, start: int, payload: Array) -> Iterator[bytes]:
    """Yields some bytes of a tensor.

    Args:
        tensor: Which of the tensors with `streamed_bytes`, from 0.
        start: How many of its bytes came before.
        payload: The bytes, in one row.

    Yields:
        Parts, serialized.
    """
    for offset in range(0, len(payload), PIECE_BYTES):
        data = payload[offset : offset + PIECE_BYTES]
        before = pb.Piece(tensor=tensor, offset=start + offset).SerializeToString()
        before += framing.bytes_field(pb.Piece.DATA_FIELD_NUMBER, len(data))
        size = len(before) + len(data)
        yield b"".join([framing.bytes_field(_PIECE, size), before, data.data])


P = TypeVar(
    "P",
    pb.EvaluateStreamRequest,
    pb.EvaluateStreamResponse,
    jobs_pb2.CreateJobRequest,
    jobs_pb2.ReadJobResultResponse,
)


def read_head(
    raw: bytes, kind: type[P], *, most_fields: int = 2**62
) -> tuple[P, list[Hole]]:
    """Reads the first part of a stream.

    Args:
        raw: The part, from anywhere.
        kind: Of what type it is.
        most_fields: As for `framing.cut`.

    Returns:
        The part, its head hollow; and where the bytes of the head's tensors are.

    Raises:
        DecodeError: It is no such message.
        StreamError: It has no head.
    """
    part, holes = framing.hollowed(raw, kind, most_fields=most_fields)
    if not part.HasField("head"):
        raise StreamError("the first part has no head. Send the head first.")
    return part, holes


class Pieces:
    """Checks that the pieces of tensors follow each other as they must."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Waits for the first.

        Args:
            sizes: The bytes of each tensor that comes in pieces, at least one.
        """
        self._sizes = sizes
        self._tensor = self._offset = 0

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have come."""
        return self._tensor == len(self._sizes)

    def take(self, raw: bytes) -> tuple[int, int, memoryview]:
        """Takes the next part.

        Args:
            raw: The part, from anywhere.

        Returns:
            The place of its tensor, how many bytes came before, and the bytes.

        Raises:
            StreamError: It is not the piece that comes next.
        """
        tensor, offset, start, stop = _read_piece(raw)
        size = stop - start
        if self.is_complete:
            raise StreamError(
                "there is a part after the last piece. Send as many bytes as the "
                "head's streamed_bytes say."
            )
        if (tensor, offset) != (self._tensor, self._offset):
            raise StreamError(
                f"the piece is byte {offset} of tensor {tensor}, but byte "
                f"{self._offset} of tensor {self._tensor} comes next. Send each piece "
                "once, in order."
            )
        left = self._sizes[tensor] - offset
        if not 0 < size <= min(PIECE_BYTES, left):
            raise StreamError(
                f"the piece has {size} bytes, and {left} are left of tensor {tensor}. "
                f"Send at least 1 and at most {PIECE_BYTES} at once, and no more than "
                "are left."
            )
        self._offset += size
        if size == left:
            self._tensor, self._offset = tensor + 1, 0
        return tensor, offset, memoryview(raw)[start:stop]


class Assembly:
    """The bytes of a head's tensors, as pieces bring them."""

    def __init__(self, raw: bytes, holes: Sequence[Hole]) -> None:
        """Makes a buffer for each tensor whose bytes are to come.

        Args:
            raw: The head's part.
            holes: What `framing.cut` has cut out of it.
        """
        view = memoryview(raw)
        self.payloads: list[Any] = []
        self._awaited: list[Array] = []
        for hole in holes:
            if hole.start is None:
                self._awaited.append(np.empty(hole.size, np.uint8))
                self.payloads.append(self._awaited[-1])
            else:
                self.payloads.append(view[hole.start : hole.start + hole.size])
        self._pieces = Pieces([len(buffer) for buffer in self._awaited])

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are there."""
        return self._pieces.is_complete

    def feed(self, raw: bytes) -> None:
        """Takes the next part.

        Args:
            raw: The part, from anywhere.

        Raises:
            StreamError: It is not the piece that comes next.
        """
        tensor, offset, data = self._pieces.take(raw)
        self._awaited[tensor][offset : offset + len(data)] = data


def _read_piece(raw: bytes) -> tuple[int, int, int, int]:
    """Returns a piece's tensor and offset, and where its data starts and stops."""
    try:
        [part] = framing.fields(raw, 0, len(raw), most=1)
        if part.number == _PIECE and part.is_bytes:
            inner = framing.fields(raw, part.start, part.stop, most=_MOST_FIELDS)
            found = {field.number: field for field in inner}
            tensor, offset, data = map(found.get, _PIECE_FIELDS)
            if data is not None and data.is_bytes:
                return (
                    tensor.number_in(raw) if tensor else 0,
                    offset.number_in(raw) if offset else 0,
                    data.start,
                    data.stop,
                )
    except (DecodeError, ValueError):
        pass
    raise StreamError(
        "there is a part that is no piece with data. Send one piece in each, after "
        "the head."
    )
