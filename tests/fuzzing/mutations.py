"""Makes messages that are almost right of messages that are.

Each mutation is drawn from a `random.Random`, so that the same seed gives the same
messages. Most work on fields, at any depth, and put the lengths around them right
again; some leave the lengths lying, or change bytes wherever they are.
"""

from collections.abc import Callable, Sequence
from random import Random

from fuzzing.wire import (
    BYTES,
    FIXED32,
    FIXED64,
    NAN_BITS,
    VARINT,
    WireField,
    joined,
    split,
    varint,
)

_SIZES = (0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 1000, 1001, 2**16, 2**20, 2**20 + 1)
_LARGE = (2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = (
    b"",
    b"\xff\xfe",
    b"\xed\xa0\x80",  # half of a surrogate pair
    b"\x00",
    b"../../etc/passwd",
    "\u202e\U0001f600".encode(),
    b"functions/" * 3,
    b"@",
    b"x" * 5000,
)
_LARGEST = 2**17


def mutated(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Returns a message after one to five mutations.

    Args:
        raw: A message.
        random: Draws.
        others: Messages to take parts from.
    """
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 5))):
        if random.random() < 0.7:
            raw = _in_fields(raw, random, others)
        else:
            raw = random.choice(_OF_BYTES)(raw, random, others)
    return raw[:_LARGEST]


def _in_fields(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    fields = split(raw)
    if not fields:
        return random.choice(_OF_BYTES)(raw, random, others)
    inner = [field for field in fields if field.wire_type == BYTES and field.value]
    if inner and random.random() < 0.65:
        chosen = random.choice(inner)
        if random.random() < 0.95:
            chosen.value = _in_fields(chosen.value, random, others)
            return joined(fields)
        # A length that lies.
        lie = varint(random.choice((len(chosen.value) + 1, *_SIZES, *_LARGE)))
        tag = varint(chosen.number << 3 | BYTES)
        return raw.replace(chosen.encoded(), tag + lie + chosen.value, 1)
    random.choice(_OF_FIELDS)(fields, random, others)
    return joined(fields)


def _drop(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    del fields[random.randrange(len(fields))]


def _repeat(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    chosen = random.choice(fields)
    fields.insert(random.randrange(len(fields) + 1), chosen)


def _repeat_often(
    fields: list[WireField], random: Random, others: Sequence[bytes]
) -> None:
    chosen = random.choice(fields)
    if len(chosen.value) < 64:
        fields += [chosen] * random.choice((3, 31, 33, 33, 1001))


def _swap(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    random.shuffle(fields)


def _exchange(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    """Two fields have each other's values."""
    one, other = random.choice(fields), random.choice(fields)
    if one.wire_type == other.wire_type:
        one.value, other.value = other.value, one.value


def _renumber(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    random.choice(fields).number = random.choice((*range(1, 17), 2000, 2**29 - 1))


def _retype(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    """Another wire type, with a value that is right for it."""
    chosen = random.choice(fields)
    chosen.wire_type = random.choice((VARINT, FIXED64, BYTES, FIXED32))
    if chosen.wire_type == VARINT:
        chosen.value = varint(random.choice(_SIZES))
    elif chosen.wire_type != BYTES:
        size = 8 if chosen.wire_type == FIXED64 else 4
        chosen.value = chosen.value[:size].ljust(size, b"\0")


def _reset(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    """Another value of the same wire type."""
    chosen = random.choice(fields)
    if chosen.wire_type == VARINT:
        small = range(20)
        chosen.value = varint(random.choice((*small, *_SIZES, *_LARGE)))
    elif chosen.wire_type == BYTES:
        known = random.choice((_TEXTS, NAN_BITS))
        chosen.value = random.choice(known)
    else:
        chosen.value = random.randbytes(len(chosen.value))


def _renumbers(
    fields: list[WireField], random: Random, others: Sequence[bytes]
) -> None:
    """Other numbers in a packed field, such as a shape."""
    chosen = random.choice(fields)
    if chosen.wire_type == BYTES:
        count = random.choice((0, 1, 2, 3, 33))
        numbers = (0, 1, 2, 3, 4, 5, *_SIZES, *_LARGE)
        drawn = [varint(random.choice(numbers)) for _ in range(count)]
        chosen.value = b"".join(drawn)


def _fill(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    """Bytes of the same length: numbers of a tensor, NaN among them."""
    chosen = random.choice(fields)
    if chosen.wire_type == BYTES:
        size = len(chosen.value)
        bits = random.choice((*NAN_BITS, random.randbytes(8)))
        chosen.value = (bits * (size // len(bits) + 1))[:size]


def _resize(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    chosen = random.choice(fields)
    if chosen.wire_type == BYTES:
        size = max(0, len(chosen.value) + random.choice((-8, -4, -1, 1, 4, 8)))
        chosen.value = chosen.value[:size].ljust(size, b"\0")


def _nest(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    chosen = random.choice(fields)
    for _ in range(random.choice((1, 1, 5, 5, 200))):
        chosen.value = WireField(
            chosen.number, chosen.wire_type, chosen.value
        ).encoded()
        chosen.wire_type = BYTES


def _graft(fields: list[WireField], random: Random, others: Sequence[bytes]) -> None:
    """A field of another message."""
    donor = split(random.choice(others))
    while donor:
        taken = random.choice(donor)
        deeper = split(taken.value) if taken.wire_type == BYTES else None
        if not deeper or random.random() < 0.5:
            fields.insert(random.randrange(len(fields) + 1), taken)
            return
        donor = deeper


def _flip(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    if not raw:
        return b"\n"
    place = random.randrange(len(raw))
    flipped = bytes([raw[place] ^ (1 << random.randrange(8))])
    return raw[:place] + flipped + raw[place + 1 :]


def _set(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    place = random.randrange(len(raw) + 1)
    return raw[:place] + random.randbytes(1) + raw[place + 1 :]


def _insert(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    place = random.randrange(len(raw) + 1)
    many = random.choice((1, 2, 3, 8, 100))
    added = random.choice((random.randbytes(many), b"\xff" * many, b"\x00" * many))
    return raw[:place] + added + raw[place:]


def _delete(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    place = random.randrange(len(raw) + 1)
    return raw[:place] + raw[place + random.choice((1, 2, 3, 8, 20)) :]


def _duplicate(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start = random.randrange(len(raw) + 1)
    stop = start + random.choice((1, 4, 16, len(raw)))
    return raw[:stop] + raw[start:]


def _truncate(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    return raw[: random.randrange(len(raw) + 1)]


def _splice(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    other = random.choice(others)
    return (
        raw[: random.randrange(len(raw) + 1)]
        + other[random.randrange(len(other) + 1) :]
    )


def _append(raw: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Two messages in a row are one, merged."""
    return raw + random.choice(others)


_OF_FIELDS: Sequence[Callable[[list[WireField], Random, Sequence[bytes]], None]] = (
    _drop, _drop, _repeat, _repeat, _repeat_often, _swap, _swap, _exchange, _exchange,
    _renumber, _renumber, _retype, _retype, _reset, _reset, _reset, _renumbers,
    _renumbers, _fill, _fill, _resize, _resize, _nest, _graft, _graft,
)  # fmt: skip
_OF_BYTES: Sequence[Callable[[bytes, Random, Sequence[bytes]], bytes]] = (
    _flip, _flip, _set, _insert, _delete, _duplicate, _truncate, _splice, _append
)  # fmt: skip
