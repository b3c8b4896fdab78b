"""Framing against protobuf itself: the same bytes must say the same to both.

Messages are written by hand here, in ways that no writer is known to choose but the
wire format allows: fields in any order, unknown ones between them, numbers longer than
they need be.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings, strategies as st
from jaxtyping import Array, Bool, Float, Num

from jacserve import framing, tensors
from jacserve.framing import Frame, Recognizer, bytes_field, varint
from jacserve.results import Result, ResultDecoder
from jacserve.tensors import MalformedTensorError
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server import Registry
from jacserve_server.catalog import Catalog
from jacserve_server.errors import ServiceError
from jacserve_server.messages import arrays_of, decode_query
from jacserve_server.registration import build_catalog
from jacserve_server.requests import RequestReader

# Without types: its enumerations are given as numbers, also such as do not exist.
new_query: Any = pb.Query

# Random, but the same in every run.
lawful = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

BYTES = pb.Tensor.DATA_FIELD_NUMBER
STREAMED = pb.Tensor.STREAMED_BYTES_FIELD_NUMBER

words = st.text(max_size=5)
shapes = st.lists(st.integers(0, 3), max_size=3)
pattern_kinds = st.sampled_from(["rows", "row_starts"])


@st.composite
def encoded_tensors(draw: st.DrawFn) -> pb.Tensor:
    dtype = draw(st.integers(1, 15))
    shape = draw(shapes)
    name = pb.DType.Name(dtype).removeprefix("DTYPE_").lower()
    size = int(np.prod(shape)) * tensors.dtype_named(name).itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if name == "bool":
        data = bytes(byte & 1 for byte in data)
    return pb.Tensor(dtype=pb.DType.Name(dtype), shape=shape, data=data)


steps = st.one_of(
    st.builds(pb.PathStep, key=words),
    st.builds(pb.PathStep, index=st.integers(0, 2**32 - 1)),
)
paths = st.lists(steps, max_size=2)
inputs = st.builds(pb.Input, name=words, tensor=encoded_tensors())
cotangents = st.builds(pb.Cotangent, path=paths, tensor=encoded_tensors())
quantities = st.lists(st.integers(0, 13), max_size=3)
queries = st.builds(
    pb.Query,
    function=words,
    inputs=st.lists(inputs, max_size=3),
    quantities=quantities,
    wrt=st.lists(words, max_size=2),
    mode=st.integers(0, 4),
    layout=st.integers(0, 4),
    cast=st.booleans(),
    require_finite=st.booleans(),
    tangents=st.lists(inputs, max_size=2),
    cotangents=st.lists(cotangents, max_size=2),
    patterns=st.lists(words, max_size=2),
    exact=st.booleans(),
)
patterns = st.builds(
    pb.Pattern,
    hash=words,
    row_count=st.integers(0, 2**40),
    column_count=st.integers(0, 9),
    columns=encoded_tensors(),
    rows=encoded_tensors(),
    row_starts=encoded_tensors(),
)
outputs = st.builds(
    pb.Output,
    quantity=st.integers(0, 13),
    path=paths,
    tensor=encoded_tensors(),
    mode=st.integers(0, 7),
    pattern=words,
)
results = st.builds(
    pb.Result,
    function=words,
    outputs=st.lists(outputs, max_size=3),
    patterns=st.lists(patterns, max_size=2),
    finite=st.booleans(),
    device=words,
    bucket=st.one_of(st.none(), st.integers(0, 2**40)),
    chunk_size=st.integers(0, 2**40),
    coalesced_count=st.integers(-5, 5),
)
sparsities = st.builds(
    pb.Sparsity, pattern=patterns, color_count=st.integers(0, 9), inputs=words
)
messages = st.one_of(queries, results, sparsities)


def long_varint(number: int, chance: random.Random) -> bytes:
    """A number with more bytes than it needs, as the format allows."""
    encoded = bytearray(varint(number & 2**64 - 1))
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        if len(encoded) < 10:
            encoded[-1] |= 0x80
            encoded.append(0)
    return bytes(encoded)


def unknown_field(chance: random.Random) -> bytes:
    number = chance.choice([14, 16, 100, 1000, 2**29 - 1])
    return chance.choice(
        [
            varint(number << 3 | 0) + long_varint(chance.getrandbits(64), chance),
            varint(number << 3 | 1) + chance.randbytes(8),
            varint(number << 3 | 5) + chance.randbytes(4),
            bytes_field(number, 3) + chance.randbytes(3),
        ]
    )


def rewritten(message: Message, chance: random.Random) -> bytes:
    """Serializes a message in a legal way that no library would choose."""
    raw = message.SerializeToString()
    by_number = {field.number: field for field in message.DESCRIPTOR.fields}
    heads: list[tuple[int, bytes]] = []
    for field in framing.fields(raw, 0, len(raw)):
        value = raw[field.start : field.stop]
        tag = varint(field.number << 3 | field.wire_type)
        if field.wire_type == 2:
            kind: Any = by_number[field.number].message_type
            if kind is not None:
                inner = kind._concrete_class.FromString(value)
                value = rewritten(inner, chance)
            value = long_varint(len(value), chance) + value
        elif field.wire_type == 0:
            value = long_varint(field.number_in(raw), chance)
        heads.append((field.number, tag + value))
    # Only among fields of one number is the order theirs.
    order = [number for number, _ in heads]
    chance.shuffle(order)
    waiting: dict[int, Iterator[bytes]] = {}
    for number in set(order):
        waiting[number] = iter([head for n, head in heads if n == number])
    parts: list[bytes] = []
    for number in order:
        if chance.random() < 0.2:
            parts.append(unknown_field(chance))
        parts.append(next(waiting[number]))
    return b"".join(parts)


def found_tensors(message: Message) -> Iterator[pb.Tensor]:
    """All tensors of a message, in the order of the fields."""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else [value]:
            if isinstance(each, pb.Tensor):
                yield each
            else:
                yield from found_tensors(each)


def whole(hollow: Message, payloads: list[Any]) -> Message:
    """Puts the bytes back by protobuf's own means."""
    message = type(hollow).FromString(hollow.SerializeToString())
    left = iter(payloads)
    for tensor in found_tensors(message):
        assert not tensor.data
        if tensor.streamed_bytes:
            tensor.data = bytes(next(left))
            assert len(tensor.data) == tensor.streamed_bytes
            tensor.streamed_bytes = 0
    assert next(left, None) is None
    return message


