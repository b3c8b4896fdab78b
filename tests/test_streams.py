"""EvaluateStream, by those who keep to the contract and by those who do not."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool, Complex, Float, Num

import jacserve
from jacserve import tensors
from jacserve.channels import EVALUATE, EVALUATE_STREAM
from jacserve.errors import translated
from jacserve.evaluation import Receiver
from jacserve.framing import PIECE_BYTES
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server import Registry, serving
from server_process import server_process

registry = Registry()
release = threading.Event()
running = threading.Semaphore(0)


def wait_for_release(x: np.ndarray) -> np.ndarray:
    running.release()
    assert release.wait(30)
    return x


@registry.function
def double(x: Num[Array, "n"]) -> Num[Array, "n"]:
    return x + x


@registry.function
def total(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(x)


@registry.function
def flip(b: Bool[Array, "n"]) -> Bool[Array, "n"]:
    return ~b


@registry.function
def turn(z: Complex[Array, "n"]) -> Complex[Array, "n"]:
    return 1j * z


@registry.function
def pair(x: Float[Array, "n"], y: Float[Array, "n"]) -> dict[str, Float[Array, "n"]]:
    return {"sum": x + y, "product": x * y}


@registry.function
def outer(x: Float[Array, "n"]) -> Float[Array, "n n"]:
    return jnp.outer(x, x)


@registry.function
def square(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x * x


@registry.function
def patient(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Runs until it is told to stop."""
    return jax.pure_callback(wait_for_release, x, x, vmap_method="sequential")


LIMIT = 2**24


@pytest.fixture(scope="module")
def target() -> Generator[str]:
    with serving(registry, max_payload_bytes=LIMIT, max_queries=4) as server:
        yield server.target


@pytest.fixture(scope="module")
def client(target: str) -> Generator[jacserve.Client]:
    with jacserve.Client(target, timeout_s=60.0) as connected:
        yield connected


@pytest.fixture(scope="module")
def ask(target: str) -> Generator[Callable[..., pb.Result]]:
    """Asks by protobuf alone, in whatever parts it is given."""
    with grpc.insecure_channel(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)

        def send(parts: Sequence[Any] | Iterator[Any]) -> pb.Result:
            raws = (
                part if isinstance(part, bytes) else part.SerializeToString()
                for part in parts
            )
            with translated(target):
                return whole(call(raws, timeout=30))

        yield send


def whole(raws: Iterator[bytes]) -> pb.Result:
    """Puts a result together as a client would that has only the contract."""
    result: pb.Result | None = None
    buffers: list[bytearray] = []
    for raw in raws:
        part = pb.EvaluateStreamResponse.FromString(raw)
        if result is None:
            assert part.HasField("head")
            result = part.head
            continue
        piece = part.piece
        assert 0 < len(piece.data) <= PIECE_BYTES
        if piece.tensor == len(buffers):
            buffers.append(bytearray())
        assert piece.tensor == len(buffers) - 1
        assert piece.offset == len(buffers[-1])
        buffers[-1] += piece.data
    assert result is not None
    left = iter(buffers)
    each = [output.tensor for output in result.outputs]
    for pattern in result.patterns:
        each += [pattern.columns, pattern.rows, pattern.row_starts]
    for tensor in each:
        if tensor.streamed_bytes:
            tensor.data = bytes(next(left))
            assert len(tensor.data) == tensor.streamed_bytes
    assert next(left, None) is None
    return result


new_query: Any = pb.Query


def query_of(*arrays: np.ndarray, function: str = "double") -> pb.Query:
    query = new_query(function=function, quantities=[1])
    for array in arrays:
        tensors.encode_into(query.inputs.add().tensor, array)
    return query


def head_of(query: pb.Query) -> pb.EvaluateStreamRequest:
    head = pb.EvaluateStreamRequest(head=query)
    for given in head.head.inputs:
        given.tensor.streamed_bytes = len(given.tensor.data)
        given.tensor.data = b""
    return head


def piece(tensor: int, offset: int, data: bytes) -> pb.EvaluateStreamRequest:
    part = pb.EvaluateStreamRequest()
    part.piece.CopyFrom(pb.Piece(tensor=tensor, offset=offset, data=data))
    return part


def pieces_of(query: pb.Query, size: int) -> list[pb.EvaluateStreamRequest]:
    return [
        piece(place, offset, given.tensor.data[offset : offset + size])
        for place, given in enumerate(query.inputs)
        for offset in range(0, len(given.tensor.data), size)
    ]


