"""Whatever is wrong with a query, the caller learns what, why and the remedy.

Each case goes over the wire, as raw messages where the client would not send it;
after each, the server answers the next call as if nothing had happened.
"""

from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float, Float32, Int

import jacserve
from jacserve import tensors
from jacserve.errors import translated
from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from jacserve_server import Registry, RunningServer, serving
from raw_calls import sender

registry = Registry()
X = np.array([1.0, 2.0, 3.0])


@registry.function
def triple(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return 3 * x


@registry.function(name="triple", version=2)
def triple_again(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return 3.0 * x


@registry.function
def matvec(A: Float[Array, "m n"], x: Float[Array, "n"]) -> Float[Array, "m"]:
    return A @ x


@registry.function
def staggered(x: Float[Array, "n"], faces: Float[Array, "n+1"]) -> Float[Array, "n"]:
    return x * (faces[1:] - faces[:-1])


@registry.function
def only_single(x: Float32[Array, "3"]) -> Float32[Array, "3"]:
    return jnp.sin(x)


@registry.function
def looping(x: Float[Array, ""]) -> Float[Array, ""]:
    return jax.lax.while_loop(lambda y: y < 100.0, lambda y: 2.0 * y, x)


@registry.function
def picky(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 4:
        raise RuntimeError("the moon is full at /srv/secret/place/orbit.py:7")
    return x


@registry.function
def quitter(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 4:
        raise SystemExit(3)
    return x


@registry.function
def reciprocal(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return 1.0 / x


@registry.function
def modulus(z: Complex[Array, "2"]) -> Float[Array, "2"]:
    return jnp.abs(z)


@registry.function
def indices(i: Int[Array, "n"]) -> Int[Array, "n"]:
    return i + 1


@registry.function(max_batch=4)
def small_batches(x: Float[Array, "3"]) -> Float[Array, "3"]:
    return x


@registry.function
def outer(x: Float[Array, "n"]) -> Float[Array, "n n"]:
    return jnp.outer(x, x)


@pytest.fixture(scope="module")
def running() -> Generator[RunningServer]:
    with serving(registry, max_payload_bytes=2**20) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: RunningServer) -> Generator[jacserve.Client]:
    with jacserve.Client(running.target) as connected:
        yield connected


@pytest.fixture
def send(running: RunningServer) -> Generator[Callable[[pb.Query], pb.Result]]:
    with sender(running.target) as call:
        yield call


@pytest.fixture(autouse=True)
def next_call_is_answered(client: jacserve.Client) -> Generator[None]:
    yield
    np.testing.assert_array_equal(client.jacobian("triple", X), 3 * np.eye(3))


Call = Callable[[jacserve.Client], object]
BAD_CALLS: list[tuple[str, Call, type[Exception], str, str, list[str]]] = [
    (
        "unknown function",
        lambda c: c.jacobian("tripel", X),
        LookupError,
        "NOT_FOUND",
        "FUNCTION_NOT_FOUND",
        ["functions/tripel is not registered", "triple"],
    ),
    (
        "unknown version",
        lambda c: c.jacobian("triple@7", X),
        LookupError,
        "NOT_FOUND",
        "FUNCTION_NOT_FOUND",
        ["triple@7", "version 1, 2"],
    ),
    (
        "wrong size",
        lambda c: c.jacobian("triple", np.ones(4)),
        ValueError,
        "INVALID_ARGUMENT",
        "SHAPE_MISMATCH",
        ["x has shape [4]", "takes [3]", "[b, 3] for a batch"],
    ),
    (
        "wrong size in a batch",
        lambda c: c.jacobian("triple", np.ones((5, 4))),
        ValueError,
        "INVALID_ARGUMENT",
        "SHAPE_MISMATCH",
        ["x has shape [5, 4]", "takes [3]"],
    ),
    (
        "rank too low",
        lambda c: c.jacobian("triple", 1.0),
        ValueError,
        "INVALID_ARGUMENT",
        "SHAPE_MISMATCH",
        ["x has shape []", "takes [3]"],
    ),
    (
        "rank too high",
        lambda c: c.jacobian("triple", np.ones((2, 2, 3))),
        ValueError,
        "INVALID_ARGUMENT",
        "SHAPE_MISMATCH",
        ["x has shape [2, 2, 3]", "takes [3]"],
    ),
    (
        "conflicting symbolic dimensions",
        lambda c: c.jacobian("matvec", (np.ones((2, 3)), np.ones(4))),
        ValueError,
        "INVALID_ARGUMENT",
        "SHAPE_MISMATCH",
        ["n is 3 in A, but 4 in x"],
    ),
    (
        "conflicting expression of dimensions",
        lambda c: c.jacobian("staggered", (np.ones(3), np.ones(3))),
        ValueError,
        "INVALID_ARGUMENT",
        "SHAPE_MISMATCH",
        ["faces has shape [3]", "n+1 is 4, not 3"],
    ),
    (
        "conflicting batches",
        lambda c: c.jacobian("matvec", (np.ones((5, 2, 3)), np.ones((6, 3)))),
        ValueError,
        "INVALID_ARGUMENT",
        "SHAPE_MISMATCH",
        ["the batch is 5 in A, but 6 in x"],
    ),
    (
        "integers for floats",
        lambda c: c.jacobian("triple", [1, 2, 3]),
        ValueError,
        "INVALID_ARGUMENT",
        "DTYPE_MISMATCH",
        ["x is int64", "takes float64, float32", "set cast"],
    ),
    (
        "float64 for float32",
        lambda c: c.jacobian("only_single", X),
        ValueError,
        "INVALID_ARGUMENT",
        "DTYPE_MISMATCH",
        ["x is float64", "takes float32"],
    ),
    (
        "complex for real, even with cast",
        lambda c: c.jacobian("triple", X * 1j, cast=True),
        ValueError,
        "INVALID_ARGUMENT",
        "DTYPE_MISMATCH",
        ["x is complex128", "Convert it yourself"],
    ),
    (
        "a dtype that can't be sent",
        lambda c: c.jacobian("triple", np.array(["a", "b", "c"])),
        ValueError,
        "INVALID_ARGUMENT",
        "DTYPE_MISMATCH",
        ["<U1", "can't be sent"],
    ),
    (
        "too few arguments",
        lambda c: c.jacobian("matvec", np.ones((2, 3))),
        ValueError,
        "INVALID_ARGUMENT",
        "ARGUMENT_MISMATCH",
        ["x was not given", "takes A, x"],
    ),
    (
        "too many arguments",
        lambda c: c.jacobian("triple", (X, X)),
        ValueError,
        "INVALID_ARGUMENT",
        "ARGUMENT_MISMATCH",
        ["2 inputs were given", "takes x", "Pass 1"],
    ),
    (
        "wrong name",
        lambda c: c.jacobian("matvec", {"A": np.ones((2, 3)), "y": np.ones(3)}),
        ValueError,
        "INVALID_ARGUMENT",
        "ARGUMENT_MISMATCH",
        ["no argument y", "takes A, x"],
    ),
    (
        "no inputs",
        lambda c: c.jacobian("triple", {}),
        ValueError,
        "INVALID_ARGUMENT",
        "ARGUMENT_MISMATCH",
        ["x was not given"],
    ),
    (
        "wrt an unknown argument",
        lambda c: c.jacobian("triple", X, wrt="y"),
        ValueError,
        "INVALID_ARGUMENT",
        "ARGUMENT_MISMATCH",
        ["wrt names y", "takes x"],
    ),
    (
        "wrt twice",
        lambda c: c.jacobian("triple", X, wrt=["x", "x"]),
        ValueError,
        "INVALID_ARGUMENT",
        "ARGUMENT_MISMATCH",
        ["twice"],
    ),
    (
        "wrt an integer argument",
        lambda c: c.jacobian("indices", np.arange(3), wrt="i"),
        ValueError,
        "INVALID_ARGUMENT",
        "ARGUMENT_MISMATCH",
        ["i, which is int64"],
    ),
    (
        "the derivative of integers",
        lambda c: c.jacobian("indices", np.arange(3)),
        ValueError,
        "INVALID_ARGUMENT",
        "QUANTITY_UNSUPPORTED",
        ["no real or complex argument", "value"],
    ),
    (
        "a mode that the function lacks",
        lambda c: c.jacobian("looping", 1.5, mode="reverse"),
        ValueError,
        "INVALID_ARGUMENT",
        "MODE_UNSUPPORTED",
        ["mode is reverse", "while_loop", "Use forward, or auto"],
    ),
    (
        "a mode that no function has",
        lambda c: c.jacobian("triple", X, mode="sideways"),  # pyright: ignore
        ValueError,
        "INVALID_ARGUMENT",
        "MALFORMED_REQUEST",
        ["'sideways'", "auto, forward, reverse"],
    ),
    (
        "a function of complex numbers with real results",
        lambda c: c.jacobian("modulus", np.ones(2) * 1j),
        ValueError,
        "INVALID_ARGUMENT",
        "MODE_UNSUPPORTED",
        ["can't be differentiated", "real numbers of complex ones", "value alone"],
    ),
    (
        "the determinant of a tall Jacobian",
        lambda c: c.determinant("matvec", (np.ones((4, 3)), X), wrt="x"),
        ValueError,
        "INVALID_ARGUMENT",
        "QUANTITY_UNSUPPORTED",
        ["is [4, 3]", "square"],
    ),
    (
        "the gradient of a vector function",
        lambda c: c.gradient("triple", X),
        ValueError,
        "INVALID_ARGUMENT",
        "QUANTITY_UNSUPPORTED",
        ["has 3 results", "gradient", "jacobian"],
    ),
    (
        "an exception of the function",
        lambda c: c.jacobian("picky", np.ones(4)),
        ValueError,
        "INVALID_ARGUMENT",
        "TRACE_FAILED",
        ["RuntimeError: the moon is full at orbit.py:7"],
    ),
    (
        "a function that exits",
        lambda c: c.jacobian("quitter", np.ones(4)),
        ValueError,
        "INVALID_ARGUMENT",
        "TRACE_FAILED",
        ["SystemExit: 3"],
    ),
    (
        "NaN and Inf, refused",
        lambda c: c.jacobian(
            "reciprocal", [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]], require_finite=True
        ),
        ArithmeticError,
        "FAILED_PRECONDITION",
        "RESULT_NOT_FINITE",
        ["1 of 2 points", "row 1"],
    ),
    (
        "a batch larger than the function's largest",
        lambda c: c.jacobian("small_batches", np.ones((5, 3))),
        ValueError,
        "INVALID_ARGUMENT",
        "BATCH_TOO_LARGE",
        ["has 5 points", "at most 4"],
    ),
    (
        "a result larger than the limit",
        lambda c: c.jacobian("outer", np.ones(60)),
        jacserve.CapacityError,
        "RESOURCE_EXHAUSTED",
        "RESULT_TOO_LARGE",
        [str(60**3 * 8), str(2**20)],
    ),
    (
        "a query larger than the limit",
        lambda c: c.jacobian("triple", np.ones((2**17, 3))),
        jacserve.CapacityError,
        "RESOURCE_EXHAUSTED",
        "QUERY_TOO_LARGE",
        [str(2**17 * 3 * 8), str(2**20), "fewer points"],
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "code", "reason", "words"),
    [pytest.param(*case[1:], id=case[0]) for case in BAD_CALLS],
)
def test_a_bad_call_is_refused_in_words(
    client: jacserve.Client,
    call: Call,
    kind: type[Exception],
    code: str,
    reason: str,
    words: list[str],
) -> None:
    with pytest.raises(jacserve.JacobianError) as caught:
        call(client)
    assert isinstance(caught.value, kind)
    assert (caught.value.code, caught.value.reason) == (code, reason)
    for text in words:
        assert text in str(caught.value)
    assert "/srv" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def tensor(**changes: object) -> pb.Tensor:
    fields = {"dtype": pb.DTYPE_FLOAT64, "shape": [3], "data": X.tobytes()}
    return pb.Tensor(**{**fields, **changes})  # pyright: ignore


def query(**changes: object) -> pb.Query:
    fields = {
        "function": "triple",
        "inputs": [pb.Input(tensor=tensor())],
        "quantities": [pb.QUANTITY_JACOBIAN],
    }
    return pb.Query(**{**fields, **changes})  # pyright: ignore


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (tensor(data=X.tobytes()[:-1]), ["24 bytes", "has 23"]),
        (tensor(data=b""), ["24 bytes", "has 0"]),
        (tensor(shape=[-3]), ["[-3]", "outside"]),
        (tensor(shape=[2**60]), [str(2**60), "outside"]),
        (tensor(shape=[2**60, 0], data=b""), ["outside"]),
        (tensor(shape=[2**31 - 1] * 16), ["larger than any array"]),
        (tensor(shape=[2**20, 2**20]), [f"{2**43} bytes", "has 24"]),
        (tensor(shape=[1] * 33), ["33 axes"]),
        (tensor(shape=[0, 2**30, 2**30, 2**30], data=b""), ["larger than any array"]),
        (tensor(dtype=0), ["dtype 0"]),
        (tensor(dtype=99), ["dtype 99"]),
        (tensor(dtype=pb.DTYPE_BOOL, data=b"\x00\x01\x02"), ["bool"]),
    ],
)
def test_a_malformed_tensor_is_refused_before_anything_is_allocated(
    send: Callable[[pb.Query], pb.Result], bad: pb.Tensor, words: list[str]
) -> None:
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        send(query(inputs=[pb.Input(name="x", tensor=bad)]))
    assert caught.value.reason == "MALFORMED_TENSOR"
    assert caught.value.field == "inputs[0].tensor"
    for text in words:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"quantities": []}, "quantities", "MALFORMED_REQUEST"),
        ({"quantities": [0]}, "quantities", "MALFORMED_REQUEST"),
        ({"quantities": [99]}, "quantities", "MALFORMED_REQUEST"),
        ({"mode": 99}, "mode", "MALFORMED_REQUEST"),
        ({"layout": 99}, "layout", "MALFORMED_REQUEST"),
        ({"function": ""}, "function", "FUNCTION_NOT_FOUND"),
        ({"inputs": [pb.Input()]}, "inputs[0].tensor", "MALFORMED_TENSOR"),
        (
            {"inputs": [pb.Input(name="x", tensor=tensor())] * 2},
            "inputs[1].name",
            "ARGUMENT_MISMATCH",
        ),
    ],
)
def test_a_malformed_query_is_refused(
    send: Callable[[pb.Query], pb.Result],
    changes: dict[str, object],
    field: str,
    reason: str,
) -> None:
    with pytest.raises(jacserve.JacobianError) as caught:
        send(query(**changes))
    assert (caught.value.field, caught.value.reason) == (field, reason)