@lawful
@given(messages, st.integers(0, 2**32))
def test_what_is_opened_is_what_protobuf_parses(message: Message, seed: int) -> None:
    raw = rewritten(message, random.Random(seed))
    stock = type(message).FromString(raw)
    hollow, payloads = framing.opened(raw, type(message))
    assert whole(hollow, payloads) == stock
    assert sum(map(len, payloads)) == sum(len(t.data) for t in found_tensors(stock))


@lawful
@given(messages, st.integers(0, 2**32))
def test_what_is_filled_is_the_same_message(message: Message, seed: int) -> None:
    raw = rewritten(message, random.Random(seed))
    hollow, payloads = framing.opened(raw, type(message))
    frame = Frame(hollow)
    filled = frame.filled(payloads)
    assert len(filled) == frame.size
    assert type(message).FromString(filled) == type(message).FromString(raw)
    # What is known comes first or not at all: proto3 allows the same field again.
    before = pb.Result(device="gpu:7").SerializeToString()
    if isinstance(message, pb.Result) and not message.device:
        assert pb.Result.FromString(frame.filled(payloads, before)).device == "gpu:7"


@lawful
@given(queries)
def test_a_frame_is_made_of_a_described_query(query: pb.Query) -> None:
    hollow = pb.Query.FromString(query.SerializeToString())
    payloads = [tensor.data for tensor in found_tensors(hollow) if tensor.data]
    for tensor in found_tensors(hollow):
        tensor.streamed_bytes = len(tensor.data)
        tensor.data = b""
    filled = Frame(hollow).filled(payloads)
    assert pb.Query.FromString(filled) == query
    again, views = framing.opened(filled, pb.Query)
    assert again == hollow
    assert [bytes(view) for view in views] == payloads


