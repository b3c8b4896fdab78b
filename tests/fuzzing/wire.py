"""Serialized messages as fields, read and written apart from the code under test."""

import struct
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}


@dataclass(slots=True)
class WireField:
    """A field; the value of one of bytes is without its length."""

    number: int
    wire_type: int
    value: bytes

    def encoded(self) -> bytes:
        tag = varint(self.number << 3 | self.wire_type)
        size = varint(len(self.value)) if self.wire_type == BYTES else b""
        return tag + size + self.value


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def split(raw: bytes) -> list[WireField] | None:
    """The fields of a message; None where it is none."""
    found: list[WireField] = []
    place = 0
    while place < len(raw):
        tag, place = _end_of_varint(raw, place)
        if tag is None or not tag >> 3:
            return None
        wire_type, start = tag & 7, place
        if wire_type == VARINT:
            number, place = _end_of_varint(raw, place)
            if number is None:
                return None
        elif wire_type == BYTES:
            size, start = _end_of_varint(raw, place)
            if size is None:
                return None
            place = start + size
        elif wire_type in _FIXED:
            place += _FIXED[wire_type]
        else:
            return None
        if place > len(raw):
            return None
        found.append(WireField(tag >> 3, wire_type, raw[start:place]))
    return found


def joined(fields: list[WireField]) -> bytes:
    return b"".join([field.encoded() for field in fields])


def _end_of_varint(raw: bytes, place: int) -> tuple[int | None, int]:
    number = shift = 0
    while place < len(raw) and shift < 64:
        byte = raw[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
    return None, place


def packed(parts: list[bytes]) -> bytes:
    """Several messages as one, each in a field, so that they mutate as one."""
    return joined([WireField(1, BYTES, part) for part in parts])


def unpacked(raw: bytes) -> list[bytes]:
    return [field.value for field in split(raw) or () if field.wire_type == BYTES]


NAN_BITS = (
    struct.pack("<d", float("nan")),
    struct.pack("<d", float("inf")),
    bytes.fromhex("010000000000f07f"),  # a signalling NaN
    bytes.fromhex("ffffffffffffffff"),
    bytes.fromhex("0000c07f"),
    bytes.fromhex("007e007e"),
)