X, Y = np.arange(6.0), np.arange(6.0) + 10
DATA = X.tobytes()


def test_a_stock_client_streams_in_pieces_of_any_size(ask) -> None:
    query = query_of(X, Y, function="pair")
    expected = [(X + Y).tobytes(), (X * Y).tobytes()]
    whole_head = pb.EvaluateStreamRequest(head=query)
    for parts in (
        [whole_head],
        *([head_of(query), *pieces_of(query, size)] for size in (1, 7, 40, 48)),
    ):
        result = ask(parts)
        assert [o.tensor.data for o in result.outputs] == expected
        assert [o.path[0].key for o in result.outputs] == ["sum", "product"]
        assert result.finite


def test_one_tensor_may_come_with_the_head_and_another_after_it(ask) -> None:
    query = query_of(X, Y, function="pair")
    for place in (0, 1):
        head = head_of(query)
        head.head.inputs[place].CopyFrom(query.inputs[place])
        data = query.inputs[1 - place].tensor.data
        # The head's tensors that are streamed count from 0.
        result = ask([head, piece(0, 0, data[:5]), piece(0, 5, data[5:])])
        assert result.outputs[1].tensor.data == (X * Y).tobytes()


def test_large_inputs_of_a_stock_client(ask) -> None:
    x = np.arange(300_000.0)
    query = query_of(x)
    result = ask([head_of(query), *pieces_of(query, PIECE_BYTES)])
    np.testing.assert_array_equal(np.frombuffer(result.outputs[0].tensor.data), 2 * x)


def contradicting(**changes: Any) -> pb.EvaluateStreamRequest:
    head = head_of(query_of(X))
    for name, value in changes.items():
        if name == "shape":
            head.head.inputs[0].tensor.shape[:] = value
        else:
            setattr(head.head.inputs[0].tensor, name, value)
    return head


HEAD, ALL = head_of(query_of(X)), piece(0, 0, DATA)
BROKEN: dict[str, list[Any]] = {
    "nothing": [],
    "an empty part": [b""],
    "only a head": [HEAD],
    "no head": [ALL],
    "an empty head's part": [b"", HEAD, ALL],
    "an end too early": [HEAD, piece(0, 0, DATA[:40])],
    "a gap": [HEAD, piece(0, 8, DATA[8:])],
    "another order": [HEAD, piece(0, 24, DATA[24:]), piece(0, 0, DATA[:24])],
    "a repeat": [HEAD, piece(0, 0, DATA[:24]), piece(0, 0, DATA[:24])],
    "an overlap": [HEAD, piece(0, 0, DATA[:24]), piece(0, 16, DATA[16:])],
    "an empty piece": [HEAD, piece(0, 0, b""), ALL],
    "too many bytes": [HEAD, piece(0, 0, DATA + b"\0")],
    "a piece after the end": [HEAD, ALL, piece(0, 48, b"\0")],
    "a piece of the next tensor": [HEAD, ALL, piece(1, 0, b"\0")],
    "another tensor": [HEAD, piece(1, 0, DATA)],
    "a far tensor": [HEAD, piece(2**32 - 1, 0, DATA)],
    "a far offset": [HEAD, piece(0, 2**64 - 1, DATA)],
    "a second head": [HEAD, HEAD, ALL],
    "a late head": [HEAD, ALL, HEAD],
    "noise": [HEAD, b"\xff" * 20],
    "a cut part": [HEAD, ALL.SerializeToString()[:-1]],
    "two pieces in a part": [HEAD, ALL.SerializeToString() * 2],
    "a foreign field": [HEAD, b"\x20\x01" + ALL.SerializeToString()],
    "a number for a piece": [HEAD, b"\x78\x05"],
    "pieces for what came with the head": [
        pb.EvaluateStreamRequest(head=query_of(X)),
        ALL,
    ],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_streams_are_refused(ask, name: str) -> None:
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        ask(BROKEN[name])
    assert caught.value.reason == "STREAM_BROKEN"
    assert "broken" in str(caught.value)


def test_too_large_a_piece_is_refused(ask) -> None:
    x = np.ones(2**18)
    data = x.tobytes()
    head = head_of(query_of(x))
    for first in (PIECE_BYTES + 1, 2 * PIECE_BYTES):
        with pytest.raises(jacserve.InvalidRequestError, match="at most 1048576") as e:
            ask([head, piece(0, 0, data[:first])])
        assert e.value.reason == "STREAM_BROKEN"


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"\xff" * 20, "MALFORMED_REQUEST"),
        (contradicting(streamed_bytes=47), "MALFORMED_TENSOR"),
        (contradicting(streamed_bytes=2**64 - 1), "MALFORMED_TENSOR"),
        (contradicting(streamed_bytes=0), "MALFORMED_TENSOR"),
        (contradicting(shape=[7]), "MALFORMED_TENSOR"),
        (contradicting(shape=[-6]), "MALFORMED_TENSOR"),
        (contradicting(shape=[2**31, 2**31]), "MALFORMED_TENSOR"),
        (contradicting(dtype=99), "MALFORMED_TENSOR"),
        (contradicting(dtype=0), "MALFORMED_TENSOR"),
        (contradicting(data=DATA), "MALFORMED_REQUEST"),  # And streamed_bytes.
        (contradicting(streamed_bytes=2**40, shape=[2**37]), "MALFORMED_TENSOR"),
        (contradicting(streamed_bytes=2**33, shape=[2**30]), "QUERY_TOO_LARGE"),
        (
            contradicting(streamed_bytes=LIMIT + 8, shape=[LIMIT // 8 + 1]),
            "QUERY_TOO_LARGE",
        ),
        (head_of(query_of(X, function="absent")), "FUNCTION_NOT_FOUND"),
        (head_of(query_of(X, Y)), "ARGUMENT_MISMATCH"),
        (head_of(query_of(X[None, None])), "SHAPE_MISMATCH"),
        (head_of(query_of(X, function="flip")), "DTYPE_MISMATCH"),
    ],
)
def test_a_head_is_refused_before_its_pieces_are_sent(ask, head, reason: str) -> None:
    went_on = threading.Event()

    def parts() -> Iterator[Any]:
        yield head
        # The client waits to be asked for more, as a slow one would.
        went_on.wait(30)

    start = time.monotonic()
    with pytest.raises(jacserve.JacobianError) as caught:
        ask(parts())
    went_on.set()
    assert caught.value.reason == reason
    assert time.monotonic() - start < 10