@settings(lawful, max_examples=400)
@given(messages, st.integers(0, 2**32))
def test_damage_is_seen_or_does_no_harm(message: Message, seed: int) -> None:
    chance = random.Random(seed)
    raw = bytearray(rewritten(message, chance))
    if not raw:
        return
    for _ in range(chance.choice([1, 1, 2, 5])):
        raw[chance.randrange(len(raw))] = chance.choice(
            [0, 0xFF, chance.randrange(256)]
        )
    if chance.random() < 0.3:
        del raw[chance.randrange(len(raw)) :]
    damaged = bytes(raw)
    try:
        hollow, payloads = framing.opened(damaged, type(message))
    except DecodeError:
        return
    streamed = sum(bool(tensor.streamed_bytes) for tensor in found_tensors(hollow))
    if streamed == len(payloads):  # Else see the test of a tensor in two parts.
        assert whole(hollow, payloads) == type(message).FromString(damaged)


@lawful
@given(st.binary(max_size=40), st.sampled_from([pb.Query, pb.Result, pb.Sparsity]))
def test_noise_is_refused_or_read_alike(raw: bytes, kind: type[Message]) -> None:
    try:
        hollow, payloads = framing.opened(raw, kind)
    except DecodeError:
        return
    assert whole(hollow, payloads) == kind.FromString(raw)


def test_every_truncation_is_refused_or_read_alike() -> None:
    query = new_query(function="spherical", quantities=[1, 2])
    for name in ("x", "y"):
        given_ = query.inputs.add(name=name)
        tensors.encode_into(given_.tensor, np.arange(3.0))
    raw = query.SerializeToString()
    for stop in range(len(raw)):
        try:
            hollow, payloads = framing.opened(raw[:stop], pb.Query)
        except DecodeError:
            with pytest.raises(DecodeError):
                pb.Query.FromString(raw[:stop])
        else:
            assert whole(hollow, payloads) == pb.Query.FromString(raw[:stop])


def field_of(number: int, value: bytes) -> bytes:
    return bytes_field(number, len(value)) + value


def query_of(*tensor_parts: bytes, apart: bool = False) -> bytes:
    """A query of one input, whose tensor is these bytes; or comes in these parts."""
    parts = tensor_parts if apart else [b"".join(tensor_parts)]
    given_ = b"".join(field_of(2, part) for part in parts)
    head = new_query(function="f", quantities=[1]).SerializeToString()
    return head + field_of(2, given_)


HEAD = pb.Tensor(dtype=pb.DTYPE_FLOAT64, shape=[1]).SerializeToString()
ONE, TWO = np.array([1.0]).tobytes(), np.array([2.0]).tobytes()


