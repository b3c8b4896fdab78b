"""Whatever is wrong with vectors, curvature or sparse queries is said in words.

Each case goes over the wire, as raw messages where the client would not send it;
after each, the server answers the next call as if nothing had happened.
"""

from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float, Int

import jacserve
from jacserve import tensors
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server import Registry, RunningServer, serving
from raw_calls import sender

registry = Registry()
X = np.array([1.0, 2.0, 3.0])
PAIR = (X, 2 * X)
U = {"sin": X, "more": (1.0, 2 * X)}


@registry.function
def rolled(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x**2 * jnp.roll(x, 1)


@registry.function
def product(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
    return x * y


@registry.function
def nested(x: Float[Array, "n"]) -> dict:
    return {"sin": jnp.sin(x), "most": jnp.argmax(x), "more": (x.sum(), 2 * x)}


@registry.function
def energy(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(x**3 * y)


@registry.function
def linear(A: Float[Array, "m n"], x: Float[Array, "n"]) -> Float[Array, "m"]:
    return A @ x


@registry.function
def modulus(z: Complex[Array, "n"]) -> Float[Array, "n"]:
    return jnp.abs(z)


@registry.function
def blend(z: Complex[Array, "n"], x: Float[Array, "n"]) -> Complex[Array, "n"]:
    return z**2 * x


@registry.function
def labels(i: Int[Array, "n"]) -> Int[Array, "n"]:
    return i + 1


@registry.function
def rounded(x: Float[Array, "n"]) -> Int[Array, "n"]:
    return jnp.round(x).astype(int)


@registry.function
def picky(x: Float[Array, "n"]) -> Float[Array, "n"]:
    if x.size == 4:
        raise RuntimeError("the moon is full at /srv/secret/place/orbit.py:7")
    return x**2


@registry.function
def halved(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Only forward mode exists."""
    return jax.lax.while_loop(lambda y: jnp.sum(y) > 1.0, lambda y: y / 2.0, x)


@registry.function
def outside(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """No mode exists."""
    return jax.pure_callback(np.sin, x, x, vmap_method="sequential")


@pytest.fixture(scope="module")
def running() -> Generator[RunningServer]:
    with serving(registry) as server:
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
    np.testing.assert_array_equal(client.jvp("product", PAIR, np.ones(6)), 3 * X)


def blocks(
    kind: str, function: str, inputs: Any, vectors: Any, **options: Any
) -> Callable[[jacserve.Client], object]:
    return lambda c: getattr(c, kind)(
        function, inputs, vectors, layout="blocks", **options
    )


Call = Callable[[jacserve.Client], object]
Case = tuple[str, Call, str, str, list[str]]
SHAPES: list[Case] = [
    (
        "a tangent of another size",
        lambda c: c.jvp("product", PAIR, np.ones(5)),
        "SHAPE_MISMATCH",
        "tangents[0].tensor.shape",
        ["has shape [5]", "takes [6]", "[k, 6]"],
    ),
    (
        "a scalar for a tangent",
        lambda c: c.jvp("product", PAIR, 1.0),
        "SHAPE_MISMATCH",
        "tangents[0].tensor.shape",
        ["has shape []", "takes [6]"],
    ),
    (
        "a tangent with two axes too many",
        lambda c: c.jvp("product", PAIR, np.ones((1, 1, 6))),
        "SHAPE_MISMATCH",
        "tangents[0].tensor.shape",
        ["has shape [1, 1, 6]", "takes [6]"],
    ),
    (
        "a tangent as long as all arguments, for one",
        lambda c: c.hvp("energy", PAIR, np.ones(6), wrt="x"),
        "SHAPE_MISMATCH",
        "tangents[0].tensor.shape",
        ["has shape [6]", "takes [3]"],
    ),
    (
        "tangents for another number of points",
        lambda c: c.jvp("rolled", np.ones((4, 3)), np.ones((5, 3))),
        "SHAPE_MISMATCH",
        "tangents[0].tensor.shape",
        ["has shape [5, 3]", "[4, 3]", "[4, k, 3]"],
    ),
    (
        "blocks of tangents for another number of points",
        lambda c: c.jvp("rolled", np.ones((4, 3)), np.ones((5, 2, 3))),
        "SHAPE_MISMATCH",
        "tangents[0].tensor.shape",
        ["has shape [5, 2, 3]", "[4, k, 3]"],
    ),
    (
        "a cotangent of another size",
        lambda c: c.vjp("product", PAIR, np.ones(6)),
        "SHAPE_MISMATCH",
        "cotangents[0].tensor.shape",
        ["has shape [6]", "takes [3]", "[k, 3]"],
    ),
    (
        "a scalar for a cotangent",
        lambda c: c.vjp("energy", PAIR, 1.0),
        "SHAPE_MISMATCH",
        "cotangents[0].tensor.shape",
        ["has shape []", "takes [m]", "[k, m]"],
    ),
    (
        "a cotangent with two axes too many",
        lambda c: c.vjp("product", PAIR, np.ones((1, 1, 3))),
        "SHAPE_MISMATCH",
        "cotangents[0].tensor.shape",
        ["has shape [1, 1, 3]"],
    ),
    (
        "cotangents for another number of points",
        lambda c: c.vjp("rolled", np.ones((4, 3)), np.ones((5, 3))),
        "SHAPE_MISMATCH",
        "cotangents[0].tensor.shape",
        ["has shape [5, 3]", "[4, m]", "[4, k, m]"],
    ),
    (
        "the cotangent of an only forward function, of another size",
        lambda c: c.vjp("halved", X, np.ones(4)),
        "SHAPE_MISMATCH",
        "cotangents[0].tensor.shape",
        ["has shape [4]", "takes [3]"],
    ),
    (
        "a block of another shape",
        blocks("jvp", "product", PAIR, {"x": X, "y": np.ones(4)}),
        "SHAPE_MISMATCH",
        "tangents[1].tensor.shape",
        ["the tangent of y has shape [4]", "takes [3]"],
    ),
    (
        "a block of a cotangent of another shape",
        blocks("vjp", "nested", X, {**U, "more": (1.0, np.ones(4))}),
        "SHAPE_MISMATCH",
        "cotangents[2].tensor.shape",
        ["has shape [4]", "takes [3]"],
    ),
    (
        "one tangent with several, one without",
        blocks("jvp", "product", PAIR, {"x": np.ones((2, 3)), "y": X}),
        "SHAPE_MISMATCH",
        "tangents",
        ["tangents do not agree in an axis for several"],
    ),
    (
        "one cotangent with several, one without",
        blocks("vjp", "nested", X, {"sin": np.ones((2, 3)), "more": (1.0, X)}),
        "SHAPE_MISMATCH",
        "cotangents",
        ["cotangents do not agree in an axis for several"],
    ),
]
NAMES: list[Case] = [
    (
        "a product without its tangents",
        lambda c: c.evaluate("product", PAIR, quantities=("value", "jvp")),
        "ARGUMENT_MISMATCH",
        "tangents",
        ["jvp", "Pass tangents="],
    ),
    (
        "a product without its cotangents",
        lambda c: c.evaluate("product", PAIR, quantities="vjp", tangents=np.ones(6)),
        "ARGUMENT_MISMATCH",
        "tangents",
        ["no quantity takes them"],
    ),
    (
        "two products, one without its cotangents",
        lambda c: c.evaluate(
            "product", PAIR, quantities=("jvp", "vjp"), tangents=np.ones(6)
        ),
        "ARGUMENT_MISMATCH",
        "cotangents",
        ["vjp", "Pass cotangents="],
    ),
    (
        "cotangents without a tree",
        blocks("vjp", "nested", X, {}),
        "ARGUMENT_MISMATCH",
        "cotangents",
        ["Pass cotangents="],
    ),
    (
        "tangents beside a Jacobian",
        lambda c: c.evaluate("product", PAIR, tangents=np.ones(6)),
        "ARGUMENT_MISMATCH",
        "tangents",
        ["no quantity takes them", "Leave them out"],
    ),
    (
        "cotangents beside a value",
        lambda c: c.evaluate("product", PAIR, quantities="value", cotangents=X),
        "ARGUMENT_MISMATCH",
        "cotangents",
        ["no quantity takes them"],
    ),
    (
        "tangents by name in the matrix layout",
        lambda c: c.jvp("product", PAIR, {"x": X, "y": X}),
        "ARGUMENT_MISMATCH",
        "tangents",
        ['layout="blocks"', "one array of n numbers"],
    ),
    (
        "two tangents in the matrix layout",
        lambda c: c.jvp("product", PAIR, (X, X)),
        "ARGUMENT_MISMATCH",
        "tangents",
        ['layout="blocks"'],
    ),
    (
        "cotangents by path in the matrix layout",
        lambda c: c.vjp("nested", X, U),
        "ARGUMENT_MISMATCH",
        "cotangents",
        ['layout="blocks"', "one array of m numbers"],
    ),
    (
        "a tangent missing",
        blocks("jvp", "product", PAIR, {"x": X}),
        "ARGUMENT_MISMATCH",
        "tangents",
        ["given for x", "x, y are differentiated"],
    ),
    (
        "a tangent of no argument",
        blocks("jvp", "product", PAIR, {"x": X, "z": X}),
        "ARGUMENT_MISMATCH",
        "tangents",
        ["given for x, z"],
    ),
    (
        "a tangent left over",
        blocks("hvp", "energy", PAIR, (X, X, X)),
        "ARGUMENT_MISMATCH",
        "tangents",
        ["x, y are differentiated"],
    ),
    (
        "a tangent of an argument that wrt leaves out",
        blocks("jvp", "product", PAIR, {"x": X, "y": X}, wrt="x"),
        "ARGUMENT_MISMATCH",
        "tangents",
        ["given for x, y", "but x are differentiated"],
    ),
    (
        "a cotangent missing",
        blocks("vjp", "nested", X, {"sin": X}),
        "ARGUMENT_MISMATCH",
        "cotangents",
        ["['more'][0]", "has no cotangent"],
    ),
    (
        "a cotangent of no result",
        blocks("vjp", "nested", X, {**U, "cos": X}),
        "ARGUMENT_MISMATCH",
        "cotangents[3].path",
        ["no result at ['cos']"],
    ),
    (
        "a cotangent too deep",
        blocks("vjp", "nested", X, {**U, "sin": {"x": X}}),
        "ARGUMENT_MISMATCH",
        "cotangents[0].path",
        ["no result at ['sin']['x']"],
    ),
    (
        "one cotangent for a tree",
        blocks("vjp", "nested", X, X),
        "ARGUMENT_MISMATCH",
        "cotangents[0].path",
        ["no result at"],
    ),
    (
        "the cotangent of a whole number",
        blocks("vjp", "nested", X, {**U, "most": 1.0}),
        "ARGUMENT_MISMATCH",
        "cotangents[3].path",
        ["['most']", "no real or complex result"],
    ),
]
DTYPES: list[Case] = [
    (
        "a tangent of lower precision",
        lambda c: c.jvp("product", PAIR, np.ones(6, "float32")),
        "DTYPE_MISMATCH",
        "tangents[0].tensor.dtype",
        ["is float32", "takes float64", "set cast"],
    ),
    (
        "a tangent of higher precision",
        lambda c: c.jvp("rolled", X.astype("float32"), X),
        "DTYPE_MISMATCH",
        "tangents[0].tensor.dtype",
        ["is float64", "takes float32"],
    ),
    (
        "a whole tangent",
        lambda c: c.jvp("rolled", X, [1, 0, 0]),
        "DTYPE_MISMATCH",
        "tangents[0].tensor.dtype",
        ["is int64", "takes float64", "set cast"],
    ),
    (
        "a complex tangent, even with cast",
        lambda c: c.hvp("energy", PAIR, np.ones(6) * 1j, cast=True),
        "DTYPE_MISMATCH",
        "tangents[0].tensor.dtype",
        ["is complex128", "takes float64"],
    ),
    (
        "a block of a tangent in another dtype",
        blocks("jvp", "product", (X.astype("float32"), X), (X, X)),
        "DTYPE_MISMATCH",
        "tangents[0].tensor.dtype",
        ["the tangent of x is float64", "takes float32"],
    ),
    (
        "a cotangent of lower precision",
        lambda c: c.vjp("rolled", X, X.astype("float32")),
        "DTYPE_MISMATCH",
        "cotangents[0].tensor.dtype",
        ["is float32", "float64"],
    ),
    (
        "a cotangent of higher precision",
        lambda c: c.vjp("rolled", X.astype("float32"), X),
        "DTYPE_MISMATCH",
        "cotangents[0].tensor.dtype",
        ["is float64", "no 64-bit inputs"],
    ),
    (
        "a whole cotangent",
        lambda c: c.vjp("rolled", X, [1, 0, 0]),
        "DTYPE_MISMATCH",
        "cotangents[0].tensor.dtype",
        ["is int64", "float64", "set cast"],
    ),
    (
        "a complex cotangent",
        lambda c: c.vjp("rolled", X, X * 1j, cast=True),
        "DTYPE_MISMATCH",
        "cotangents[0].tensor.dtype",
        ["is complex128", "float64"],
    ),
    (
        "a tangent that can't be sent",
        lambda c: c.jvp("rolled", X, np.array(["a", "b", "c"])),
        "DTYPE_MISMATCH",
        "tangents[0].tensor.dtype",
        ["<U1", "can't be sent"],
    ),
    (
        "a cotangent that can't be sent",
        blocks("vjp", "nested", X, {**U, "sin": np.array([None] * 3)}),
        "DTYPE_MISMATCH",
        "cotangents[0].tensor.dtype",
        ["object", "can't be sent", "['sin']"],
    ),
]
QUANTITIES: list[Case] = [
    (
        "one Hessian of a vector function",
        lambda c: c.hessian("rolled", X),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["has 3 results", "hessian", 'layout="blocks"'],
    ),
    (
        "one sparse Hessian of a vector function",
        lambda c: c.hessian("rolled", X, mode="sparse"),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["has 3 results", "hessian"],
    ),
    (
        "one Hessian of several results in a sparse layout",
        lambda c: c.hessian("nested", X, layout="csr"),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["has 7 results", "hessian"],
    ),
    (
        "a Hessian product of a vector function",
        lambda c: c.hvp("rolled", X, X),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["has 3 results", "hvp", "hessian in the blocks layout"],
    ),
    (
        "a Hessian product of a vector function in blocks",
        blocks("hvp", "rolled", X, X),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["has 3 results", "hvp"],
    ),
    (
        "the condition of an empty Jacobian",
        lambda c: c.condition_number("rolled", X[:0]),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["is [0, 0]", "condition number", "singular_values"],
    ),
    (
        "a product with whole numbers",
        lambda c: c.jvp("labels", np.arange(3), X),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["no real or complex argument"],
    ),
    (
        "the sparsity of a function of whole numbers",
        lambda c: c.sparsity("rounded", sizes={"n": 3}),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["no real or complex array"],
    ),
    (
        "a product by one mode with the Jacobian of whole results",
        lambda c: c.vjp("rounded", X, X, mode="reverse"),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["no real or complex array"],
    ),
    (
        "sparse blocks",
        lambda c: c.jacobian("rolled", X, mode="sparse", layout="blocks"),
        "MODE_UNSUPPORTED",
        "layout",
        ["sparse mode", "blocks"],
    ),
    (
        "products in sparse blocks",
        blocks("jvp", "product", PAIR, PAIR, mode="sparse"),
        "MODE_UNSUPPORTED",
        "layout",
        ["sparse mode", "blocks"],
    ),
    (
        "products of a function that is not holomorphic",
        lambda c: c.jvp("modulus", X * 1j, X * 1j),
        "MODE_UNSUPPORTED",
        "mode",
        ["real numbers of complex ones"],
    ),
    (
        "products by real and complex arguments at once",
        lambda c: c.jvp("blend", (X * 1j, X), np.ones(6) * 1j),
        "MODE_UNSUPPORTED",
        "mode",
        ["mixes real and complex"],
    ),
    (
        "a Hessian of a function that raises",
        lambda c: c.hessian("picky", np.ones(4), layout="blocks"),
        "TRACE_FAILED",
        "",
        ["RuntimeError: the moon is full at orbit.py:7"],
    ),
    (
        "a layout that does not exist",
        lambda c: c.jacobian("rolled", X, layout="csc"),  # pyright: ignore
        "MALFORMED_REQUEST",
        "layout",
        ["'csc'", "csr"],
    ),
    (
        "tangents of which one has more",
        blocks("jvp", "product", PAIR, (np.ones((2, 3)), np.ones((4, 3)))),
        "SHAPE_MISMATCH",
        "tangents",
        ["of the same length"],
    ),
    (
        "cotangents of which one has more",
        blocks("vjp", "nested", X, {"sin": np.eye(3), "more": (X, np.ones((2, 3)))}),
        "SHAPE_MISMATCH",
        "cotangents",
        ["of the same length"],
    ),
    (
        "a block of another shape, given first",
        blocks("jvp", "product", PAIR, {"y": np.ones(4), "x": X}),
        "SHAPE_MISMATCH",
        "tangents[0].tensor.shape",
        ["the tangent of y has shape [4]"],
    ),
    (
        "a block of a cotangent of another shape, given first",
        blocks("vjp", "nested", X, {"more": (1.0, np.ones(4)), "sin": X}),
        "SHAPE_MISMATCH",
        "cotangents[1].tensor.shape",
        ["has shape [4]"],
    ),
    (
        "a sparse Jacobian of a function that raises",
        lambda c: c.jacobian("picky", np.ones(4), mode="sparse"),
        "TRACE_FAILED",
        "",
        ["RuntimeError: the moon is full at orbit.py:7"],
    ),
    (
        "the sparsity of a function that raises",
        lambda c: c.sparsity("picky", sizes={"n": 4}),
        "TRACE_FAILED",
        "",
        ["RuntimeError: the moon is full at orbit.py:7"],
    ),
    (
        "a sparse Jacobian of a function that is not holomorphic",
        lambda c: c.jacobian("modulus", X * 1j, mode="sparse"),
        "MODE_UNSUPPORTED",
        "mode",
        ["real numbers of complex ones"],
    ),
    (
        "a product with the Jacobian of whole results",
        lambda c: c.vjp("rounded", X, X),
        "QUANTITY_UNSUPPORTED",
        "quantities",
        ["no real or complex array"],
    ),
]


@pytest.mark.parametrize(
    ("call", "reason", "field", "words"),
    [
        pytest.param(*case[1:], id=case[0])
        for case in (*SHAPES, *NAMES, *DTYPES, *QUANTITIES)
    ],
)
def test_a_bad_call_is_refused_in_words(
    client: jacserve.Client, call: Call, reason: str, field: str, words: list[str]
) -> None:
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        call(client)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", reason)
    assert caught.value.field == field
    for text in words:
        assert text in str(caught.value)
    for text in ("/srv", "Traceback", "vmap", "  "):
        assert text not in str(caught.value)


def tensor(array: Any = X, **changes: Any) -> pb.Tensor:
    found = pb.Tensor()
    tensors.encode_into(found, array)
    fields = {"dtype": found.dtype, "shape": list(found.shape), "data": found.data}
    return pb.Tensor(**{**fields, **changes})


def query(**changes: Any) -> pb.Query:
    fields = {
        "function": "product",
        "inputs": [pb.Input(tensor=tensor()), pb.Input(tensor=tensor())],
        "quantities": [pb.QUANTITY_JVP],
    }
    return pb.Query(**{**fields, **changes})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (pb.Tensor(), ["dtype 0"]),
        (tensor(data=X.tobytes()[:-1]), ["24 bytes", "has 23"]),
        (tensor(shape=[-3]), ["[-3]", "outside"]),
        (tensor(shape=[2**60, 0], data=b""), ["outside"]),
        (tensor(shape=[1] * 33), ["33 axes"]),
        (tensor(dtype=99), ["dtype 99"]),
    ],
    ids=["none", "too short", "negative", "too large", "too many axes", "no dtype"],
)
@pytest.mark.parametrize("kind", ["tangents", "cotangents"])
def test_a_malformed_vector_is_refused(
    send: Callable[[pb.Query], pb.Result], kind: str, bad: pb.Tensor, words: list[str]
) -> None:
    changes = {
        "tangents": {"tangents": [pb.Input(tensor=bad)]},
        "cotangents": {
            "cotangents": [pb.Cotangent(tensor=bad)],
            "quantities": [pb.QUANTITY_VJP],
        },
    }[kind]
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        send(query(**changes))
    assert caught.value.reason == "MALFORMED_TENSOR"
    assert caught.value.field == f"{kind}[0].tensor"
    for text in words:
        assert text in str(caught.value)


def steps(*path: str | int) -> list[pb.PathStep]:
    return [
        pb.PathStep(key=step) if isinstance(step, str) else pb.PathStep(index=step)
        for step in path
    ]


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"mode": pb.MODE_FORWARD_OVER_REVERSE}, "mode", "MALFORMED_REQUEST"),
        ({"mode": pb.MODE_REVERSE_OVER_REVERSE}, "mode", "MALFORMED_REQUEST"),
        ({"mode": pb.MODE_FORWARD_OVER_FORWARD}, "mode", "MALFORMED_REQUEST"),
        ({"mode": 99}, "mode", "MALFORMED_REQUEST"),
        ({"mode": -1}, "mode", "MALFORMED_REQUEST"),
        ({"layout": 99}, "layout", "MALFORMED_REQUEST"),
        ({"quantities": [99]}, "quantities", "MALFORMED_REQUEST"),
        ({"tangents": [pb.Input()] * 2000}, "tangents", "MALFORMED_REQUEST"),
        ({"cotangents": [pb.Cotangent()] * 2000}, "cotangents", "MALFORMED_REQUEST"),
        ({"patterns": ["0"] * 2000}, "patterns", "MALFORMED_REQUEST"),
        ({"tangents": []}, "tangents", "ARGUMENT_MISMATCH"),
        (
            {"tangents": [pb.Input(tensor=tensor(np.ones(6)))] * 2},
            "tangents",
            "ARGUMENT_MISMATCH",
        ),
        (
            {"tangents": [pb.Input(name="x", tensor=tensor(np.ones(6)))]},
            "tangents",
            "ARGUMENT_MISMATCH",
        ),
        (
            {
                "quantities": [pb.QUANTITY_VJP],
                "cotangents": [pb.Cotangent(path=steps(0), tensor=tensor())],
                "layout": pb.LAYOUT_BLOCKS,
            },
            "cotangents[0].path",
            "ARGUMENT_MISMATCH",
        ),
        (
            {
                "quantities": [pb.QUANTITY_VJP],
                "cotangents": [pb.Cotangent(tensor=tensor())] * 2,
                "layout": pb.LAYOUT_BLOCKS,
            },
            "cotangents[1].path",
            "ARGUMENT_MISMATCH",
        ),
        (
            {
                "function": "nested",
                "inputs": [pb.Input(tensor=tensor())],
                "quantities": [pb.QUANTITY_VJP],
                "cotangents": [
                    pb.Cotangent(path=steps("sin"), tensor=tensor()),
                    pb.Cotangent(path=steps("more", 2**32 - 1), tensor=tensor(1.0)),
                ],
                "layout": pb.LAYOUT_BLOCKS,
            },
            "cotangents[1].path",
            "ARGUMENT_MISMATCH",
        ),
    ],
)
def test_a_malformed_query_is_refused(
    send: Callable[[pb.Query], pb.Result],
    changes: dict[str, Any],
    field: str,
    reason: str,
) -> None:
    vector = {"tangents": [pb.Input(tensor=tensor(np.ones(6)))]}
    vector = {} if "cotangents" in changes else vector
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        send(query(**{**vector, **changes}))
    assert (caught.value.field, caught.value.reason) == (field, reason)


@pytest.mark.parametrize(
    "pattern", ["", "0" * 32, "x" * 10_000, "\n\x00%", "é" * 100], ids=repr
)
def test_a_malformed_pattern_is_one_that_the_function_does_not_have(
    send: Callable[[pb.Query], pb.Result], pattern: str
) -> None:
    asked = query(
        quantities=[pb.QUANTITY_JACOBIAN], mode=pb.MODE_SPARSE, patterns=[pattern]
    )
    with pytest.raises(jacserve.PreconditionError, match="without naming it") as caught:
        send(asked)
    assert caught.value.code == "FAILED_PRECONDITION"
    assert caught.value.reason == "PATTERN_UNKNOWN"
    assert caught.value.field == "patterns[0]"


def test_a_tangent_given_twice_is_refused(
    send: Callable[[pb.Query], pb.Result],
) -> None:
    given = [pb.Input(name=name, tensor=tensor()) for name in ("x", "y", "x")]
    with pytest.raises(jacserve.InvalidRequestError, match="twice") as caught:
        send(query(tangents=given, layout=pb.LAYOUT_BLOCKS))
    assert caught.value.reason == "ARGUMENT_MISMATCH"


def test_a_path_with_an_empty_step_is_refused(
    send: Callable[[pb.Query], pb.Result],
) -> None:
    given = [
        pb.Cotangent(path=steps("sin"), tensor=tensor()),
        pb.Cotangent(path=[*steps("more"), pb.PathStep()], tensor=tensor(1.0)),
        pb.Cotangent(path=steps("more", 1), tensor=tensor()),
    ]
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        send(
            query(
                function="nested",
                inputs=[pb.Input(tensor=tensor())],
                quantities=[pb.QUANTITY_VJP],
                cotangents=given,
                layout=pb.LAYOUT_BLOCKS,
            )
        )
    assert caught.value.field == "cotangents[1].path"


def step_of(client: jacserve.Client, matrix: Any, **options: Any) -> jacserve.Result:
    matrix = np.asarray(matrix)
    x = np.arange(1, len(matrix) + 1).astype(matrix.dtype)
    quantities: Any = ("newton_step", "value")
    return client.evaluate(
        "linear", (matrix, x), wrt="x", quantities=quantities, **options
    )


SINGULAR = {
    "zero": np.zeros((2, 2)),
    "a zero row": [[1.0, 2.0], [0.0, 0.0]],
    "a zero column": [[0.0, 2.0], [0.0, 1.0]],
    "equal rows": [[1.0, 2.0], [1.0, 2.0]],
    "rank one": [[1.0, 2.0], [2.0, 4.0]],
    "rank one of inexact numbers": [[0.1, 0.3], [0.3, 0.9]],
    "rank two of three": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]],
    "rank one of rows of different units": [[1e-12, 3e-12], [1e12, 3e12]],
    "NaN": [[np.nan, 1.0], [1.0, 1.0]],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("matrix", SINGULAR.values(), ids=SINGULAR)
def test_a_singular_jacobian_has_no_newton_step(
    client: jacserve.Client, matrix: Any, dtype: str
) -> None:
    matrix = np.asarray(matrix, dtype)
    result = step_of(client, matrix)
    assert np.isnan(result.newton_step).all()
    assert not result.finite
    with pytest.raises(jacserve.NonFiniteError, match="newton_step") as caught:
        step_of(client, matrix, require_finite=True)
    assert isinstance(caught.value, ArithmeticError)
    assert caught.value.code == "FAILED_PRECONDITION"
    assert caught.value.reason == "RESULT_NOT_FINITE"


BADLY_SCALED = {
    "small columns": np.diag([1.0, 1e-20]),
    "large rows": np.diag([1e20, 1.0, 1e-10]),
    "mixed units": [[1e-12, 3e-12], [1e12, -3e12]],
    "all small": 1e-30 * np.array([[2.0, 1.0], [1.0, 2.0]]),
    "all large": 1e30 * np.array([[2.0, 1.0], [1.0, 2.0]]),
    "triangular": [[1.0, 1e6], [0.0, 1.0]],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("matrix", BADLY_SCALED.values(), ids=BADLY_SCALED)
def test_a_badly_scaled_jacobian_has_a_newton_step(
    client: jacserve.Client, matrix: Any, dtype: str
) -> None:
    matrix = np.asarray(matrix, dtype)
    result = step_of(client, matrix, require_finite=True)
    eps = float(np.finfo(dtype).eps)
    x = np.arange(1, len(matrix) + 1)
    np.testing.assert_allclose(result.newton_step, -x, rtol=100 * eps)


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float32", 3e38), ("float64", 1.5e308)]
)
def test_a_jacobian_with_the_largest_numbers_has_a_newton_step(
    client: jacserve.Client, dtype: str, largest: float
) -> None:
    result = step_of(client, np.diag(np.array([largest, 1.0], dtype)))
    np.testing.assert_allclose(result.newton_step, [-1.0, -2.0], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1e-37), ("float64", 1e-307)])
def test_a_jacobian_with_the_smallest_numbers_has_a_newton_step(
    client: jacserve.Client, dtype: str, least: float
) -> None:
    result = step_of(client, np.diag(np.array([least, 1.0], dtype)))
    np.testing.assert_allclose(result.newton_step, [-1.0, -2.0], rtol=1e-6)


def test_one_singular_jacobian_of_a_batch_leaves_the_others_their_steps(
    client: jacserve.Client,
) -> None:
    matrices = np.stack([np.eye(2), np.ones((2, 2)), 2 * np.eye(2)])
    x = np.array([1.0, 2.0])
    result = client.evaluate("linear", (matrices, x), wrt="x", quantities="newton_step")
    np.testing.assert_array_equal(result.newton_step[[0, 2]], [-x, -x])
    assert np.isnan(result.newton_step[1]).all()
    assert not result.finite
    with pytest.raises(jacserve.NonFiniteError, match=r"1 of 3 points.*row 1"):
        client.newton_step("linear", (matrices, x), wrt="x", require_finite=True)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
def test_a_least_squares_step_exists_without_full_rank(
    client: jacserve.Client, shape: tuple[int, int]
) -> None:
    matrix, x = np.ones(shape), np.arange(1.0, shape[1] + 1)
    result = client.evaluate("linear", (matrix, x), wrt="x", quantities="newton_step")
    expected = np.linalg.lstsq(matrix, -matrix @ x)[0]
    np.testing.assert_allclose(result.newton_step, expected, rtol=1e-12)
    assert result.finite


RANKLESS = {
    "zero": np.zeros((2, 2)),
    "zero and tall": np.zeros((3, 2)),
    "zero and wide": np.zeros((2, 3)),
    "a zero row": [[1.0, 2.0], [0.0, 0.0]],
    "a zero column": [[0.0, 2.0], [0.0, 1.0]],
    "ones": np.ones((2, 2)),
    "equal rows": [[1.0, 2.0], [1.0, 2.0]],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("matrix", RANKLESS.values(), ids=RANKLESS)
def test_the_condition_without_full_rank_is_infinite(
    client: jacserve.Client, matrix: Any, dtype: str
) -> None:
    matrix = np.asarray(matrix, dtype)
    x = np.ones(matrix.shape[1], dtype)
    options: Any = {"wrt": "x", "quantities": "condition_number"}
    result = client.evaluate("linear", (matrix, x), **options)
    # LAPACK may find a singular value that is not quite zero.
    assert result.condition_number > 1 / np.finfo(dtype).eps
    if result.condition_number < np.inf:
        return
    assert not result.finite
    with pytest.raises(jacserve.NonFiniteError, match="condition_number"):
        client.evaluate("linear", (matrix, x), require_finite=True, **options)


def test_the_condition_of_inexact_singular_values_is_beyond_precision(
    client: jacserve.Client,
) -> None:
    for matrix in (
        np.outer([1.0, 2.0], [1.0, 2.0]),
        np.outer([1.0, 2.0, 3.0], [1.0, 2.0]),
        np.arange(1.0, 10.0).reshape(3, 3),
    ):
        x = np.ones(matrix.shape[1])
        assert client.condition_number("linear", (matrix, x), wrt="x") > 1e15


def test_the_condition_of_nan_is_nan(client: jacserve.Client) -> None:
    matrix = np.array([[np.nan, 1.0], [1.0, 1.0]])
    assert np.isnan(client.condition_number("linear", (matrix, np.ones(2)), wrt="x"))


def test_a_badly_scaled_jacobian_has_a_finite_condition(
    client: jacserve.Client,
) -> None:
    matrix = np.diag([1.0, 1e-10])
    condition = client.condition_number("linear", (matrix, np.ones(2)), wrt="x")
    np.testing.assert_allclose(condition, 1e10)


def test_sparse_mode_of_a_function_without_any_mode(client: jacserve.Client) -> None:
    for ask in (
        lambda: client.jacobian("outside", X, mode="sparse"),
        lambda: client.sparsity("outside", sizes={"n": 3}),
    ):
        with pytest.raises(jacserve.InvalidRequestError, match="callback") as caught:
            ask()
        assert caught.value.reason == "MODE_UNSUPPORTED"
        assert "empty sequence" not in str(caught.value)