def test_streamed_bytes_belong_into_streams(target: str, client) -> None:
    query = head_of(query_of(X)).head
    with grpc.insecure_channel(target) as channel, translated(target):
        call: Any = channel.unary_unary(EVALUATE)
        with pytest.raises(grpc.RpcError) as caught:
            call(query.SerializeToString())
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "bytes of a tensor are missing" in str(caught.value.details())


def test_numbers_that_do_not_fit_are_refused_when_they_are_there(ask) -> None:
    flags = np.array([True, False, True])
    query = query_of(flags, function="flip")
    assert ask([head_of(query), piece(0, 0, flags.tobytes())]).finite
    with pytest.raises(jacserve.InvalidRequestError, match="neither 0 nor 1") as caught:
        ask([head_of(query), piece(0, 0, b"\x01\x02\x00")])
    assert caught.value.reason == "MALFORMED_TENSOR"


def test_a_query_is_too_large_however_it_comes() -> None:
    x = np.ones(2**11)
    with serving(registry, max_payload_bytes=2**13) as server:
        with jacserve.Client(server.target) as client:
            assert client.value("total", x[: 2**10]) == 2**10
            with pytest.raises(jacserve.CapacityError) as caught:
                client.value("total", x)
            assert caught.value.reason == "QUERY_TOO_LARGE"