@pytest.mark.parametrize(
    "raw",
    [
        query_of(HEAD, field_of(BYTES, ONE), field_of(BYTES, TWO)),
        query_of(HEAD, field_of(BYTES, ONE), framing.number_field(STREAMED, 8)),
        query_of(HEAD, framing.number_field(STREAMED, 8), field_of(BYTES, ONE)),
        query_of(HEAD, framing.number_field(STREAMED, 8) * 2),
        query_of(HEAD, framing.number_field(STREAMED, 8)),  # No one will bring them.
        query_of(HEAD, bytes_field(BYTES, 2**31)),
        query_of(HEAD, bytes_field(BYTES, 2**63)),
        query_of(HEAD, varint(BYTES << 3 | 2) + b"\xff" * 9 + b"\x01"),
        query_of(HEAD, varint(BYTES << 3 | 2) + b"\xff" * 11),
        query_of(HEAD, varint(20 << 3 | 3), varint(20 << 3 | 4)),  # A group.
        query_of(HEAD, varint(BYTES << 3 | 3)),
        query_of(HEAD, varint(BYTES << 3 | 6)),
        query_of(HEAD, varint(BYTES << 3 | 7)),
        query_of(HEAD, varint(0 << 3 | 2) + b"\x00"),  # There is no field 0.
        query_of(HEAD, b"\x80"),
        query_of(HEAD) + b"\x12",
        query_of(HEAD) + b"\x12\x05abc",
    ],
)
def test_malformed_messages_are_refused(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        framing.opened(raw, pb.Query)
    with pytest.raises(DecodeError):
        ResultDecoder().decode(raw.replace(b"f", b"\xff"))


@pytest.mark.parametrize(
    "raw",
    [
        # Fields of a known number and another type are unknown ones to protobuf.
        query_of(HEAD, field_of(BYTES, ONE), varint(BYTES << 3 | 0) + b"\x05"),
        query_of(HEAD, field_of(BYTES, ONE), field_of(STREAMED, b"abc")),
        query_of(HEAD, field_of(BYTES, ONE)) + varint(2 << 3 | 0) + b"\x05",
        query_of(HEAD, field_of(BYTES, ONE)) + varint(2 << 3 | 5) + b"abcd",
        # Nothing, said twice.
        query_of(HEAD, field_of(BYTES, ONE), b""),
        query_of(HEAD, framing.number_field(STREAMED, 0), field_of(BYTES, ONE)),
        # Dtype and shape in one part of the tensor, its data in the next.
        query_of(HEAD, field_of(BYTES, ONE), apart=True),
    ],
)
def test_unusual_messages_are_read_as_protobuf_does(raw: bytes) -> None:
    hollow, payloads = framing.opened(raw, pb.Query)
    assert whole(hollow, payloads) == pb.Query.FromString(raw)


def test_a_tensor_in_two_parts_is_refused_or_merged() -> None:
    raw = query_of(HEAD + field_of(BYTES, ONE), field_of(BYTES, TWO), apart=True)
    assert pb.Query.FromString(raw).inputs[0].tensor.data == TWO
    try:
        hollow, payloads = framing.opened(raw, pb.Query)
    except DecodeError:
        return
    decoded = decode_query(hollow, arrays_of(payloads))
    assert decoded.inputs[0][1].tolist() == [2.0]


def test_a_tensor_in_two_parts_does_not_shift_the_next() -> None:
    raw = [
        query_of(HEAD + field_of(BYTES, ONE), field_of(BYTES, ONE), apart=True),
        field_of(2, field_of(2, HEAD + field_of(BYTES, TWO))),
    ]
    try:
        hollow, payloads = framing.opened(b"".join(raw), pb.Query)
    except DecodeError:
        return
    decoded = decode_query(hollow, arrays_of(payloads))
    assert decoded.inputs[1][1].tolist() == [2.0]


def test_a_frame_of_a_message_with_foreign_fields() -> None:
    raw = query_of(HEAD, field_of(BYTES, ONE)) + varint(9 << 3 | 0) + b"\x05"
    hollow, payloads = framing.opened(raw, pb.Query)
    filled = Frame(hollow).filled(payloads)
    assert pb.Query.FromString(filled) == pb.Query.FromString(raw)


@pytest.mark.parametrize("tiny", [b"\x20\x01", b"\x12\x00", b"\x12\x02\x12\x00"])
def test_many_tiny_fields_are_refused_soon(tiny: bytes) -> None:
    raw = tiny * (2**22 // len(tiny))
    reader = RequestReader(lambda name: pytest.fail(name))
    start = time.monotonic()
    with pytest.raises(Exception, match="too many fields") as caught:
        reader.read(raw)
    assert caught.value.reason == "MALFORMED_REQUEST"  # type: ignore[attr-defined]
    assert time.monotonic() - start < 1.0


# --- What is known again ------------------------------------------------------------


def test_a_recognizer_is_bounded_and_forgets() -> None:
    known = Recognizer[int](capacity=10)
    for number in range(100):
        raw = b"head%03d" % number + bytes(4)
        known.learn(raw, [(7, 11)], number)
        found = known.find(raw[:7] + b"abcd")
        assert found is not None
        assert found[0] == number
        assert bytes(found[1][0]) == b"abcd"
    kept = [known.find(b"head%03d" % n + b"abcd") is not None for n in range(100)]
    assert 0 < sum(kept) <= 10


def test_layouts_of_one_size_are_not_confused() -> None:
    known = Recognizer[str](capacity=100)
    # The same bytes may differ here and be literal there.
    known.learn(b"aaaabbbb", [(0, 4)], "first")
    known.learn(b"aaaabbbb", [(4, 8)], "second")
    assert known.find(b"xxxxbbbb")[0] == "first"  # type: ignore[index]
    assert known.find(b"aaaayyyy")[0] == "second"  # type: ignore[index]
    assert known.find(b"xxxxyyyy") is None
    for place in range(9):  # More layouts than are kept.
        known.learn(b"ccccdddd", [(place % 8, place % 8 + 1)], str(place))
    assert known.find(b"zzzzzzzz") is None


def test_a_recognizer_is_safe_among_threads() -> None:
    known = Recognizer[int](capacity=50)
    wrong: list[object] = []
    stop = time.monotonic() + 1.0

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            while time.monotonic() < stop:
                number = chance.randrange(200)
                at = number % 5  # Layouts of one size, more than fit at times.
                raw = b"%03d" % number + b"\x00" * at + b"data" + b"\x00" * (9 - at)
                if (found := known.find(raw)) is None:
                    known.learn(raw, [(3 + at, 7 + at)], number)
                elif found[0] != number or bytes(found[1][0]) != b"data":
                    wrong.append((number, found))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def simple_result(**changes: Any) -> pb.Result:
    result = pb.Result(function="functions/f@1", device="cpu:0", finite=True)
    result.timing.execute_duration.nanos = 5
    output = result.outputs.add(quantity=pb.QUANTITY_VALUE)
    tensors.encode_into(output.tensor, changes.pop("array", np.arange(6.0)))
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def shown(result: Result) -> Any:
    facts = (result.function, result.device, result.bucket, result.finite)
    value = result.value
    return (
        *facts,
        dict(result.modes),
        result.timing,
        value.dtype,
        value.shape,
        value.tobytes(),
    )


ARRAYS = [
    np.arange(6, dtype="f4"),
    np.arange(6, dtype="i4"),
    np.arange(6, dtype="u4"),
    np.arange(6, dtype="f4").reshape(2, 3),
    np.arange(6, dtype="f4").reshape(3, 2),
    np.arange(3.0),
    np.arange(12, dtype="f2"),
    np.arange(12, dtype=tensors.dtype_named("bfloat16")),
    np.arange(24) % 2 == 0,
    np.arange(3, dtype="c8"),
    np.float64(3.0),
    np.empty((0, 3)),
]


@lawful
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), max_size=12))
def test_a_warm_decoder_decodes_as_a_cold_one(kinds: list[tuple[int, int]]) -> None:
    warm = ResultDecoder()
    for kind, variant in kinds:
        result = simple_result(array=ARRAYS[kind], finite=variant != 1)
        result.device = "cpu:1" if variant == 2 else "cpu:0"
        result.timing.execute_duration.nanos = 5 + kind
        # Jacserve's servers send the timing first; others may send it last.
        parts = [
            pb.Result(timing=result.timing).SerializeToString(),
            pb.Result(outputs=result.outputs).SerializeToString(),
        ]
        result.ClearField("timing")
        result.ClearField("outputs")
        parts.append(result.SerializeToString())
        raw = b"".join(reversed(parts) if variant == 3 else parts)
        for _ in range(2):
            decoded = warm.decode(raw)
            assert shown(decoded) == shown(ResultDecoder().decode(raw))
            assert decoded.value.flags.writeable
            if decoded.value.size:
                decoded.value[...] = 0  # The caller's own: the next must not see it.


