"""Messages and the bytes of their tensors, apart and put together.

A *hollow* message has `streamed_bytes` in its tensors where a whole one has `data`.
Protobuf reads and writes hollow messages, which are small; the bytes of the tensors
are cut out of a whole message, or put into it, by hand and without a copy of their
own. What results is plain protobuf. Only the fields that lead to tensors are known
here; everything else is passed over.

Source: https://protobuf.dev/programming-guides/encoding/
"""

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from jacserve.v1 import jacobian_pb2 as pb

M = TypeVar("M", bound=Message)
V = TypeVar("V")

# The most bytes of a tensor that one piece of a stream carries, and the most that
# tensors take in a message that is not a stream's.
PIECE_BYTES = 2**20

# Wire types: how the value of a field is written.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LAST_NUMBER = 2**29 - 1
_DATA = pb.Tensor.DATA_FIELD_NUMBER
_STREAMED = pb.Tensor.STREAMED_BYTES_FIELD_NUMBER

# Which fields lead to tensors: through which fields of theirs. A tensor itself is
# None.
_Routes: TypeAlias = "Mapping[int, _Routes | None]"


@functools.cache
def _routes(descriptor: Descriptor) -> _Routes:
    found: dict[int, _Routes | None] = {}
    for field in descriptor.fields:
        if field.message_type is pb.Tensor.DESCRIPTOR:
            found[field.number] = None
        elif field.message_type and (routes := _routes(field.message_type)):
            found[field.number] = routes
    return found


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a serialized message; its value is the bytes from start to stop."""

    number: int
    wire_type: int
    place: int
    start: int
    stop: int

    @property
    def is_bytes(self) -> bool:
        """Whether its value is bytes, a text or a message."""
        return self.wire_type == BYTES

    def number_in(self, raw: bytes) -> int:
        """Returns the value of a field that is a whole number.

        Raises:
            DecodeError: It is something else.
        """
        if self.wire_type != VARINT:
            raise DecodeError("a field is no number")
        return _read_varint(raw, self.start, self.stop)[0]


_SHORT = [bytes([number]) for number in range(0x80)]


def varint(number: int) -> bytes:
    """Encodes a whole number that is not negative."""
    if number < 0x80:
        return _SHORT[number]
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(raw: bytes, place: int, stop: int) -> tuple[int, int]:
    number = shift = 0
    while place < stop and shift < 70:
        byte = raw[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, place
        shift += 7
    raise DecodeError("a number has no end")


def fields(raw: bytes, place: int, stop: int, *, most: int = 2**62) -> Iterator[Field]:
    """Yields the fields of a serialized message, or of a part of one.

    Args:
        raw: The bytes, from anywhere.
        place: Where the message starts in them.
        stop: Where it stops.
        most: How many fields it may have.

    Yields:
        Its fields, as they come.

    Raises:
        DecodeError: It is no message, or has more fields.
    """
    while place < stop:
        most -= 1
        if most < 0:
            raise DecodeError("the message has too many fields")
        tag, start = _read_varint(raw, place, stop)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            _, end = _read_varint(raw, start, stop)
        elif wire_type == BYTES:
            size, start = _read_varint(raw, start, stop)
            end = start + size
        elif wire_type in (FIXED64, FIXED32):
            end = start + (8 if wire_type == FIXED64 else 4)
        else:
            raise DecodeError("a field has an unknown wire type")
        if end > stop or not 0 < number <= _LAST_NUMBER:
            raise DecodeError("a field does not end where its message does")
        yield Field(number, wire_type, place, start, end)
        place = end


def number_field(number: int, value: int) -> bytes:
    """Encodes a field of a whole number; one that is 0 is left out."""
    return varint(number << 3 | VARINT) + varint(value) if value else b""


def bytes_field(number: int, size: int) -> bytes:
    """Returns what goes before the value of a field of bytes or of a message."""
    return varint(number << 3 | BYTES) + varint(size)


@dataclass(frozen=True, slots=True)
class Hole:
    """The bytes of one tensor in a whole message, or to come in pieces.

    Attributes:
        start: Where they start in the message; None where they come in pieces.
        size: How many they are.
    """

    start: int | None
    size: int


def cut(
    raw: bytes, kind: type[Message], *, most_fields: int = 2**62
) -> tuple[bytes, list[Hole]]:
    """Cuts the bytes of its tensors out of a message.

    Args:
        raw: The message, from anywhere.
        kind: Of what type it is.
        most_fields: How many fields are looked at before it is refused; each takes
            about a microsecond.

    Returns:
        The hollow message, and a hole for each tensor that has bytes, in the order
        of the message's fields.

    Raises:
        DecodeError: It is no such message, has more fields, or has a tensor that
            comes in parts.
    """
    cutter = _Cutter(raw, most_fields)
    hollow = cutter.message(0, len(raw), _routes(kind.DESCRIPTOR), ())
    # A writer may put fields in any order; a reader finds them by number.
    cutter.found.sort(key=lambda entry: entry[0])
    return hollow, [hole for _, hole in cutter.found]


def opened(
    raw: bytes, kind: type[M], *, most_fields: int = 2**62
) -> tuple[M, list[memoryview]]:
    """Parses a whole message.

    Args:
        raw: The message, from anywhere.
        kind: Of what type it is.
        most_fields: As for `cut`.

    Returns:
        The hollow message, and the bytes of its tensors, of those that have any, in
        the order of its fields.

    Raises:
        DecodeError: It is no such message, or bytes of a tensor are missing.
    """
    message, holes = hollowed(raw, kind, most_fields=most_fields)
    view = memoryview(raw)
    payloads: list[memoryview] = []
    for hole in holes:
        if hole.start is None:
            raise DecodeError("the bytes of a tensor are missing")
        payloads.append(view[hole.start : hole.start + hole.size])
    return message, payloads


def hollowed(
    raw: bytes, kind: type[M], *, most_fields: int = 2**62
) -> tuple[M, list[Hole]]:
    """Parses a message whose tensors may have their bytes, or get them in pieces.

    Args:
        raw: The message, from anywhere.
        kind: Of what type it is.
        most_fields: As for `cut`.

    Returns:
        The hollow message, and a hole for each of its tensors that has bytes, in the
        order of its fields.

    Raises:
        DecodeError: It is no such message.
    """
    hollow, holes = cut(raw, kind, most_fields=most_fields)
    message = kind.FromString(hollow)
    # Protobuf merges fields that come twice, and then a tensor has two holes.
    sizes = list(_sizes(message, _routes(kind.DESCRIPTOR)))
    if sizes != [hole.size for hole in holes]:
        raise DecodeError("the bytes of a tensor come twice")
    return message, holes


def _sizes(message: Message, routes: _Routes) -> Iterator[int]:
    for field, value in message.ListFields():
        if field.number in routes:
            for each in value if field.is_repeated else (value,):
                inner = routes[field.number]
                if inner is not None:
                    yield from _sizes(each, inner)
                elif each.streamed_bytes:
                    yield each.streamed_bytes


class _Cutter:
    """Cuts one message; `found` has its holes with the paths of their tensors."""

    def __init__(self, raw: bytes, most_fields: int) -> None:
        self._raw = raw
        self._room = most_fields
        self.found: list[tuple[tuple[int, ...], Hole]] = []

    def message(
        self, start: int, stop: int, routes: _Routes, path: tuple[int, ...]
    ) -> bytes:
        raw, parts, copied = self._raw, list[bytes](), start
        for turn, field in enumerate(self._fields(start, stop)):
            if field.number not in routes or field.wire_type != BYTES:
                continue
            route, inner_path = routes[field.number], (*path, field.number, turn)
            if route is None:
                inner = self.tensor(field, inner_path)
            else:
                inner = self.message(field.start, field.stop, route, inner_path)
            head = bytes_field(field.number, len(inner))
            parts += raw[copied : field.place], head, inner
            copied = field.stop
        parts.append(raw[copied:stop])
        return b"".join(parts)

    def tensor(self, tensor: Field, path: tuple[int, ...]) -> bytes:
        raw, parts, copied = self._raw, list[bytes](), tensor.start
        hole: Hole | None = None
        for field in self._fields(tensor.start, tensor.stop):
            if (field.number, field.wire_type) == (_DATA, BYTES):
                found = Hole(field.start, field.stop - field.start)
            elif (field.number, field.wire_type) == (_STREAMED, VARINT):
                found = Hole(None, field.number_in(raw))
            else:
                continue
            if hole is not None:
                raise DecodeError("the bytes of a tensor come twice")
            hole = found
            parts.append(raw[copied : field.place])
            copied = field.stop
        parts.append(raw[copied : tensor.stop])
        if hole is not None and hole.size:
            parts += varint(_STREAMED << 3 | VARINT), varint(hole.size)
            self.found.append((path, hole))
        return b"".join(parts)

    def _fields(self, start: int, stop: int) -> Iterator[Field]:
        for field in fields(self._raw, start, stop):
            self._room -= 1
            if self._room < 0:
                raise DecodeError("the message has too many fields")
            yield field


class Frame:
    """A whole message without the bytes of its tensors, which are yet to be put in."""

    __slots__ = ("_parts", "size")

    def __init__(self, hollow: Message) -> None:
        """Makes the frame of a hollow message.

        Args:
            hollow: A message whose tensors have `streamed_bytes`.
        """
        raw = hollow.SerializeToString()
        parts, self.size = _expand(raw, 0, len(raw), _routes(hollow.DESCRIPTOR))
        # Literal bytes at even places, and nothing at odd ones: there tensors go.
        self._parts: list[Any] = [b""]
        for part in parts:
            if isinstance(part, int):
                self._parts += None, b""
            else:
                self._parts[-1] += part

    def filled(self, payloads: Iterable[Any], before: bytes = b"") -> bytes:
        """Returns the message with the bytes of its tensors.

        Args:
            payloads: Buffers, one for each tensor that has bytes, in the order of the
                message's fields.
            before: Further fields of the message.

        Returns:
            The message.
        """
        parts = self._parts.copy()
        parts[1::2] = payloads
        if before:
            parts.insert(0, before)
        return b"".join(parts)


def _expand(
    raw: bytes, start: int, stop: int, routes: _Routes
) -> tuple[list[bytes | int], int]:
    """Returns the parts of a whole message, tensors as their sizes; and its size."""
    parts: list[bytes | int] = []
    copied, size = start, 0
    for field in fields(raw, start, stop):
        if field.number not in routes or not field.is_bytes:
            continue
        route = routes[field.number]
        if route is None:
            inner, inner_size = _expand_tensor(raw, field)
        else:
            inner, inner_size = _expand(raw, field.start, field.stop, route)
        head = raw[copied : field.place] + bytes_field(field.number, inner_size)
        parts += head, *inner
        size += len(head) + inner_size
        copied = field.stop
    parts.append(raw[copied:stop])
    return parts, size + stop - copied


def _expand_tensor(raw: bytes, tensor: Field) -> tuple[list[bytes | int], int]:
    for field in fields(raw, tensor.start, tensor.stop):
        if field.number == _STREAMED and field.wire_type == VARINT:
            streamed = field.number_in(raw)
            literal = raw[tensor.start : field.place] + raw[field.stop : tensor.stop]
            # Data goes last, as the contract says.
            head = literal + bytes_field(_DATA, streamed)
            return [head, streamed], len(head) + streamed
    return [raw[tensor.start : tensor.stop]], tensor.stop - tensor.start


class _Layout(Generic[V]):
    """Messages of one size whose tensors are at the same places."""

    def __init__(self, edges: Sequence[int]) -> None:
        spans = list(map(slice, edges, edges[1:]))
        self.literals, self.tensors = spans[::2], spans[1::2]
        self.known: dict[bytes, V] = {}

    def key(self, raw: bytes) -> bytes:
        """Returns what a message says but for its tensors' bytes."""
        return b"".join([raw[span] for span in self.literals])