def test_a_part_of_tiny_fields_holds_nobody_up(ask) -> None:
    tiny = b"\x20\x01" * (2**20 // 2 - 100)
    part = pb.EvaluateStreamRequest.FromString(b"\x7a\x00").SerializeToString()
    part = b"\x7a" + bytes([len(tiny) & 0x7F | 0x80, len(tiny) >> 7 & 0x7F | 0x80])
    part += bytes([len(tiny) >> 14]) + tiny
    start = time.monotonic()
    with pytest.raises(jacserve.InvalidRequestError):
        ask([HEAD, part])
    assert time.monotonic() - start < 0.3


# --- Results by stream and in one message --------------------------------------------


def raw_unary(target: str, query: pb.Query) -> pb.Result:
    with grpc.insecure_channel(
        target, options=[("grpc.max_receive_message_length", -1)]
    ) as channel:
        call: Any = channel.unary_unary(EVALUATE)
        with translated(target):
            return pb.Result.FromString(call(query.SerializeToString()))


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_around_the_limit_of_one_message(target: str, ask, client, extra: int) -> None:
    x = np.random.default_rng(0).normal(size=PIECE_BYTES // 4 + extra).astype("f4")
    query = query_of(x)
    result = ask([head_of(query), *pieces_of(query, PIECE_BYTES)])
    assert result.outputs[0].tensor.data == (x + x).tobytes()
    assert bool(result.outputs[0].tensor.streamed_bytes) == (extra > 0)
    if extra > 0:
        with pytest.raises(jacserve.PreconditionError) as caught:
            raw_unary(target, query)
        assert caught.value.reason == "STREAM_REQUIRED"
    else:
        assert raw_unary(target, query).outputs == result.outputs
    own = client.value("double", x)
    np.testing.assert_array_equal(own, x + x)
    assert own.flags.writeable
    assert own.flags.owndata or own.base is not None


def values(dtype: str, n: int) -> np.ndarray:
    random = np.random.default_rng(n)
    if dtype == "bool":
        return random.random(n) < 0.5
    if dtype.startswith("complex"):
        return (random.normal(size=(n, 2)) @ [1, 1j]).astype(dtype)
    if "float" in dtype:
        return random.normal(size=n).astype(tensors.dtype_named(dtype))
    return random.integers(0, 60, size=n).astype(dtype)


DTYPES = ["int8", "uint16", "int32", "uint64", "float16", "bfloat16", "float32"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "bool", "complex64"])
def test_streamed_and_not_are_the_same_bits(target: str, client, dtype: str) -> None:
    function = {"b": "flip", "c": "turn"}.get(np.dtype(tensors.dtype_named(dtype)).kind)
    function = function or "double"
    size = tensors.dtype_named(dtype).itemsize
    large = values(dtype, PIECE_BYTES // size + 3)
    small = large[:1000]
    by_stream = client.value(function, large)
    assert by_stream.dtype == large.dtype
    local = {"flip": lambda x: ~x, "turn": lambda x: x * 1j, "double": lambda x: x + x}
    expected = local[function](large).astype(large.dtype)
    assert by_stream.tobytes() == expected.tobytes()
    assert client.value(function, small).tobytes() == expected[:1000].tobytes()
    by_stream[...] = 0
    assert client.value(function, large).tobytes() == expected.tobytes()


def test_several_large_arrays_and_blocks(client) -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 400))
    result = client.evaluate("pair", (x, y), layout="blocks", quantities=["jacobian"])
    assert result.jacobian["sum"]["x"].shape == (400, 400)
    np.testing.assert_array_equal(result.jacobian["product"]["y"], np.diag(x))
    batch = client.evaluate(
        "pair",
        (np.stack([x] * 50), y),
        quantities=["value", "jvp"],
        tangents=np.ones(800),
    )
    for b in (0, 49):
        one = client.evaluate(
            "pair", (x, y), quantities=["value", "jvp"], tangents=np.ones(800)
        )
        np.testing.assert_array_equal(batch.value["product"][b], one.value["product"])
        np.testing.assert_array_equal(batch.jvp[b], one.jvp)
    both = client.evaluate(
        "outer", x, quantities=["value", "vjp"], cotangents=np.ones(160_000)
    )
    np.testing.assert_allclose(both.vjp, 2 * x.sum() * np.ones(400))
    assert all(a.flags.writeable for a in (both.value, both.vjp, batch.jvp))


def test_empty_batches_in_either_direction(client) -> None:
    assert client.jacobian("square", np.empty((0, 700))).shape == (0, 700, 700)
    assert client.value("square", np.empty((0, 0))).shape == (0, 0)
    assert client.jacobian("square", np.empty((0,))).shape == (0, 0)


def test_both_clients_get_the_same(target: str, client) -> None:
    x = np.random.default_rng(2).normal(size=600)

    async def other() -> Any:
        async with jacserve.AsyncClient(target) as connected:
            return await connected.evaluate("square", x)

    blocking, awaited = client.evaluate("square", x), asyncio.run(other())
    assert blocking.jacobian.tobytes() == awaited.jacobian.tobytes()
    assert blocking.jacobian.flags.writeable
    assert awaited.jacobian.flags.writeable