def test_a_bool_that_is_neither_is_refused_warm_as_cold() -> None:
    decoder = ResultDecoder()
    raw = simple_result(array=np.array([True, False, True])).SerializeToString()
    data = b"\x01\x00\x01"
    assert raw.count(data) == 1
    for _ in range(2):
        assert decoder.decode(raw).value.tolist() == [True, False, True]
    with pytest.raises(MalformedTensorError):
        decoder.decode(raw.replace(data, b"\x01\x02\x01"))


def with_timing(timing: bytes) -> bytes:
    result = simple_result()
    result.ClearField("timing")
    return field_of(pb.Result.TIMING_FIELD_NUMBER, timing) + result.SerializeToString()


def test_a_garbled_timing_is_refused_warm_as_cold() -> None:
    timing = pb.Timing()
    timing.execute_duration.nanos = 5
    raw = timing.SerializeToString()
    decoder = ResultDecoder()
    assert decoder.decode(with_timing(raw)).timing.execute_s == pytest.approx(5e-9)
    garbled = with_timing(b"\xff" * len(raw))
    with pytest.raises(DecodeError):
        ResultDecoder().decode(garbled)
    with pytest.raises(DecodeError):
        decoder.decode(garbled)


# What `evaluation` makes ServerErrors of.
REFUSALS = (DecodeError, LookupError, ValueError, MemoryError)


