"""Sparse Jacobians and Hessians are the dense ones, and their patterns travel once."""

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from jaxtyping import Array, Complex, Float, Inexact, Int

import jacserve
from jacserve import tensors
from jacserve.errors import translated
from jacserve.sparse import SparseMatrix
from jacserve.v1 import jacobian_pb2 as pb, jacobian_pb2_grpc as pb_grpc
from jacserve_server import Registry, RunningServer, serving
from server_process import server_process

registry = Registry()
RANDOM = np.random.default_rng(13)
X, Y = RANDOM.uniform(0.5, 1.5, size=(2, 6))


@registry.function
def stencil(u: Inexact[Array, "n"]) -> Inexact[Array, "n"]:
    return u * (jnp.roll(u, -1) - jnp.roll(u, 1)) / 2


@registry.function
def diagonal(x: Inexact[Array, "n"]) -> Inexact[Array, "n"]:
    return jnp.exp(x) * x


@registry.function
def arrow(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return (x * x[0]).at[0].set(jnp.sum(x**2))


@registry.function
def row_blocks(X: Float[Array, "p q"]) -> Float[Array, "p q"]:
    return X * jnp.sum(X**2, axis=1, keepdims=True)


@registry.function
def grid(u: Float[Array, "p q"]) -> Float[Array, "p q"]:
    return u**2 - jnp.roll(u, 1, 0) * jnp.roll(u, 1, 1)


@registry.function
def choosing(x: Float[Array, "n"]) -> Float[Array, "n"]:
    either = jnp.where(x > 1.0, jnp.sin(x), x**2)
    return jax.lax.cond(x[0] > 1.0, jnp.exp, jnp.square, either)


@registry.function
def sorting(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.sort(x) ** 2


@registry.function
def gathering(x: Float[Array, "n"], i: Int[Array, "k"]) -> Float[Array, "k"]:
    return x[i] ** 2


@registry.function
def sliding(x: Float[Array, "n"], start: Int[Array, ""]) -> Float[Array, "2"]:
    return jax.lax.dynamic_slice(x, [start], [2]) ** 2


@registry.function
def scanning(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.lax.scan(lambda before, now: (now, now * before), x[0], x)[1]


@registry.function
def several(x: Float[Array, "n"], k: Int[Array, ""], y: Float[Array, "n"]) -> dict:
    return {"a": x * y**k, "most": jnp.argmax(x), "b": (y[:2] ** 2, x.sum())}


@registry.function
def settling(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Only forward mode exists."""
    halved = jax.lax.while_loop(lambda y: jnp.sum(y) > 1.0, lambda y: y / 2.0, x)
    return halved * jnp.roll(x, 1)


@jax.custom_vjp
def backward_exp(x: jax.Array) -> jax.Array:
    return jnp.exp(x)


backward_exp.defvjp(lambda x: (jnp.exp(x), x), lambda x, g: (jnp.exp(x) * g,))


@registry.function
def backward(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Only reverse mode exists."""
    return backward_exp(x) * jnp.roll(x, 1)


@registry.function
def mixed_modes(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
    halved = jax.lax.while_loop(lambda y: jnp.sum(y) > 1.0, lambda y: y / 2.0, x)
    return halved * backward_exp(y)


@registry.function
def waves(x: Float[Array, "n"]) -> Complex[Array, "n"]:
    return x * jnp.exp(1j * jnp.roll(x, 1))


@registry.function
def chain_energy(x: Inexact[Array, "n"]) -> Inexact[Array, ""]:
    return jnp.sum((x[1:] - x[:-1] ** 2) ** 2 * jnp.exp(x[1:]))


@registry.function
def two_energies(x: Float[Array, "n"], y: Float[Array, "n"]) -> dict:
    return {"energy": jnp.sum(x**3 * y), "count": jnp.arange(3)}


@registry.function
def reverse_energy(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(backward_exp(x) * x)


@registry.function(mode="sparse")
def prefers_sparse(u: Float[Array, "n"]) -> Float[Array, "n"]:
    return u * jnp.roll(u, 1)


@registry.function(batchable=False)
def row_by_row(u: Float[Array, "n"]) -> Float[Array, "n"]:
    return u * jnp.roll(u, 1)


@registry.function
def widths(x: Float[Array, "n"], y: Float[Array, "n"]) -> tuple:
    return x**2 * jnp.roll(x, 1), y * jnp.roll(y, 1)


@registry.function
def dense(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x * jnp.sum(x)


@registry.function
def fixed(x: Float[Array, "4"], y: Float[Array, "n+1"], z: Float[Array, "n"]) -> dict:
    return {"x": x**2, "z": z * y[1:]}


@registry.function
def transformed(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.fft.fft(x).real


@registry.function
def solving(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return jnp.linalg.solve(jnp.diag(x) + 1.0, x)


@jax.custom_jvp
def mean_field(x: jax.Array) -> jax.Array:
    return 2.0 * x


@mean_field.defjvp
def _mean_field_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (v,) = primals, tangents
    return mean_field(x), 2.0 * v + jnp.sum(v)


@registry.function
def mislabelled(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """Its derivative has more entries than its own operations show."""
    return mean_field(x)


@pytest.fixture(scope="module")
def running() -> Generator[RunningServer]:
    with serving(registry) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: RunningServer) -> Generator[jacserve.Client]:
    with jacserve.Client(running.target) as connected:
        yield connected


@pytest.fixture
def send(running: RunningServer) -> Generator[Callable[..., pb.Result]]:
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.JacobianServiceStub(channel)

        def call(function: str, x: Any, **fields: Any) -> pb.Result:
            query = pb.Query(
                **{
                    "function": function,
                    "quantities": [pb.QUANTITY_JACOBIAN],
                    "mode": pb.MODE_SPARSE,
                    **fields,
                }
            )
            tensors.encode_into(query.inputs.add().tensor, x)
            with translated(running.target):
                return stub.Evaluate(query)

        yield call


@dataclass
class Recorder:
    """A server in between, which passes on and keeps what crosses the wire."""

    target: str = ""
    queries: list[pb.Query] = field(default_factory=list)
    answers: list[pb.Result] = field(default_factory=list)


@contextmanager
def recording(target: str) -> Generator[Recorder]:
    recorder = Recorder()

    class Forwarder(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            call = channel.unary_unary(handler_call_details.method)

            def forward(request: bytes, context: grpc.ServicerContext) -> bytes:
                recorder.queries.append(pb.Query.FromString(request))
                try:
                    answer = call(request)
                except grpc.RpcError as error:
                    status: Any = error
                    context.set_trailing_metadata(status.trailing_metadata())
                    context.abort(status.code(), status.details())
                recorder.answers.append(pb.Result.FromString(answer))
                return answer

            return grpc.unary_unary_rpc_method_handler(forward)

    with grpc.insecure_channel(target) as channel:
        server = grpc.server(ThreadPoolExecutor(4), handlers=[Forwarder()])
        recorder.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield recorder
        server.stop(None).wait()


def assert_sparse_is_dense(
    sparse: Any, dense_array: np.ndarray, relative: float
) -> None:
    assert sparse.shape == dense_array.shape
    scale = np.abs(dense_array).max(initial=1.0)
    np.testing.assert_allclose(sparse.todense(), dense_array, atol=relative * scale)


FUNCTIONS: list[Any] = [
    pytest.param("stencil", X, {}, 18, id="stencil"),
    pytest.param("diagonal", X, {}, 6, id="diagonal"),
    pytest.param("arrow", X, {}, 16, id="arrow"),
    pytest.param("row_blocks", X.reshape(2, 3), {}, 18, id="row-blocks"),
    pytest.param("grid", RANDOM.normal(size=(4, 5)), {}, 60, id="grid"),
    pytest.param("choosing", X, {}, 6, id="where-and-cond"),
    pytest.param("sorting", X, {}, 36, id="sort"),
    pytest.param("gathering", (X, np.array([4, 1])), {}, 12, id="gather"),
    pytest.param("sliding", (X, np.array(3)), {}, 12, id="dynamic-slice"),
    pytest.param("scanning", X, {}, 11, id="scan"),
    pytest.param("several", (X, np.array(2), Y), {}, 20, id="several"),
    pytest.param("several", (X, np.array(2), Y), {"wrt": ["y", "x"]}, 20, id="wrt"),
    pytest.param("several", (X, np.array(2), Y), {"wrt": "y"}, 8, id="wrt-one"),
    pytest.param("settling", X, {}, 12, id="only-forward"),
    pytest.param("backward", X, {}, 12, id="only-reverse"),
    pytest.param("waves", X, {}, 12, id="real-to-complex"),
    pytest.param("chain_energy", X, {}, 6, id="scalar"),
    pytest.param("stencil", X[:0], {}, 0, id="empty"),
]


@pytest.mark.parametrize(("name", "inputs", "options", "nnz"), FUNCTIONS)
def test_the_sparse_jacobian_is_the_dense_one(
    client: jacserve.Client, name: str, inputs: Any, options: Any, nnz: int
) -> None:
    expected = client.jacobian(name, inputs, **options)
    result = client.evaluate(
        name, inputs, quantities="jacobian", mode="sparse", **options
    )
    assert (result.mode, result.modes) == ("sparse", {"jacobian": "sparse"})
    assert isinstance(result.jacobian, scipy.sparse.csr_array)
    assert (result.jacobian.nnz, result.jacobian.dtype) == (nnz, expected.dtype)
    assert result.quantities["jacobian"].nnz == nnz
    assert_sparse_is_dense(result.jacobian, expected, 1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("name", ["stencil", "diagonal"])
def test_the_sparse_jacobian_in_each_dtype(
    client: jacserve.Client, name: str, dtype: str
) -> None:
    x = (X + 1j * Y).astype(dtype) if dtype.startswith("complex") else X.astype(dtype)
    jac = client.jacobian(name, x, mode="sparse")
    assert jac.dtype == dtype
    eps = float(np.finfo(dtype).eps)
    assert_sparse_is_dense(jac, client.jacobian(name, x), 10 * eps)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_a_sixteen_bit_matrix_by_sparse_products(
    client: jacserve.Client, dtype: Any
) -> None:
    x = X.astype(dtype)
    jac = client.jacobian("stencil", x, mode="sparse", layout="matrix")
    assert jac.dtype == x.dtype
    expected = client.jacobian("stencil", x.astype("float64"))
    np.testing.assert_allclose(jac.astype("float64"), expected, atol=0.05)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_a_sixteen_bit_sparse_array_can_be_used(
    client: jacserve.Client, dtype: Any
) -> None:
    x = X.astype(dtype)
    jac = client.jacobian("stencil", x, mode="sparse")
    assert jac.dtype == x.dtype
    expected = client.jacobian("stencil", x.astype("float64"))
    assert_sparse_is_dense(jac, expected, 0.05)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (None, scipy.sparse.csr_array),
        ("csr", scipy.sparse.csr_array),
        ("coo", scipy.sparse.coo_array),
        ("matrix", np.ndarray),
    ],
)
@pytest.mark.parametrize("mode", ["sparse", "auto", "forward", "reverse"])
def test_the_layout_is_the_one_asked_for_in_every_mode(
    client: jacserve.Client, mode: Any, layout: Any, kind: type
) -> None:
    options: Any = {} if layout is None else {"layout": layout}
    if layout is None and mode != "sparse":
        kind = np.ndarray
    jac = client.jacobian("stencil", X, mode=mode, **options)
    assert type(jac) is kind
    found = jac if kind is np.ndarray else jac.todense()
    np.testing.assert_allclose(found, client.jacobian("stencil", X), rtol=1e-14)


@pytest.mark.parametrize("points", [0, 1, 3])
@pytest.mark.parametrize("name", ["stencil", "settling", "backward", "row_by_row"])
def test_a_batch_is_a_stack_with_one_pattern(
    client: jacserve.Client, name: str, points: int
) -> None:
    x = RANDOM.uniform(0.5, 1.5, size=(points, 6))
    stack = client.jacobian(name, x, mode="sparse")
    assert isinstance(stack, SparseMatrix)
    assert stack.shape == (points, 6, 6)
    assert stack.data.shape == (points, stack.nnz)
    assert_sparse_is_dense(stack, client.jacobian(name, x), 1e-14)
    assert len(stack) == points
    for matrix, point in zip(stack, x, strict=True):
        expected = client.jacobian(name, point, mode="sparse")
        assert (matrix.to_scipy() != expected).nnz <= expected.nnz
        assert_sparse_is_dense(matrix.to_scipy("coo"), expected.todense(), 1e-14)
        np.testing.assert_array_equal(
            matrix.indices, np.transpose(expected.tocoo().coords)
        )
    with pytest.raises(ValueError, match="one by one"):
        stack.to_scipy()


def test_one_matrix_has_no_items(client: jacserve.Client) -> None:
    matrix = client.evaluate("stencil", X, mode="sparse").quantities["jacobian"]
    assert repr(matrix) == "<SparseMatrix float64[6, 6], nnz=18>"
    with pytest.raises(TypeError, match="not a stack"):
        matrix[0]


def test_shared_and_batched_arguments(client: jacserve.Client) -> None:
    inputs = (X, np.array(2), RANDOM.uniform(0.5, 1.5, size=(3, 6)))
    stack = client.jacobian("several", inputs, mode="sparse")
    assert_sparse_is_dense(stack, client.jacobian("several", inputs), 1e-14)


@pytest.mark.parametrize("layout", ["csr", "coo", "matrix"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "points", "nnz"),
    [
        ("chain_energy", (), 16),
        ("chain_energy", (3,), 16),
        ("two_energies", (), 18),
        ("reverse_energy", (), 6),
    ],
    ids=str,
)
def test_the_sparse_hessian_is_the_dense_one(
    client: jacserve.Client, name: str, points: Any, nnz: int, dtype: str, layout: Any
) -> None:
    x, y = RANDOM.uniform(0.5, 1.5, size=(2, *points, 6)).astype(dtype)
    inputs = (x, y) if name == "two_energies" else x
    expected = client.hessian(name, inputs)
    result = client.evaluate(
        name, inputs, quantities=("hessian", "gradient"), mode="sparse", layout=layout
    )
    assert result.modes == {"hessian": "sparse", "gradient": "sparse"}
    hessian = result.hessian
    assert hessian.dtype == dtype
    if layout != "matrix":
        assert hessian.nnz == nnz
        hessian = hessian.todense()
    scale, eps = np.abs(expected).max(), float(np.finfo(dtype).eps)
    np.testing.assert_allclose(hessian, expected, atol=10 * eps * scale)


def test_wrt_chooses_the_columns_of_a_sparse_hessian(client: jacserve.Client) -> None:
    for wrt in ("y", ["y", "x"]):
        options: Any = {"wrt": wrt}
        sparse = client.hessian("two_energies", (X, Y), mode="sparse", **options)
        expected = client.hessian("two_energies", (X, Y), **options)
        assert_sparse_is_dense(sparse, expected, 1e-14)


def test_a_complex_hessian_in_a_sparse_layout(client: jacserve.Client) -> None:
    z = X + 1j * Y
    hessian = client.hessian("chain_energy", z, layout="csr")
    assert isinstance(hessian, scipy.sparse.csr_array)
    assert_sparse_is_dense(hessian, client.hessian("chain_energy", z), 1e-14)


@pytest.mark.parametrize("points", [(), (3,)], ids=["point", "batch"])
@pytest.mark.parametrize("layout", ["csr", "matrix"])
def test_everything_beside_a_sparse_jacobian(
    client: jacserve.Client, layout: Any, points: Any
) -> None:
    x = RANDOM.uniform(0.5, 1.5, size=(*points, 6)) + np.arange(6.0) ** 2
    quantities: Any = (
        "newton_step",
        "slogdet",
        "value",
        "jacobian",
        "condition_number",
        "singular_values",
        "jvp",
        "vjp",
    )
    options: Any = {"quantities": quantities, "tangents": X, "cotangents": Y}
    sparse = client.evaluate("stencil", x, mode="sparse", layout=layout, **options)
    dense_result = client.evaluate("stencil", x, mode="forward", **options)
    assert list(sparse.quantities) == [*quantities]
    assert {sparse.modes[q] for q in quantities[:6] if q != "value"} == {"sparse"}
    for quantity in quantities:
        found = getattr(sparse, quantity)
        if quantity == "jacobian" and layout == "csr":
            found = found.todense()
        expected = getattr(dense_result, quantity)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_function_may_prefer_sparse_mode(client: jacserve.Client) -> None:
    assert client.describe("prefers_sparse").preferred_mode == "sparse"
    expected = client.jacobian("prefers_sparse", X, mode="forward")
    result = client.evaluate("prefers_sparse", X)
    assert result.mode == "sparse"
    np.testing.assert_array_equal(result.jacobian, expected)
    blocks = client.evaluate("prefers_sparse", X, layout="blocks")
    assert blocks.mode == "forward"
    np.testing.assert_array_equal(blocks.jacobian, expected)
    assert client.evaluate("prefers_sparse", X[:2]).mode == "forward"


@pytest.mark.parametrize(
    ("name", "x", "mode"),
    [
        ("stencil", X, "sparse"),
        ("stencil", X[:3], "forward"),
        ("diagonal", X[:2], "sparse"),
        ("diagonal", X[:1], "forward"),
        ("arrow", X, "forward"),
        ("sorting", X, "forward"),
        ("settling", X, "sparse"),
        ("backward", X, "sparse"),
        ("chain_energy", X, "reverse"),
    ],
)
@pytest.mark.parametrize("layout", ["csr", "coo"])
def test_auto_takes_sparse_mode_where_that_saves_products(
    client: jacserve.Client, name: str, x: np.ndarray, mode: str, layout: Any
) -> None:
    result = client.evaluate(name, x, layout=layout)
    assert result.mode == mode
    kind = scipy.sparse.csr_array if layout == "csr" else scipy.sparse.coo_array
    assert isinstance(result.jacobian, kind)
    assert_sparse_is_dense(result.jacobian, client.jacobian(name, x), 1e-14)
    assert client.evaluate(name, x).mode != "sparse"


@pytest.mark.parametrize(("n", "mode"), [(6, "sparse"), (2, "forward_over_reverse")])
def test_auto_takes_a_sparse_hessian_where_that_saves_products(
    client: jacserve.Client, n: int, mode: str
) -> None:
    x = X[:n]
    result = client.evaluate("chain_energy", x, quantities="hessian", layout="csr")
    assert result.mode == mode
    expected = client.hessian("chain_energy", x)
    assert_sparse_is_dense(result.hessian, expected, 1e-13)


REFUSED = [
    ("transformed", "fft"),
    ("solving", "custom_linear_solve"),
    ("mislabelled", "does not hold"),
]


@pytest.mark.parametrize(("name", "why"), REFUSED)
def test_a_function_whose_sparsity_cannot_be_found(
    client: jacserve.Client, name: str, why: str
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.jacobian(name, X, mode="sparse"),
        lambda: client.sparsity(name, sizes={"n": 6}),
    ]
    for call in calls:
        with pytest.raises(jacserve.InvalidRequestError, match=why) as caught:
            call()
        assert caught.value.reason == "SPARSITY_UNSUPPORTED"
        assert caught.value.code == "INVALID_ARGUMENT"
        assert caught.value.field == "mode"
        assert "auto, forward or reverse" in str(caught.value)
    result = client.evaluate(name, X, layout="csr")
    assert result.mode == "forward"
    assert isinstance(result.jacobian, scipy.sparse.csr_array)
    assert_sparse_is_dense(result.jacobian, client.jacobian(name, X), 1e-14)


def test_a_pattern_found_once_is_that_of_every_dtype_and_point(
    client: jacserve.Client, send: Callable[..., pb.Result]
) -> None:
    found = client.sparsity("stencil", sizes={"n": 6})
    for dtype in ("float32", "float64", "complex64"):
        [pattern] = send("stencil", X.astype(dtype)).patterns
        assert pattern.hash == found.pattern.hash
    [other] = send("stencil", X[:5]).patterns
    assert other.hash != found.pattern.hash


def test_indices_cross_the_wire_once_and_then_values_alone(
    send: Callable[..., pb.Result],
) -> None:
    first = send("stencil", X)
    [pattern] = first.patterns
    assert (pattern.row_count, pattern.column_count) == (6, 6)
    assert tensors.decode(pattern.row_starts).tolist() == [*range(0, 19, 3)]
    assert tensors.decode(pattern.columns)[:6].tolist() == [0, 1, 5, 0, 1, 2]
    assert tensors.decode(pattern.columns).dtype == "int32"
    assert not pattern.HasField("rows")
    again = send("stencil", 2 * X, patterns=[pattern.hash, pattern.hash])
    assert not again.patterns
    [output] = again.outputs
    assert output.pattern == first.outputs[0].pattern == pattern.hash
    assert list(output.tensor.shape) == [18]
    [coordinates] = send("stencil", X, layout=pb.LAYOUT_COO).patterns
    assert tensors.decode(coordinates.rows).tolist() == [*np.repeat(range(6), 3)]
    assert not coordinates.HasField("row_starts")
    assert coordinates.hash == pattern.hash
    matrix = send("stencil", X, layout=pb.LAYOUT_MATRIX)
    assert not matrix.patterns
    assert not matrix.outputs[0].pattern


@pytest.mark.parametrize(
    "fields",
    [
        {"patterns": ["0" * 32]},
        {"patterns": [""]},
        {"layout": pb.LAYOUT_MATRIX},
        {"mode": pb.MODE_FORWARD, "layout": pb.LAYOUT_CSR},
        {"quantities": [pb.QUANTITY_VALUE]},
        {"quantities": [pb.QUANTITY_SLOGDET]},
    ],
    ids=str,
)
def test_a_pattern_that_the_answer_does_not_have_is_refused(
    send: Callable[..., pb.Result], fields: dict[str, Any]
) -> None:
    [pattern] = send("stencil", X).patterns
    with pytest.raises(jacserve.PreconditionError, match="without naming it") as e:
        send("stencil", X, **{"patterns": [pattern.hash], **fields})
    assert (e.value.code, e.value.reason) == ("FAILED_PRECONDITION", "PATTERN_UNKNOWN")
    assert e.value.field == "patterns[0]"
    assert send("stencil", X, patterns=[pattern.hash]).outputs


def ask_twice(client: jacserve.Client) -> list[Any]:
    """Alike, then with another wrt, another layout, and the other wrt again."""
    inputs: Any = (X, np.array(2), Y)
    alike = [client.jacobian("several", inputs, mode="sparse") for _ in range(2)]
    options: list[dict[str, Any]] = [{"wrt": "x"}, {"layout": "coo"}, {"wrt": "x"}]
    return [
        *alike,
        *(client.jacobian("several", inputs, mode="sparse", **o) for o in options),
    ]


def test_the_client_names_the_patterns_that_it_has(running: RunningServer) -> None:
    with recording(running.target) as seen, jacserve.Client(seen.target) as client:
        found = ask_twice(client)
    for jac, wrt in zip(found, [(), (), "x", (), "x"], strict=True):
        with jacserve.Client(running.target) as plain:
            expected = plain.jacobian("several", (X, np.array(2), Y), wrt=wrt)
        assert_sparse_is_dense(jac, expected, 1e-14)
    assert [len(query.patterns) for query in seen.queries] == [0, 1, 0, 0, 1]
    assert [len(answer.patterns) for answer in seen.answers] == [1, 0, 1, 1, 0]


def test_a_pattern_is_named_for_inputs_of_its_own_sizes(
    running: RunningServer,
) -> None:
    with recording(running.target) as seen, jacserve.Client(seen.target) as client:
        for n in (6, 5, 6, 5):
            jac = client.jacobian("stencil", X[:n], mode="sparse")
            assert_sparse_is_dense(jac, client.jacobian("stencil", X[:n]), 1e-14)
    asked = [q for q in seen.queries if q.mode == pb.MODE_SPARSE]
    assert [len(query.patterns) for query in asked] == [0, 0, 1, 1]


def test_two_patterns_in_one_answer(running: RunningServer) -> None:
    with recording(running.target) as seen, jacserve.Client(seen.target) as client:
        for x in (X, Y, X):
            result = client.evaluate(
                "chain_energy", x, quantities=("hessian", "jacobian"), mode="sparse"
            )
            assert_sparse_is_dense(
                result.hessian, client.hessian("chain_energy", x), 1e-13
            )
            assert_sparse_is_dense(
                result.jacobian, client.jacobian("chain_energy", x), 1e-13
            )
    assert [len(query.patterns) for query in seen.queries] == [
        0,
        0,
        0,
        2,
        0,
        0,
        2,
        0,
        0,
    ]
    assert [len(a.patterns) for a in seen.answers] == [2, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_dense_answer_in_a_sparse_layout_is_asked_for_once(
    running: RunningServer,
) -> None:
    with recording(running.target) as seen, jacserve.Client(seen.target) as client:
        for x in (X, Y, X):
            jac = client.jacobian("dense", x, layout="csr")
            assert_sparse_is_dense(
                jac, np.diag(np.full(6, x.sum())) + x[:, None], 1e-14
            )
    assert len(seen.queries) == 3


def test_threads_share_patterns(running: RunningServer) -> None:
    points = RANDOM.uniform(0.5, 1.5, size=(40, 6))
    with (
        jacserve.Client(running.target) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        found = list(
            threads.map(lambda x: client.jacobian("stencil", x, mode="sparse"), points)
        )
        expected = client.jacobian("stencil", points)
    for jac, matrix in zip(found, expected, strict=True):
        assert_sparse_is_dense(jac, matrix, 1e-14)


def version_of(shift: int, *, is_dense: bool = False) -> Registry:
    """Of the same name and signature, with another pattern."""
    version = Registry()

    @version.function
    def shifted(x: Float[Array, "n"]) -> Float[Array, "n"]:
        moved = jnp.roll(x, shift)
        return x * (moved + jnp.sum(x) if is_dense else moved)

    return version


def wait_for(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)


@pytest.mark.parametrize("is_dense", [False, True], ids=["sparse", "dense"])
def test_the_client_recovers_when_the_function_has_another_pattern(
    is_dense: bool,
) -> None:
    with serving(version_of(1)) as first:
        port = int(first.target.rpartition(":")[2])
        client = jacserve.Client(first.target, timeout_s=60.0)
        before = client.jacobian("shifted", X, layout="csr")
        again = client.jacobian("shifted", X, layout="csr")
    replaced = serving(version_of(2, is_dense=is_dense), port=port)
    with client, replaced as second, jacserve.Client(second.target) as plain:
        wait_for(second.target)
        after = [client.jacobian("shifted", x, layout="csr") for x in (X, Y)]
        expected = [plain.jacobian("shifted", x) for x in (X, Y)]
    assert (before != again).nnz == 0
    for jac, matrix in zip(after, expected, strict=True):
        assert_sparse_is_dense(jac, matrix, 1e-14)
    assert (before != after[0]).nnz > 0


def test_the_async_client_too() -> None:
    async def ask(client: jacserve.AsyncClient) -> list[Any]:
        return [await client.jacobian("shifted", x, mode="sparse") for x in (X, Y, X)]

    async def both_servers() -> tuple[list[Any], list[Any], list[Any]]:
        with serving(version_of(1)) as first:
            with recording(first.target) as seen:
                async with jacserve.AsyncClient(seen.target) as recorded:
                    await ask(recorded)
            port = int(first.target.rpartition(":")[2])
            client = jacserve.AsyncClient(first.target, timeout_s=60.0)
            before = await ask(client)
        async with client:
            with serving(version_of(2), port=port) as second:
                wait_for(second.target)
                after = await ask(client)
                sparsity = await client.sparsity("shifted", sizes={"n": 6})
        assert [len(answer.patterns) for answer in seen.answers] == [1, 0, 0]
        assert (sparsity.pattern.nnz, sparsity.color_count) == (12, 3)
        return before, after, [after[0], after[1], after[0]]

    before, after, repeated = asyncio.run(both_servers())
    for shift, found in ((1, before), (2, after)):
        for x, jac in zip((X, Y, X), found, strict=True):
            expected = np.diag(np.roll(x, shift))
            expected += np.diag(x) @ np.roll(np.eye(6), shift, axis=0)
            assert_sparse_is_dense(jac, expected, 1e-14)
    for jac, same in zip(after, repeated, strict=True):
        assert (jac != same).nnz == 0


def test_the_sparsity_of_a_function_by_itself(client: jacserve.Client) -> None:
    found = client.sparsity("stencil", sizes={"n": 9})
    assert found.pattern.shape == (9, 9)
    assert found.pattern.nnz == 27
    assert (found.color_count, found.mode) == (3, "forward")
    assert found.inputs == "u: float32[9]"
    place = np.transpose([found.pattern.rows, found.pattern.columns])
    assert place[:6].tolist() == [[0, 0], [0, 1], [0, 8], [1, 0], [1, 1], [1, 2]]
    assert client.sparsity("stencil").pattern.shape == (32, 32)
    assert client.sparsity("stencil", sizes={"n": 0}).pattern.nnz == 0


def test_the_sparsity_of_fixed_and_symbolic_sizes(client: jacserve.Client) -> None:
    found = client.sparsity("fixed", sizes={"n": 3})
    assert found.inputs == "x: float32[4], y: float32[4], z: float32[3]"
    assert found.pattern.shape == (7, 11)
    assert found.pattern.nnz == 4 + 3 + 3
    swapped = client.sparsity("fixed", sizes={"n": 3}, wrt=["z", "x"])
    assert swapped.pattern.shape == (7, 7)
    assert swapped.pattern.columns.tolist() == [3, 4, 5, 6, 0, 1, 2]
    assert client.sparsity("fixed").inputs.endswith("y: float32[33], z: float32[32]")


def test_the_direction_of_fewer_products_is_taken(client: jacserve.Client) -> None:
    for name, sizes, mode, count in (
        ("chain_energy", {"n": 6}, "reverse", 1),
        ("gathering", {"n": 6, "k": 2}, "reverse", 2),
        ("arrow", {"n": 6}, "forward", 6),
        ("settling", {"n": 6}, "forward", 2),
        ("backward", {"n": 6}, "reverse", 2),
    ):
        found = client.sparsity(name, sizes=sizes)
        assert (found.mode, found.color_count) == (mode, count)


def test_the_sparsity_of_a_hessian(client: jacserve.Client) -> None:
    found = client.sparsity("chain_energy", sizes={"n": 6}, quantity="hessian")
    assert found.pattern.shape == (6, 6)
    assert found.pattern.nnz == 16
    assert (found.color_count, found.mode) == (3, "forward_over_reverse")
    result = client.evaluate("chain_energy", X, quantities="hessian", mode="sparse")
    assert result.quantities["hessian"].pattern.hash == found.pattern.hash
    by_y = client.sparsity("two_energies", sizes={"n": 4}, wrt="y", quantity="hessian")
    assert (by_y.pattern.shape, by_y.pattern.nnz) == ((4, 4), 0)


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"sizes": {"m": 3}}, "ARGUMENT_MISMATCH", ["m = 3", "dimensions n"]),
        ({"sizes": {"n": -1}}, "ARGUMENT_MISMATCH", ["n = -1"]),
        ({"sizes": {"n": 2**40}}, "ARGUMENT_MISMATCH", [str(2**40)]),
        ({"wrt": "v"}, "ARGUMENT_MISMATCH", ["wrt names v", "takes u"]),
        ({"quantity": "gradient"}, "MALFORMED_REQUEST", ["jacobian and hessian"]),
        ({"quantity": "sparsity"}, "MALFORMED_REQUEST", ["'sparsity'"]),
    ],
    ids=str,
)
def test_a_bad_question_about_sparsity_is_refused_in_words(
    client: jacserve.Client, options: Any, reason: str, words: list[str]
) -> None:
    with pytest.raises(jacserve.InvalidRequestError) as caught:
        client.sparsity("stencil", **options)
    assert caught.value.reason == reason
    for text in words:
        assert text in str(caught.value)
    assert client.sparsity("stencil", sizes={"n": 3}).pattern.nnz == 9


def test_sizes_that_no_array_can_have_together(client: jacserve.Client) -> None:
    with pytest.raises(jacserve.InvalidRequestError, match="at most") as caught:
        client.sparsity("fixed", sizes={"n": 2**22})
    assert (caught.value.reason, caught.value.field) == ("SHAPE_MISMATCH", "sizes")


def test_the_sparsity_of_an_unknown_function(client: jacserve.Client) -> None:
    with pytest.raises(jacserve.NotFoundError, match="sparsely is not registered"):
        client.sparsity("sparsely")


def test_the_sparsity_of_the_hessian_of_a_vector_function(
    client: jacserve.Client,
) -> None:
    with pytest.raises(jacserve.InvalidRequestError, match="hessian") as caught:
        client.sparsity("stencil", sizes={"n": 6}, quantity="hessian")
    assert caught.value.reason == "QUANTITY_UNSUPPORTED"
    assert "6 results" in str(caught.value)


@pytest.mark.parametrize("options", [{"layout": "csr"}, {"mode": "sparse"}], ids=str)
def test_arguments_of_different_widths(client: jacserve.Client, options: Any) -> None:
    inputs = (X.astype("float32"), Y)
    try:
        jac = client.jacobian("widths", inputs, **options)
    except jacserve.InvalidRequestError as error:
        assert options == {"mode": "sparse"}
        assert error.reason == "SPARSITY_UNSUPPORTED"  # noqa: PT017
    else:
        assert_sparse_is_dense(jac, client.jacobian("widths", inputs), 1e-6)


@pytest.mark.parametrize("wrt", ["x", "y"])
def test_a_mode_that_exists_for_some_arguments_alone(
    client: jacserve.Client, wrt: str
) -> None:
    jac = client.jacobian("mixed_modes", (X, Y), wrt=wrt, mode="sparse")
    expected = client.jacobian("mixed_modes", (X, Y), wrt=wrt)
    assert_sparse_is_dense(jac, expected, 1e-14)


@pytest.mark.parametrize(
    ("layout", "dtype", "rows"), [("csr", "float16", 2000), ("coo", "float32", 1000)]
)
def test_an_answer_that_its_pattern_makes_too_large(
    layout: Any, dtype: str, rows: int
) -> None:
    """The values take 1.03 MB of the 1.05 MB allowed, the indices 2.05 MB."""
    large = Registry()

    @large.function
    def squares(x: Float[Array, "n"], w: Float[Array, "256"]) -> Float[Array, "n"]:
        return x**2 + jnp.sum(w**2)

    with serving(large, max_payload_bytes=2**20) as server:
        with jacserve.Client(server.target) as client:
            inputs = np.ones(rows, dtype), np.ones(256, dtype)
            with pytest.raises(jacserve.CapacityError) as caught:
                client.jacobian("squares", inputs, mode="sparse", layout=layout)
            assert caught.value.reason == "RESULT_TOO_LARGE"


def test_a_pattern_that_is_too_large_to_send() -> None:
    with serving(registry, max_payload_bytes=2**20) as server:
        with jacserve.Client(server.target) as client:
            with pytest.raises(jacserve.CapacityError) as caught:
                client.sparsity("dense", sizes={"n": 600})
            assert caught.value.reason == "RESULT_TOO_LARGE"


FILE = """
import jax.numpy as jnp
from jaxtyping import Array, Float
from jacserve_server import Registry

registry = Registry()

@registry.function
def stencil(u: Float[Array, "n"]) -> Float[Array, "n"]:
    return u * (jnp.roll(u, -1) - jnp.roll(u, 1)) / 2

@registry.function(mode="sparse")
def prefers_sparse(u: Float[Array, "n"]) -> Float[Array, "n"]:
    return u * jnp.roll(u, 1)

@registry.function
def energy(u: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(u[1:] ** 2 * u[:-1])
"""


@contextmanager
def server_with(asdex: str, folder: Path) -> Generator[str]:
    """A server that finds another asdex than the installed one."""
    (folder / "functions.py").write_text(FILE)
    shadow = folder / "shadow"
    shadow.mkdir()
    (shadow / "asdex.py").write_text(asdex)
    paths = [str(shadow), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        with server_process(folder / "functions.py") as server:
            yield server.target


@pytest.fixture(scope="module")
def without_asdex(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server that finds an asdex which can't be imported, as if there were none."""
    raising = 'raise ModuleNotFoundError("No module named \'asdex\'", name="asdex")\n'
    with server_with(raising, tmp_path_factory.mktemp("functions")) as target:
        yield target


def test_an_asdex_that_does_not_fit_says_so(tmp_path: Path) -> None:
    raising = "from jax._src.core import ThatHasMoved\n"
    with server_with(raising, tmp_path) as target:
        with jacserve.Client(target, timeout_s=60.0) as client:
            with pytest.raises(jacserve.PreconditionError) as caught:
                client.jacobian("stencil", X, mode="sparse")
            assert caught.value.reason == "NOT_INSTALLED"
            assert "needs asdex, which does not fit JAX" in str(caught.value)
            assert client.evaluate("stencil", X, layout="csr").mode == "forward"


def test_without_asdex_all_else_works(without_asdex: str) -> None:
    with jacserve.Client(without_asdex, timeout_s=60.0) as client:
        for layout in ("csr", "coo"):
            jac = client.evaluate("stencil", X, layout=layout)
            assert jac.mode == "forward"
            assert_sparse_is_dense(jac.jacobian, client.jacobian("stencil", X), 1e-14)
        assert client.evaluate("prefers_sparse", X).mode == "forward"
        hessian = client.hessian("energy", X, layout="csr")
        assert_sparse_is_dense(hessian, client.hessian("energy", X), 1e-14)
        jvp = client.jvp("stencil", X, Y, mode="sparse")
        np.testing.assert_allclose(jvp, client.jacobian("stencil", X) @ Y)


def test_without_asdex_sparse_mode_says_what_to_install(without_asdex: str) -> None:
    with jacserve.Client(without_asdex, timeout_s=60.0) as client:
        calls: list[Callable[[], Any]] = [
            lambda: client.jacobian("stencil", X, mode="sparse"),
            lambda: client.hessian("energy", X, mode="sparse"),
            lambda: client.sparsity("stencil"),
        ]
        for call in calls:
            with pytest.raises(jacserve.PreconditionError, match="asdex") as caught:
                call()
            assert caught.value.code == "FAILED_PRECONDITION"
            assert (caught.value.reason, caught.value.field) == (
                "NOT_INSTALLED",
                "mode",
            )
            assert 'pip install "jacserve[sparse]"' in str(caught.value)


def test_without_scipy_the_client_returns_matrices_of_its_own(
    running: RunningServer, tmp_path: Path
) -> None:
    program = tmp_path / "ask.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            sys.modules["scipy"] = None
            import numpy as np
            import jacserve

            x = np.arange(1.0, 7.0)
            with jacserve.Client(sys.argv[1], timeout_s=60.0) as client:
                expected = client.jacobian("stencil", x)
                for options in ({"mode": "sparse"}, {"layout": "csr"},
                                {"layout": "coo", "mode": "forward"}):
                    for _ in range(2):
                        jac = client.jacobian("stencil", x, **options)
                        assert type(jac) is jacserve.SparseMatrix, type(jac)
                        assert np.array_equal(jac.todense(), expected)
                        assert jac.indices.shape == (jac.nnz, 2)
                try:
                    jac.to_scipy()
                except ImportError:
                    print("done")
            """
        )
    )
    ran = subprocess.run(
        [sys.executable, str(program), running.target],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.stdout.strip() == "done", ran.stderr