SPARSE = np.arange(1.0, 140_001.0)  # Columns of 560 kB, values of 1.1 MB.


@pytest.mark.parametrize("layout", ["csr", "coo"])
def test_sparse_patterns_of_more_than_a_message(target: str, layout: Any) -> None:
    x = SPARSE.astype("f4")
    with jacserve.Client(target, timeout_s=60.0) as client:
        for dtype in ("f8", "f8", "f4", "f4"):  # Then the pattern is known.
            jac = client.jacobian(
                "square", x.astype(dtype), mode="sparse", layout=layout
            )
            assert jac.dtype == dtype
            assert jac.nnz == len(x)
            np.testing.assert_array_equal(jac.diagonal(), 2 * x)


def test_sparse_empty_batches(client) -> None:
    stack = client.jacobian("square", np.empty((0, 5)), mode="sparse")
    assert stack.shape == (0, 5, 5)


def test_a_pattern_counts_for_what_one_message_holds(target: str, client) -> None:
    x = np.ones((0, 300_000), "f4")
    query = query_of(x, function="square")
    query.quantities[:] = [pb.QUANTITY_JACOBIAN]
    query.mode = pb.MODE_SPARSE
    query.layout = pb.LAYOUT_COO
    with pytest.raises(jacserve.PreconditionError) as caught:
        raw_unary(target, query)
    assert caught.value.reason == "STREAM_REQUIRED"


@pytest.mark.parametrize(
    "layout",
    [
        "csr",
        "coo",
    ],
)
def test_a_large_sparse_matrix_is_the_callers_own(target: str, layout: Any) -> None:
    with jacserve.Client(target, timeout_s=60.0) as client:
        first = client.jacobian("square", SPARSE, mode="sparse", layout=layout)
        indices = first.indices if layout == "csr" else first.col
        indices[:] = indices[::-1].copy()
        second = client.jacobian("square", SPARSE, mode="sparse", layout=layout)
        np.testing.assert_array_equal(second.diagonal(), 2 * SPARSE)


def test_a_small_sparse_matrix_is_the_callers_own(client) -> None:
    jac = client.jacobian("square", np.array([1.0, 0.0, 3.0]), mode="sparse")
    jac.eliminate_zeros()
    assert jac.nnz == 2


# --- Servers that do not keep to the contract ----------------------------------------