def sparse_result(columns: Any, starts: Any, row_count: int = 2) -> bytes:
    result = simple_result()
    pattern = result.patterns.add(hash="abc", row_count=row_count, column_count=3)
    tensors.encode_into(pattern.columns, columns)
    tensors.encode_into(pattern.row_starts, starts)
    matrix = result.outputs.add(quantity=pb.QUANTITY_JACOBIAN, pattern="abc")
    tensors.encode_into(matrix.tensor, np.array([1.0, 2.0]))
    return result.SerializeToString()


COLUMNS, STARTS = np.array([0, 2], "i4"), np.array([0, 1, 2], "i4")


def damaged(raw: bytes, chance: random.Random) -> bytes:
    mutable = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2])):
        mutable[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(mutable)


@settings(lawful, max_examples=400)
@given(st.integers(0, 2**32), st.integers(0, 11))
def test_a_garbled_result_is_refused_in_known_ways(seed: int, kind: int) -> None:
    raw = simple_result(array=ARRAYS[kind]).SerializeToString()
    decoder = ResultDecoder()
    decoder.decode(raw)
    with suppress(*REFUSALS):
        decoder.decode(damaged(raw, random.Random(seed)))


def test_a_garbled_sparse_result_is_refused_in_known_ways() -> None:
    raw = sparse_result(COLUMNS, STARTS)
    for seed in range(500, 600):
        with suppress(*REFUSALS):
            ResultDecoder().decode(damaged(raw, random.Random(seed)), "csr")


def test_a_sparse_result_is_decoded() -> None:
    result = ResultDecoder().decode(sparse_result(COLUMNS, STARTS), "csr")
    assert result.jacobian.toarray().tolist() == [[1, 0, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("columns", "starts"),
    [
        (COLUMNS, np.array([0, 1, 1], "i4")),  # Ends before its last entry.
        (COLUMNS, np.array([0, 1, 2**20], "i4")),  # Or far behind it.
        (COLUMNS, np.array([0, 2], "i4")),  # Has too few rows.
        (COLUMNS[:1], STARTS),  # Has fewer entries than values.
        (COLUMNS.reshape(1, 2), STARTS),
        (np.array([0, 3], "i4"), STARTS),  # Leaves the matrix.
        (np.array([-1, 2], "i4"), STARTS),
        (COLUMNS.astype("f4"), STARTS),
        (COLUMNS, STARTS.astype("f4")),
    ],
)
def test_a_pattern_that_contradicts_itself_is_refused(columns, starts) -> None:
    with pytest.raises(REFUSALS):
        ResultDecoder().decode(sparse_result(columns, starts), "csr")


# --- The server's memory of queries --------------------------------------------------

registry = Registry()


@registry.function
def double(x: Num[Array, "n"]) -> Num[Array, "n"]:
    return x + x


@registry.function
def triple(x: Num[Array, "n"]) -> Num[Array, "n"]:
    return x + x + x


@registry.function
def choose(b: Bool[Array, "n"], x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.where(b, x, -x)


@registry.function
def matvec(a: Float[Array, "m n"], b: Float[Array, "n"]) -> Float[Array, "m"]:
    return a @ b


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return build_catalog([registry])


SIX = [np.arange(6.0), np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2)]
VALUES: list[Any] = [
    *[x.astype(dtype) for x in SIX for dtype in ("f4", "i4", "u4")],
    *[np.arange(12).astype(tensors.dtype_named(t)) for t in ("float16", "bfloat16")],
    *[np.arange(3).astype(t) for t in ("f8", "i8", "c8")],
    np.arange(6) % 2 == 0,
    np.float64(1.0),
    np.empty((0,)),
    np.empty((3, 0), "f4"),
]


@st.composite
def asked(draw: st.DrawFn) -> pb.Query:
    function = draw(st.sampled_from(["double", "triple", "choose", "matvec"]))
    query = new_query(
        function=function,
        quantities=draw(st.sampled_from([[1], [2], [1, 2], [2, 1], [7], [99], []])),
        wrt=draw(
            st.sampled_from([[], [], ["x"], ["a"], ["b"], ["a", "b"], ["b", "a"]])
        ),
        mode=draw(st.sampled_from([0, 0, 1, 2, 3, 77])),
        layout=draw(st.sampled_from([0, 0, 1, 2])),
        cast=draw(st.sampled_from([False, False, True])),
        require_finite=draw(st.booleans()),
        exact=draw(st.booleans()),
    )
    names = draw(
        st.sampled_from(
            [["", ""], ["a", "b"], ["b", "a"], ["b", "x"], ["x", "b"], ["", "x"]]
        )
    )
    for name in names[: draw(st.sampled_from([1, 1, 2]))]:
        given_ = query.inputs.add(name=name)
        value = draw(st.sampled_from(VALUES))
        tensors.encode_into(given_.tensor, np.roll(value, draw(st.integers(0, 2))))
        if draw(st.integers(0, 9)) == 0 and given_.tensor.data:  # Perhaps a bool.
            given_.tensor.data = b"\x02" + given_.tensor.data[1:]
        if draw(st.integers(0, 9)) == 0:
            given_.tensor.shape[:] = [6]
    if 7 in query.quantities:
        tensors.encode_into(query.tangents.add().tensor, draw(st.sampled_from(VALUES)))
    return query


def outcome_of(reader: RequestReader, raw: bytes) -> Any:
    try:
        request = reader.read(raw)
    except ServiceError as error:
        return error.reason, error.message, error.field, error.metadata
    facts = (request.query.quantities, request.query.require_finite)
    work = request.work
    arrays = [(x.dtype, x.shape, x.tobytes()) for x in work.arrays]
    return (
        facts,
        request.query.layout,
        work.computation,
        work.batch,
        work.is_exact,
        arrays,
    )


@settings(lawful, max_examples=100)
@given(st.lists(asked(), min_size=2, max_size=10), st.integers(0, 2**32))
def test_a_warm_reader_reads_as_a_cold_one(
    catalog: Catalog, asks: list[pb.Query], seed: int
) -> None:
    chance = random.Random(seed)
    warm = RequestReader(lambda name: catalog.find(name).spec)
    for query in asks * 2:
        raw = rewritten(query, chance) if seed % 3 == 0 else query.SerializeToString()
        cold = RequestReader(lambda name: catalog.find(name).spec)
        assert outcome_of(warm, raw) == outcome_of(cold, raw)


def test_a_warm_reader_is_warm(catalog: Catalog, monkeypatch) -> None:
    """Else the test above says nothing."""
    reader = RequestReader(lambda name: catalog.find(name).spec)
    query = new_query(function="double", quantities=[1, 2])
    given_ = query.inputs.add()
    tensors.encode_into(given_.tensor, np.arange(3.0))
    reader.read(query.SerializeToString())
    monkeypatch.setattr("jacserve_server.requests.decode_query", None)
    given_.tensor.data = np.arange(3.0, 6.0).tobytes()
    request = reader.read(query.SerializeToString())
    assert request.work.arrays[0].tolist() == [3.0, 4.0, 5.0]