def test_a_result_may_be_as_large_as_a_message_whatever_its_padding(
    client: jacserve.Client,
) -> None:
    fits = 2**20 // (9 * 8)
    assert client.jacobian("triple", np.ones((fits, 3))).shape == (fits, 3, 3)
    with pytest.raises(jacserve.CapacityError, match=str((fits + 1) * 72)) as caught:
        client.jacobian("triple", np.ones((fits + 1, 3)))
    assert caught.value.reason == "RESULT_TOO_LARGE"


def test_nan_and_inf_are_delivered_and_flagged(client: jacserve.Client) -> None:
    result = client.evaluate("reciprocal", [0.0, np.nan, 2.0])
    assert not result.finite
    assert np.isinf(result.value[0])
    assert np.isnan(result.value[1])
    assert result.value[2] == 0.5
    assert client.evaluate("reciprocal", X).finite


def test_padding_can_not_make_a_loop_endless(client: jacserve.Client) -> None:
    x = np.array([1.0, 2.0, 3.0])  # A fourth row of 0.0 would double for ever.
    np.testing.assert_array_equal(
        client.value("looping", x, timeout_s=30.0), [128.0, 128.0, 192.0]
    )


def test_unspecified_mode_and_layout_mean_the_defaults(
    send: Callable[[pb.Query], pb.Result],
) -> None:
    result = send(query())
    assert result.outputs[0].mode in {pb.MODE_FORWARD, pb.MODE_REVERSE}
    np.testing.assert_array_equal(
        tensors.decode(result.outputs[0].tensor), 3 * np.eye(3)
    )


def test_paging_through_functions(running: RunningServer) -> None:
    import grpc

    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.JacobianServiceStub(channel)
        names, token = [], ""
        while True:
            page = stub.ListFunctions(
                pb.ListFunctionsRequest(page_size=3, page_token=token)
            )
            assert 1 <= len(page.functions) <= 3
            names += [function.name for function in page.functions]
            if not (token := page.next_page_token):
                break
        assert names == sorted(names)
        assert len(names) == len(registry.declarations)
        for bad in (
            pb.ListFunctionsRequest(page_size=-1),
            pb.ListFunctionsRequest(page_token="soon"),
            pb.ListFunctionsRequest(page_token="9" * 500),
        ):
            with (
                pytest.raises(jacserve.InvalidRequestError),
                translated(running.target),
            ):
                stub.ListFunctions(bad)