_MOST_LAYOUTS = 8


class Recognizer(Generic[V]):
    """Knows messages again that differ in the bytes of their tensors alone.

    Small messages take longer to parse than to compare, and callers ask the same
    function again and again. Thread-safe.
    """

    def __init__(self, *, capacity: int) -> None:
        """Knows nothing yet.

        Args:
            capacity: How many messages are known; beyond that all are forgotten.
        """
        self._capacity = capacity
        self._lock = threading.Lock()
        self._count = 0
        # By a message's size, then by where its tensors are.
        self._layouts: dict[int, dict[tuple[int, ...], _Layout[V]]] = {}

    def find(self, raw: bytes) -> tuple[V, list[memoryview]] | None:
        """Finds what was learnt of a message.

        Args:
            raw: The message.

        Returns:
            What was learnt of its like, and the bytes that may differ; None when it
            is like none.
        """
        layouts = self._layouts.get(len(raw))
        if layouts is None:
            return None
        # The values at this moment: another thread may add to them.
        for layout in tuple(layouts.values()):
            found = layout.known.get(layout.key(raw))
            if found is not None:
                view = memoryview(raw)
                return found, [view[span] for span in layout.tensors]
        return None

    def learn(self, raw: bytes, spans: Sequence[tuple[int, int]], value: V) -> None:
        """Remembers something of a message.

        Args:
            raw: The message.
            spans: Where the bytes that may differ start and stop, in order.
            value: What is true of all messages like it; not None.
        """
        edges = (0, *(edge for span in spans for edge in span), len(raw))
        with self._lock:
            layouts = self._layouts.setdefault(len(raw), {})
            is_full = len(layouts) >= _MOST_LAYOUTS and edges not in layouts
            if is_full or self._count >= self._capacity:
                self._layouts, self._count = {}, 0
                layouts = self._layouts.setdefault(len(raw), {})
            layout = layouts.setdefault(edges, _Layout(edges))
            layout.known[layout.key(raw)] = value
            self._count += 1