class FakeServer(grpc.GenericRpcHandler):
    """Answers EvaluateStream with the parts that it is told to."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def service(self, handler_call_details: Any) -> Any:
        def evaluate(_: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "only streams here")
            raise AssertionError

        def stream(requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
            for _ in requests:
                pass
            yield from self.parts

        if handler_call_details.method == EVALUATE:
            return grpc.unary_unary_rpc_method_handler(evaluate)
        return grpc.stream_stream_rpc_method_handler(stream)


@contextmanager
def fake_server() -> Generator[tuple[FakeServer, str]]:
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool)
    fake = FakeServer()
    server.add_generic_rpc_handlers((fake,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
        pool.shutdown()


BIG = np.arange(200_000.0)


def answer_parts() -> list[bytes]:
    """What a server answers that keeps to the contract."""
    head = pb.EvaluateStreamResponse()
    head.head.function, head.head.finite = "functions/double@1", True
    output = head.head.outputs.add(quantity=pb.QUANTITY_VALUE)
    tensors.describe_into(output.tensor, BIG)
    parts = [head.SerializeToString()]
    data = BIG.tobytes()
    for offset in range(0, len(data), PIECE_BYTES):
        part = pb.EvaluateStreamResponse()
        part.piece.offset = offset
        part.piece.data = data[offset : offset + PIECE_BYTES]
        parts.append(part.SerializeToString())
    return parts


def with_head(**changes: Any) -> list[bytes]:
    parts = answer_parts()
    head = pb.EvaluateStreamResponse.FromString(parts[0])
    for name, value in changes.items():
        if name == "shape":
            head.head.outputs[0].tensor.shape[:] = value
        else:
            setattr(head.head.outputs[0].tensor, name, value)
    return [head.SerializeToString(), *parts[1:]]


GOOD = answer_parts()
BAD_ANSWERS: dict[str, list[bytes]] = {
    "nothing": [],
    "an empty part": [b""],
    "only a head": GOOD[:1],
    "no head": GOOD[1:],
    "no last piece": GOOD[:-1],
    "no first piece": [GOOD[0], *GOOD[2:]],
    "another order": [GOOD[0], *GOOD[:0:-1]],
    "a repeat": [*GOOD, GOOD[-1]],
    "an early repeat": [*GOOD[:2], *GOOD[1:]],
    "a second head": [GOOD[0], *GOOD],
    "an empty piece": [GOOD[0], b"\x7a\x02\x7a\x00", *GOOD[1:]],
    "noise": [GOOD[0], b"\xff" * 30, *GOOD[1:]],
    "noise for a head": [b"\xff" * 30, *GOOD[1:]],
    "a cut piece": [GOOD[0], GOOD[1][:-1], *GOOD[2:]],
    "more bytes than the shape": with_head(shape=[100]),
    "fewer bytes than the shape": with_head(shape=[2**30]),
    "more bytes than there can be": with_head(streamed_bytes=2**64 - 1),
    "more bytes than there is memory": with_head(streamed_bytes=2**60),
    "fewer bytes than come": with_head(streamed_bytes=8),
    "no dtype": with_head(dtype=0),
    "another dtype": with_head(dtype=pb.DTYPE_COMPLEX64, shape=[100_000]),
}
del BAD_ANSWERS["another dtype"]  # It can't be told from a true answer.


@pytest.fixture(scope="module")
def fake() -> Generator[tuple[FakeServer, str]]:
    with fake_server() as running_server:
        yield running_server


def test_the_fake_servers_good_answer_is_read(fake: tuple[FakeServer, str]) -> None:
    server, target = fake
    server.parts = GOOD
    with jacserve.Client(target, timeout_s=20.0) as client:
        np.testing.assert_array_equal(client.value("double", BIG), BIG)


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_are_refused(fake: tuple[FakeServer, str], name: str) -> None:
    server, target = fake
    server.parts = BAD_ANSWERS[name]
    with jacserve.Client(target, timeout_s=20.0) as client:
        with pytest.raises(jacserve.ServerError, match="can't be read") as caught:
            client.value("double", BIG)
        assert caught.value.code == "DATA_LOSS"

    async def other() -> None:
        async with jacserve.AsyncClient(target, timeout_s=20.0) as connected:
            with pytest.raises(jacserve.ServerError, match="can't be read"):
                await connected.value("double", BIG)

    asyncio.run(other())


def test_a_garbled_answer_is_never_another_exception() -> None:
    random = np.random.default_rng(3)
    small = with_head(shape=[4], streamed_bytes=32)[:1]
    part = pb.EvaluateStreamResponse()
    part.piece.data = np.arange(4.0).tobytes()
    small.append(part.SerializeToString())
    for _ in range(1000):
        parts = [bytearray(each) for each in small]
        garbled = parts[random.integers(2)]
        garbled[random.integers(len(garbled))] = random.integers(256)
        receiver = Receiver()
        try:
            for each in parts:
                receiver.feed(bytes(each))
            receiver.received()
        except jacserve.ServerError:
            pass


# --- Clients that go away -------------------------------------------------------------


def memory_of(pid: int) -> float:
    """The resident memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


SERVED = Path(__file__)
UPLOAD = np.ones(2**20)  # 8 MiB.
DOWNLOAD = np.ones(1400)  # A Jacobian of 15 MiB.


def kill_in_the_middle(channel: grpc.Channel, turn: int) -> None:
    """Cancels a call after some parts of it have been sent or received."""
    call: Any = channel.stream_stream(EVALUATE_STREAM)
    if turn % 2:
        query = query_of(UPLOAD)
        parts = [head_of(query), *pieces_of(query, PIECE_BYTES)]
        went = threading.Event()

        def requests() -> Iterator[bytes]:
            for each in parts[: 2 + turn % 5]:
                yield each.SerializeToString()
            went.set()
            threading.Event().wait(0.02)

        running_call = call(requests())
        assert went.wait(20)
    else:
        query = query_of(DOWNLOAD, function="square")
        query.quantities[:] = [pb.QUANTITY_JACOBIAN]
        running_call = call(
            iter([pb.EvaluateStreamRequest(head=query).SerializeToString()])
        )
        for _ in range(1 + turn % 4):
            next(running_call)
    running_call.cancel()


KILLED = """
import sys, numpy as np, os, threading, jacserve
client = jacserve.Client(sys.argv[1])
threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), 9)).start()
print("ready", flush=True)
while True:
    client.value("double", np.ones(2**20))
"""


