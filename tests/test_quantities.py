"""What can be asked for, and how it is laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import jacserve
from jacserve.vocabulary import QUANTITIES
from jacserve_server import Registry, serving
from jacserve_server.quantities import QUANTITIES as SPECS
from jacserve_server.transforms import COMPUTE

registry = Registry()
traces: list[str] = []
RANDOM = np.random.default_rng(11)
A, B, X = RANDOM.normal(size=(2, 3)), RANDOM.normal(size=(3,)), RANDOM.normal(size=3)


@registry.function
def square_map(x: Float[Array, "n"]) -> Float[Array, "n"]:
    traces.append("square_map")
    return jnp.sin(x) + jnp.roll(x, 1) ** 2


@registry.function
def energy(A: Float[Array, "m n"], b: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(jnp.sin(A) @ b)


@registry.function
def nested(A: Float[Array, "m n"], b: Float[Array, "n"]) -> dict:
    return {"zeta": A @ b, "alpha": [jnp.argmax(b), A * b], "last": b.sum()}


@registry.function(batchable=False)
def halvings(x: Float[Array, ""], scale: Float[Array, ""]) -> Float[Array, ""]:
    return jax.lax.while_loop(lambda y: y > 1.0, lambda y: y / 2.0, x * scale)


@registry.function(mode="reverse")
def prefers_reverse(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x**2


@registry.function
def with_nothing(x: Float[Array, "n"]) -> tuple[Float[Array, "0"], Float[Array, ""]]:
    return x[:0], x.sum()


@registry.function
def keywords(
    a: Float[Array, ""], /, b: Float[Array, ""], *, c: Float[Array, ""]
) -> Float[Array, ""]:
    return a + 2.0 * b + 3.0 * c


@pytest.fixture(scope="module")
def client():
    with serving(registry) as server, jacserve.Client(server.target) as connected:
        yield connected


def test_every_quantity_of_the_contract_is_computed() -> None:
    assert list(COMPUTE) == list(SPECS) == list(QUANTITIES)


def test_all_quantities_in_one_pass_agree_with_numpy(client: jacserve.Client) -> None:
    traces.clear()
    result = client.evaluate(
        "square_map",
        X,
        quantities=("slogdet", "value", "determinant", "jacobian", "abs_determinant"),
        mode="forward",
    )
    assert len(traces) == 1
    assert list(result.quantities) == [
        "slogdet", "value", "determinant", "jacobian", "abs_determinant"
    ]  # fmt: skip
    jac = np.diag(np.cos(X)) + np.diag(2 * np.roll(X, 1)) @ np.roll(np.eye(3), 1, 0)
    np.testing.assert_allclose(result.jacobian, jac, rtol=1e-14)
    np.testing.assert_allclose(result.value, np.sin(X) + np.roll(X, 1) ** 2)
    det = np.linalg.det(jac)
    np.testing.assert_allclose(result.determinant, det, rtol=1e-12)
    np.testing.assert_allclose(result.abs_determinant, abs(det), rtol=1e-12)
    sign, log = result.slogdet
    np.testing.assert_allclose(sign * np.exp(log), det, rtol=1e-12)


def test_slogdet_does_not_overflow(client: jacserve.Client) -> None:
    x = np.full(400, 1e3)
    result = client.evaluate(
        "prefers_reverse", x, quantities=("slogdet", "determinant")
    )
    assert np.isinf(result.determinant)
    np.testing.assert_allclose(result.slogdet[1], 400 * np.log(2e3))
    assert not result.finite


def test_a_scalar_function_has_a_row_and_a_gradient(client: jacserve.Client) -> None:
    result = client.evaluate(
        "energy", (A, B), quantities=("jacobian", "gradient", "value")
    )
    by_a, by_b = np.cos(A) * B, np.sin(A).sum(axis=0)
    flat = np.concatenate([by_a.ravel(), by_b])
    assert result.mode == "reverse"
    assert result.value.shape == ()
    np.testing.assert_allclose(result.jacobian, flat[None])
    np.testing.assert_allclose(result.gradient, flat)
    blocks = client.gradient("energy", (A, B), layout="blocks")
    assert list(blocks) == ["A", "b"]
    np.testing.assert_allclose(blocks["A"], by_a)
    np.testing.assert_allclose(blocks["b"], by_b)
    np.testing.assert_allclose(
        client.gradient("energy", (A, B), wrt="A", layout="blocks"), by_a
    )


def test_the_gradient_beside_empty_results(client: jacserve.Client) -> None:
    blocks = client.gradient("with_nothing", X, layout="blocks")
    np.testing.assert_array_equal(blocks, np.ones(3))
    np.testing.assert_array_equal(client.gradient("with_nothing", X), np.ones(3))


def test_wrt_chooses_columns_in_the_order_asked(client: jacserve.Client) -> None:
    by_a, by_b = (client.jacobian("energy", (A, B), wrt=name) for name in "Ab")
    assert (by_a.shape, by_b.shape) == ((1, 6), (1, 3))
    both = client.jacobian("energy", (A, B), wrt=["b", "A"])
    np.testing.assert_array_equal(both, np.hstack([by_b, by_a]))


def test_inputs_by_name_in_any_order(client: jacserve.Client) -> None:
    by_name = client.jacobian("energy", {"b": B, "A": A})
    np.testing.assert_array_equal(by_name, client.jacobian("energy", (A, B)))


def test_nested_results_keep_structure_and_order(client: jacserve.Client) -> None:
    result = client.evaluate("nested", (A, B))
    assert list(result.value) == ["zeta", "alpha", "last"]
    np.testing.assert_allclose(result.value["zeta"], A @ B)
    assert result.value["alpha"][0] == np.argmax(B)
    np.testing.assert_allclose(result.value["alpha"][1], A * B)
    rows = [
        np.hstack([np.kron(np.eye(2), B), A]),
        np.hstack([np.diag(np.tile(B, 2)), np.vstack([np.diag(row) for row in A])]),
        np.hstack([np.zeros(6), np.ones(3)])[None],
    ]
    np.testing.assert_allclose(result.jacobian, np.vstack(rows))


def test_blocks_have_the_shape_of_result_and_argument(client: jacserve.Client) -> None:
    blocks = client.jacobian("nested", (A, B), layout="blocks")
    assert blocks["zeta"]["A"].shape == (2, 2, 3)
    assert blocks["zeta"]["b"].shape == (2, 3)
    assert blocks["alpha"][0] is None  # An integer has no derivative.
    assert blocks["alpha"][1]["A"].shape == (2, 3, 2, 3)
    np.testing.assert_allclose(blocks["last"]["b"], np.ones(3))
    alone = client.jacobian("nested", (A, B), wrt="b", layout="blocks")
    np.testing.assert_allclose(alone["zeta"], A)


def test_blocks_of_a_batch(client: jacserve.Client) -> None:
    many = np.stack([A, 2 * A, 3 * A])
    blocks = client.jacobian("nested", (many, B), layout="blocks")
    assert blocks["alpha"][1]["A"].shape == (3, 2, 3, 2, 3)
    assert blocks["zeta"]["b"].shape == (3, 2, 3)
    np.testing.assert_allclose(blocks["zeta"]["b"], many)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 9])
def test_a_batch_is_a_stack_of_singles(client: jacserve.Client, batch: int) -> None:
    points = RANDOM.normal(size=(batch, 3))
    result = client.evaluate(
        "square_map", points, quantities=("value", "jacobian", "slogdet")
    )
    assert result.bucket == 1 << (batch - 1).bit_length()
    for row, point in enumerate(points):
        single = client.evaluate(
            "square_map", point, quantities=("value", "jacobian", "slogdet")
        )
        assert single.bucket is None
        np.testing.assert_allclose(result.value[row], single.value, rtol=1e-12)
        np.testing.assert_allclose(result.jacobian[row], single.jacobian, rtol=1e-12)
        np.testing.assert_allclose(result.slogdet[1][row], single.slogdet[1])


def test_shared_and_batched_arguments(client: jacserve.Client) -> None:
    many_a, many_b = RANDOM.normal(size=(4, 2, 3)), RANDOM.normal(size=(4, 3))
    for a, b in ((many_a, B), (A, many_b), (many_a, many_b)):
        jac = client.jacobian("energy", (a, b))
        assert jac.shape == (4, 1, 9)
        for row in range(4):
            point = a[row] if a.ndim == 3 else a, b[row] if b.ndim == 2 else b
            np.testing.assert_allclose(
                jac[row], client.jacobian("energy", point), rtol=1e-12
            )


def test_rows_that_may_not_be_vmapped_run_one_by_one(client: jacserve.Client) -> None:
    x = np.array([1.5, 6.0, 40.0])
    result = client.evaluate("halvings", (x, 1.0), wrt="x")
    np.testing.assert_array_equal(result.value, [0.75, 0.75, 0.625])
    np.testing.assert_array_equal(result.jacobian[:, 0, 0], [1 / 2, 1 / 8, 1 / 64])


def test_auto_takes_the_cheaper_mode_or_the_preferred(client: jacserve.Client) -> None:
    assert client.evaluate("square_map", X).mode == "forward"
    assert client.evaluate("energy", (A, B)).mode == "reverse"
    assert client.evaluate("nested", (A, B), wrt="b").mode == "forward"
    assert client.evaluate("prefers_reverse", X).mode == "reverse"
    assert client.evaluate("halvings", (2.0, 1.0)).mode == "forward"
    assert client.evaluate("square_map", X, quantities="value").mode is None


def test_positional_and_keyword_parameters(client: jacserve.Client) -> None:
    result = client.evaluate("keywords", {"c": 1.0, "a": 10.0, "b": 100.0})
    assert result.value == 213.0
    np.testing.assert_array_equal(result.jacobian, [[1.0, 2.0, 3.0]])


def test_a_quantity_not_asked_for_says_how_to_ask(client: jacserve.Client) -> None:
    result = client.evaluate("square_map", X, quantities="value")
    with pytest.raises(AttributeError, match="Add it to quantities; they were value"):
        _ = result.jacobian
    with pytest.raises(jacserve.InvalidRequestError, match="no quantities"):
        client.evaluate("square_map", X, quantities=())