def kill_and_measure(
    kills: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    monkeypatch.setenv("JACSERVE_MAX_QUERIES", "8")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # Else each thread keeps some.
    with server_process(SERVED) as server:
        pid = server.process.pid
        sizes: list[float] = []
        with grpc.insecure_channel(server.target) as channel:
            with jacserve.Client(server.target, timeout_s=60.0) as client:

                def answers() -> None:
                    # None of those that went away is counted as in flight.
                    for _ in range(3):
                        assert client.value("double", UPLOAD)[0] == 2.0
                        assert client.jacobian("square", DOWNLOAD).shape == (1400, 1400)

                answers()
                for turn in range(20):
                    kill_in_the_middle(channel, turn)
                answers()
                sizes.append(memory_of(pid))
                for turn in range(kills):
                    kill_in_the_middle(channel, turn)
                    if turn % 50 == 49:
                        sizes.append(memory_of(pid))
                for turn in range(processes):
                    command = [sys.executable, "-c", KILLED, server.target]
                    with subprocess.Popen(
                        [*command, str(0.3 + 0.05 * turn)], stdout=subprocess.PIPE
                    ) as process:
                        assert process.wait(30) == -signal.SIGKILL
                time.sleep(0.5)
                with ThreadPoolExecutor(3) as pool:
                    list(pool.map(lambda _: client.value("double", X), range(3)))
                answers()
                sizes.append(memory_of(pid))
    return sizes


@pytest.mark.slow
def test_clients_that_go_away_leave_nothing_behind(monkeypatch) -> None:
    sizes = kill_and_measure(20, 1, monkeypatch)
    print("MiB:", sizes)
    # What is cut off in 20 kills is 200 MiB and more.
    assert sizes[-1] - sizes[0] < 100


@pytest.mark.slow
def test_hundreds_of_clients_that_go_away_leave_nothing_behind(monkeypatch) -> None:
    sizes = kill_and_measure(200, 8, monkeypatch)
    print("MiB:", sizes)
    # The allocator keeps some; the kills alone held up to 15 MiB each.
    assert sizes[-1] - sizes[0] < 100


def test_a_client_that_goes_away_frees_its_place(target: str) -> None:
    """Again and again a client begins as many uploads as it may, and cancels them."""
    with grpc.insecure_channel(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        for _ in range(3):
            stop = threading.Event()

            def requests(stop: threading.Event = stop) -> Iterator[bytes]:
                yield HEAD.SerializeToString()
                stop.wait(30)

            def is_full() -> bool:
                parts = [HEAD.SerializeToString(), ALL.SerializeToString()]
                try:
                    with translated(target):
                        whole(call(iter(parts)))
                except jacserve.OverloadedError:
                    return True
                return False

            uploads = [call(requests()) for _ in range(4)]
            deadline = time.monotonic() + 20
            while not is_full():
                assert time.monotonic() < deadline
            for each in uploads:
                each.cancel()
            stop.set()
            while is_full():
                assert time.monotonic() < deadline


def test_a_deadline_in_the_middle_of_an_upload(target: str, client) -> None:
    with grpc.insecure_channel(target) as channel:
        call: Any = channel.stream_stream(EVALUATE_STREAM)
        stop = threading.Event()

        def requests() -> Iterator[bytes]:
            yield HEAD.SerializeToString()
            stop.wait(30)

        with pytest.raises(grpc.RpcError) as caught:
            list(call(requests(), timeout=0.3))
        stop.set()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert client.value("total", X) == X.sum()


def test_a_client_closed_while_a_stream_runs(target: str) -> None:
    release.clear()
    client = jacserve.Client(target)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.value, "patient", np.ones(2**18))
        assert running.acquire(timeout=30)
        client.close()
        assert isinstance(call.exception(timeout=30), jacserve.CancelledError)
        release.set()


def test_an_async_call_that_is_cancelled_frees_its_place(target: str, client) -> None:
    async def scenario() -> None:
        async with jacserve.AsyncClient(target) as connected:
            for _ in range(10):  # More than are allowed at once.
                task = asyncio.create_task(connected.value("double", UPLOAD))
                await asyncio.sleep(0.005)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0.3)
            assert (await connected.value("double", X)).tolist() == (2 * X).tolist()

    asyncio.run(scenario())
