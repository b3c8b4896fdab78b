"""Products with J and H: whatever the arguments, layouts, dtypes, modes and batches."""

import math
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float, Inexact, Int

import jacserve
from jacserve import trees
from jacserve_server import Registry, serving

registry = Registry()
RANDOM = np.random.default_rng(7)
A, B, PICK = RANDOM.normal(size=(2, 3)), RANDOM.normal(size=3), np.array([2, 0])
X = RANDOM.uniform(0.5, 1.5, size=3)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@registry.function
def model(A: Float[Array, "m n"], b: Float[Array, "n"], pick: Int[Array, "k"]) -> dict:
    return {"zeta": jnp.sin(A) @ b, "alpha": [jnp.argmax(b), A * b, b[pick]]}


@registry.function
def energy(A: Float[Array, "m n"], b: Float[Array, "n"]) -> dict:
    return {"energy": jnp.sum(jnp.sin(A) @ b**3), "steps": jnp.arange(2)}


@registry.function
def rolled(x: Inexact[Array, "n"]) -> Inexact[Array, "n"]:
    return x**2 * jnp.roll(x, 1)


@registry.function
def cubes(x: Inexact[Array, "n"]) -> Inexact[Array, ""]:
    return jnp.sum(x**3 * jnp.roll(x, 1))


@registry.function
def product(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
    return x**2 * y


@registry.function
def pair(x: Float[Array, "n"], y: Float[Array, "n"]) -> tuple:
    return x**2, y**3


@registry.function(batchable=False)
def one_by_one(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x**2 * jnp.roll(x, 1)


def settle(x: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda y: jnp.sum(y) > 1.0, lambda y: y / 2.0, x)


@registry.function
def only_forward(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return settle(x) ** 2 * jnp.roll(x, 1)


@registry.function
def forward_energy(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(settle(x) ** 2 * x)


@jax.custom_vjp
def backward_exp(x: jax.Array) -> jax.Array:
    return jnp.exp(x)


backward_exp.defvjp(lambda x: (jnp.exp(x), x), lambda x, g: (jnp.exp(x) * g,))


@registry.function
def only_reverse(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return backward_exp(x) * jnp.roll(x, 1)


@registry.function
def reverse_energy(x: Float[Array, "n"]) -> Float[Array, ""]:
    return jnp.sum(backward_exp(x) * jnp.roll(x, 1))


@registry.function
def settled(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
    return settle(x) * backward_exp(y)


@registry.function
def phase(x: Float[Array, "n"]) -> Complex[Array, ""]:
    return jnp.sum(jnp.exp(1j * x) * x)


@registry.function
def with_empty(x: Float[Array, "n"], y: Float[Array, "2"]) -> dict:
    return {"none": jnp.sin(x), "double": 2.0 * y}


@registry.function
def weighted(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x**2 * jnp.linspace(1.0, 2.0, x.size)


@pytest.fixture(scope="module")
def client() -> Generator[jacserve.Client]:
    with serving(registry) as server, jacserve.Client(server.target) as connected:
        yield connected


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape)


def flat(tree: Any, ranks: list[int] | None = None) -> np.ndarray:
    """Joins the arrays of a tree along the last axis; each has its own rank."""
    leaves = [np.asarray(leaf) for _, leaf in trees.flatten(tree)]
    ranks = [leaf.ndim for leaf in leaves] if ranks is None else ranks
    return np.concatenate(
        [
            leaf.reshape(
                *leaf.shape[: leaf.ndim - rank],
                math.prod(leaf.shape[leaf.ndim - rank :]),
            )
            for leaf, rank in zip(leaves, ranks, strict=True)
        ],
        axis=-1,
    )


def both(
    client: jacserve.Client, name: str, inputs: Any, v: Any, u: Any, **options: Any
) -> jacserve.Result:
    return client.evaluate(
        name,
        inputs,
        quantities=("jvp", "vjp"),
        tangents=v,
        cotangents=u,
        **options,
    )


@pytest.mark.parametrize("wrt", ["A", "b", ["b", "A"], ["A", "b"], ()], ids=str)
def test_vectors_have_the_order_of_wrt(client: jacserve.Client, wrt: Any) -> None:
    jac = client.jacobian("model", (A, B, PICK), wrt=wrt)
    m, n = jac.shape
    v, u = normal(n), normal(m)
    result = both(client, "model", (A, B, PICK), v, u, wrt=wrt)
    np.testing.assert_allclose(result.jvp, jac @ v, rtol=1e-12)
    np.testing.assert_allclose(result.vjp, u @ jac, rtol=1e-12)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (4,)], ids=str)
def test_blocks_take_and_give_the_structure_of_arguments_and_results(
    client: jacserve.Client, leading: tuple[int, ...]
) -> None:
    v = {"b": normal(*leading, 3), "A": normal(*leading, 2, 3)}
    u = {
        "alpha": (None, normal(*leading, 2, 3), normal(*leading, 2)),
        "zeta": normal(*leading, 2),
    }
    result = both(client, "model", (A, B, PICK), v, u, layout="blocks")
    assert list(result.jvp) == ["zeta", "alpha"]
    assert result.jvp["alpha"][0] is None
    assert result.jvp["alpha"][1].shape == (*leading, 2, 3)
    assert list(result.vjp) == ["A", "b"]
    assert result.vjp["A"].shape == (*leading, 2, 3)
    jac = client.jacobian("model", (A, B, PICK))
    v_flat = flat((v["A"], v["b"]), [2, 1])
    u_flat = flat((u["zeta"], u["alpha"]), [1, 2, 1])
    np.testing.assert_allclose(
        flat(result.jvp, [1, 2, 1]), v_flat @ jac.T, rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(
        flat(result.vjp, [2, 1]), u_flat @ jac, rtol=1e-12, atol=1e-15
    )


def test_tangents_in_a_tuple_are_in_the_order_of_wrt(client: jacserve.Client) -> None:
    v = {"A": normal(2, 3), "b": normal(3)}
    options: Any = {"wrt": ["b", "A"], "layout": "blocks"}
    by_name = client.jvp("model", (A, B, PICK), v, **options)
    in_order = client.jvp("model", (A, B, PICK), (v["b"], v["A"]), **options)
    np.testing.assert_array_equal(flat(by_name), flat(in_order))
    alone = client.jvp("model", (A, B, PICK), v["b"], wrt="b", layout="blocks")
    expected = client.jvp("model", (A, B, PICK), v["b"], wrt="b")
    np.testing.assert_allclose(flat(alone), expected, rtol=1e-12)


def test_the_vjp_by_one_argument_is_one_array(client: jacserve.Client) -> None:
    u = {"zeta": normal(2), "alpha": (None, normal(2, 3), normal(2))}
    alone = client.vjp("model", (A, B, PICK), u, wrt="A", layout="blocks")
    all_of_them = client.vjp("model", (A, B, PICK), u, layout="blocks")
    np.testing.assert_allclose(alone, all_of_them["A"], rtol=1e-12)


@pytest.mark.parametrize("leading", [(), (3,), (3, 0), (3, 1), (3, 4)], ids=str)
def test_blocks_in_a_batch(client: jacserve.Client, leading: tuple[int, ...]) -> None:
    inputs = (normal(3, 2, 3), B, PICK)
    v = {"A": normal(*leading, 2, 3), "b": normal(*leading, 3)}
    u = {
        "zeta": normal(*leading, 2),
        "alpha": (None, normal(*leading, 2, 3), normal(*leading, 2)),
    }
    result = both(client, "model", inputs, v, u, layout="blocks")
    jac = client.jacobian("model", inputs)
    jac = jac[:, None] if len(leading) > 1 else jac
    v_flat, u_flat = flat(v, [2, 1]), flat(u, [1, 2, 1])
    jvp = np.einsum("...ij,...j->...i", jac, v_flat)
    vjp = np.einsum("...ij,...i->...j", jac, u_flat)
    np.testing.assert_allclose(flat(result.jvp, [1, 2, 1]), jvp, atol=1e-13)
    np.testing.assert_allclose(flat(result.vjp, [2, 1]), vjp, atol=1e-13)


def test_some_vectors_for_each_point_beside_shared_ones(
    client: jacserve.Client,
) -> None:
    inputs = (A, normal(5, 3), PICK)
    v = {"A": normal(5, 2, 3), "b": normal(3)}
    jvp = client.jvp("model", inputs, v, layout="blocks")
    together = np.hstack([v["A"].reshape(5, 6), np.tile(v["b"], (5, 1))])
    np.testing.assert_allclose(
        flat(jvp, [1, 2, 1]), client.jvp("model", inputs, together), rtol=1e-12
    )


def test_second_order_products_and_steps_in_blocks(client: jacserve.Client) -> None:
    quantities: Any = ("hessian", "hvp", "gradient", "newton_step")
    v = {"A": normal(4, 2, 3), "b": normal(4, 3)}
    result = client.evaluate(
        "energy", (A, B), quantities=quantities, tangents=v, layout="blocks"
    )
    flat_result = client.evaluate(
        "energy", (A, B), quantities=quantities, tangents=flat(v, [2, 1])
    )
    hessian = flat_result.hessian
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(flat_result.hvp, flat(v, [2, 1]) @ hessian, rtol=1e-12)
    np.testing.assert_allclose(flat(result.hvp, [2, 1]), flat_result.hvp, rtol=1e-12)
    blocks = result.hessian["energy"]
    assert blocks["A"]["b"].shape == (2, 3, 3)
    np.testing.assert_allclose(
        blocks["A"]["b"].reshape(6, 3), hessian[:6, 6:], rtol=1e-12
    )
    np.testing.assert_allclose(
        blocks["b"]["A"].reshape(3, 6), hessian[6:, :6], rtol=1e-12
    )
    for quantity in ("gradient", "newton_step"):
        assert list(result.quantities[quantity]) == ["A", "b"]
        np.testing.assert_allclose(
            flat(result.quantities[quantity]),
            flat_result.quantities[quantity],
            rtol=1e-12,
        )


def test_the_newton_step_of_several_arguments_solves_in_their_order(
    client: jacserve.Client,
) -> None:
    result = client.evaluate(
        "pair", (X, 2 * X), quantities=("value", "jacobian", "newton_step")
    )
    step = np.linalg.solve(result.jacobian, -flat(result.value))
    np.testing.assert_allclose(result.newton_step, step, rtol=1e-12)
    swapped = client.newton_step("pair", (X, 2 * X), wrt=["y", "x"])
    np.testing.assert_allclose(swapped, np.roll(step, 3), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_products_of_holomorphic_functions_conjugate_nothing(
    client: jacserve.Client, dtype: str
) -> None:
    z = (X + 1j * normal(3)).astype(dtype)
    v, u = ((normal(2, 3) + 1j * normal(2, 3)).astype(dtype) for _ in range(2))
    result = both(client, "rolled", z, v, u)
    jac = client.jacobian("rolled", z)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(result.jvp, v @ jac.T, rtol=100 * eps)
    np.testing.assert_allclose(result.vjp, u @ jac, rtol=100 * eps)
    curved = client.evaluate("cubes", z, quantities=("hessian", "hvp"), tangents=v)
    np.testing.assert_allclose(curved.hvp, v @ curved.hessian, rtol=100 * eps)
    assert {x.dtype.name for x in (result.jvp, result.vjp, curved.hvp)} == {dtype}


@pytest.mark.parametrize("leading", [(), (0,), (1,), (4,)], ids=str)
@pytest.mark.parametrize("points", [(), (3,)], ids=["point", "batch"])
@pytest.mark.parametrize(
    ("name", "mode"), [("only_forward", "forward"), ("only_reverse", "reverse")]
)
def test_a_function_of_one_mode_has_both_products(
    client: jacserve.Client, name: str, mode: str, points: Any, leading: Any
) -> None:
    x = RANDOM.uniform(0.5, 1.5, size=(*points, 3))
    v, u = normal(*points, *leading, 3), normal(*points, *leading, 3)
    result = both(client, name, x, v, u)
    assert result.modes == {"jvp": mode, "vjp": mode}
    assert result.mode == mode
    jac = client.jacobian(name, x)
    jac = np.expand_dims(jac, -3) if leading else jac
    np.testing.assert_allclose(
        result.jvp, np.einsum("...ij,...j->...i", jac, v), rtol=1e-12
    )
    np.testing.assert_allclose(
        result.vjp, np.einsum("...ij,...i->...j", jac, u), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "curvature"),
    [
        ("forward_energy", "forward_over_forward"),
        ("reverse_energy", "forward_over_reverse"),
        ("cubes", "forward_over_reverse"),
    ],
)
def test_second_order_products_of_a_function_of_one_mode(
    client: jacserve.Client, name: str, curvature: str
) -> None:
    v = normal(2, 3)
    result = client.evaluate(name, X, quantities=("hessian", "hvp"), tangents=v)
    assert result.modes == {"hessian": curvature, "hvp": curvature}
    assert result.mode == curvature
    np.testing.assert_allclose(result.hvp, v @ result.hessian, rtol=1e-12)
    alone = client.evaluate(name, X, quantities="hvp", tangents=v[0])
    assert (alone.mode, alone.modes) == (curvature, {"hvp": curvature})
    np.testing.assert_allclose(alone.hvp, result.hvp[0], rtol=1e-12)


def test_the_modes_of_products_are_those_of_the_arguments_asked_for(
    client: jacserve.Client,
) -> None:
    for wrt, mode in (("x", "forward"), ("y", "reverse")):
        result = both(client, "settled", (X, X), X, X, wrt=wrt)
        assert result.modes == {"jvp": mode, "vjp": mode}
        jac = client.jacobian("settled", (X, X), wrt=wrt)
        np.testing.assert_allclose(result.jvp, jac @ X, rtol=1e-12)
        np.testing.assert_allclose(result.vjp, X @ jac, rtol=1e-12)
    with pytest.raises(jacserve.InvalidRequestError, match="with respect to x, y") as e:
        both(client, "settled", (X, X), np.ones(6), X)
    assert e.value.reason == "MODE_UNSUPPORTED"


@pytest.mark.parametrize("mode", ["forward", "reverse", "sparse", "auto"])
@pytest.mark.parametrize("quantities", [("jvp", "vjp"), ("jvp", "vjp", "jacobian")])
def test_an_explicit_mode_is_that_of_the_products_too(
    client: jacserve.Client, mode: Any, quantities: Any
) -> None:
    v, u = normal(2, 3), normal(2, 3)
    result = client.evaluate(
        "rolled",
        X,
        quantities=quantities,
        mode=mode,
        layout="matrix",
        tangents=v,
        cotangents=u,
    )
    natural = {"jvp": "forward", "vjp": "reverse"}
    expected = natural if mode in {"sparse", "auto"} else dict.fromkeys(natural, mode)
    if "jacobian" in quantities:
        expected = {**expected, "jacobian": "forward" if mode == "auto" else mode}
    assert result.modes == expected
    jac = client.jacobian("rolled", X)
    np.testing.assert_allclose(result.jvp, v @ jac.T, rtol=1e-12)
    np.testing.assert_allclose(result.vjp, u @ jac, rtol=1e-12)


@pytest.mark.parametrize(
    ("quantities", "mode", "expected"),
    [
        (("value",), "auto", None),
        (("jvp",), "auto", "forward"),
        (("vjp",), "auto", "reverse"),
        (("hvp",), "auto", "forward_over_reverse"),
        (("jvp", "vjp"), "auto", None),
        (("gradient", "vjp"), "forward", "forward"),
        (("gradient", "hessian"), "auto", "reverse"),
        (("hessian", "hvp"), "auto", "forward_over_reverse"),
        (("jacobian", "hvp"), "sparse", "sparse"),
        (("jvp", "hvp"), "auto", None),
        (("jacobian", "jvp"), "auto", "reverse"),
        (("gradient", "jvp", "vjp", "hvp"), "auto", "reverse"),
        (("jacobian", "jvp", "vjp"), "sparse", "sparse"),
    ],
    ids=str,
)
def test_the_mode_of_a_result_is_that_which_made_j(
    client: jacserve.Client, quantities: Any, mode: Any, expected: str | None
) -> None:
    options: Any = {}
    if {"jvp", "hvp"} & set(quantities):
        options["tangents"] = X
    if "vjp" in quantities:
        options["cotangents"] = np.ones(1)
    result = client.evaluate("cubes", X, quantities=quantities, mode=mode, **options)
    assert set(result.modes) == set(quantities) - {"value"}
    assert result.mode == expected


@pytest.mark.parametrize("name", ["only_forward", "only_reverse"])
def test_a_mode_that_the_function_lacks_is_refused_for_products_too(
    client: jacserve.Client, name: str
) -> None:
    lacking: Any = {"only_forward": "reverse", "only_reverse": "forward"}[name]
    for product_of in (client.jvp, client.vjp):
        with pytest.raises(jacserve.InvalidRequestError, match=lacking) as caught:
            product_of(name, X, X, mode=lacking)
        assert (caught.value.reason, caught.value.field) == ("MODE_UNSUPPORTED", "mode")


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize(
    ("dtype", "eps"),
    [("float16", 2.0**-10), (BFLOAT16, 2.0**-7), ("float32", 2.0**-23)],
    ids=str,
)
def test_narrow_dtypes_stay_narrow(
    client: jacserve.Client, dtype: Any, eps: float, mode: Any
) -> None:
    x, v, u = (normal(3).astype(dtype) for _ in range(3))
    exact = x.astype("float64")
    jac = client.jacobian("rolled", exact)
    result = both(client, "rolled", x, v, u, mode=mode)
    assert (result.jvp.dtype, result.vjp.dtype) == (x.dtype, x.dtype)
    scale = np.abs(jac).max()
    np.testing.assert_allclose(
        result.jvp.astype("f8"), jac @ v.astype("f8"), atol=30 * eps * scale
    )
    np.testing.assert_allclose(
        result.vjp.astype("f8"), u.astype("f8") @ jac, atol=30 * eps * scale
    )
    curved = client.evaluate("cubes", x, quantities=("hessian", "hvp"), tangents=v)
    hessian = client.hessian("cubes", exact)
    assert (curved.hvp.dtype, curved.hessian.dtype) == (x.dtype, x.dtype)
    np.testing.assert_allclose(
        curved.hvp.astype("f8"),
        hessian @ v.astype("f8"),
        atol=30 * eps * np.abs(hessian).max(),
    )


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [("float16", 2.0**-10), (BFLOAT16, 2.0**-7), ("float32", 2.0**-23)],
    ids=str,
)
def test_what_is_computed_of_a_narrow_j(
    client: jacserve.Client, dtype: Any, eps: float
) -> None:
    quantities: Any = ("newton_step", "singular_values", "condition_number", "slogdet")
    x = X.astype(dtype)
    narrow = client.evaluate("rolled", x, quantities=quantities)
    exact = client.evaluate("rolled", x.astype("float64"), quantities=quantities)
    condition = float(exact.condition_number)
    for quantity in ("newton_step", "singular_values", "condition_number"):
        number = narrow.quantities[quantity]
        assert number.dtype == x.dtype
        expected = exact.quantities[quantity]
        np.testing.assert_allclose(
            number.astype("f8"), expected, rtol=30 * eps * condition
        )
    sign, log = narrow.slogdet
    assert (sign.dtype, log.dtype) == (x.dtype, x.dtype)
    assert sign == exact.slogdet[0]
    np.testing.assert_allclose(
        log.astype("f8"), exact.slogdet[1], atol=30 * eps * condition
    )


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_arguments_of_different_widths(client: jacserve.Client, mode: Any) -> None:
    x, y = X.astype("float32"), X + 1.0
    v, u = normal(6), normal(3)
    result = both(client, "product", (x, y), v, u, mode=mode)
    jac = np.hstack([np.diag(2 * x * y), np.diag(x.astype("f8") ** 2)])
    np.testing.assert_allclose(result.jvp, jac @ v, rtol=1e-6)
    np.testing.assert_allclose(result.vjp, u @ jac, rtol=1e-6)
    assert (result.jvp.dtype, result.vjp.dtype) == ("float64", "float64")
    blocks = both(
        client,
        "product",
        (x, y),
        (v[:3].astype("float32"), v[3:]),
        u,
        mode=mode,
        layout="blocks",
    )
    assert blocks.jvp.dtype == "float64"
    assert [b.dtype.name for b in blocks.vjp.values()] == ["float32", "float64"]
    np.testing.assert_allclose(blocks.jvp, result.jvp, rtol=1e-6)
    np.testing.assert_allclose(flat(blocks.vjp), result.vjp, rtol=1e-6)


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_results_of_different_widths(client: jacserve.Client, mode: Any) -> None:
    x, y = X.astype("float32"), X + 1.0
    v, u = normal(6), normal(6)
    result = both(client, "pair", (x, y), v, u, mode=mode)
    jac = np.diag(np.concatenate([2.0 * x, 3.0 * y**2]))
    np.testing.assert_allclose(result.jvp, jac @ v, rtol=1e-6)
    np.testing.assert_allclose(result.vjp, u @ jac, rtol=1e-6)
    blocks = both(
        client,
        "pair",
        (x, y),
        {"x": v[:3].astype("float32"), "y": v[3:]},
        (u[:3].astype("float32"), u[3:]),
        mode=mode,
        layout="blocks",
    )
    assert [b.dtype.name for b in blocks.jvp] == ["float32", "float64"]
    assert [b.dtype.name for b in blocks.vjp.values()] == ["float32", "float64"]
    np.testing.assert_allclose(flat(blocks.jvp), result.jvp, rtol=1e-6)
    np.testing.assert_allclose(flat(blocks.vjp), result.vjp, rtol=1e-6)


def test_both_sixteen_bit_dtypes_at_once(client: jacserve.Client) -> None:
    x, y = X.astype("float16"), X.astype(BFLOAT16)
    jac = client.jacobian("product", (x, y))
    assert jac.dtype == "float32"
    wide_x, wide_y = x.astype("f8"), y.astype("f8")
    expected = np.hstack([np.diag(2 * wide_x * wide_y), np.diag(wide_x**2)])
    np.testing.assert_allclose(jac, expected, rtol=0.05)
    v = normal(6).astype("float32")
    np.testing.assert_allclose(
        client.jvp("product", (x, y), v), expected @ v, rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("points", [0, 1, 2, 3, 5])
def test_batches_of_any_size(client: jacserve.Client, points: int) -> None:
    x = RANDOM.uniform(0.5, 1.5, size=(points, 3))
    v, u = normal(points, 2, 3), normal(3)
    result = client.evaluate(
        "rolled",
        x,
        quantities=(
            "jacobian",
            "jvp",
            "vjp",
            "newton_step",
            "singular_values",
            "condition_number",
            "slogdet",
        ),
        tangents=v,
        cotangents=u,
    )
    jac = result.jacobian
    assert jac.shape == (points, 3, 3)
    np.testing.assert_allclose(result.jvp, v @ jac.transpose(0, 2, 1), rtol=1e-12)
    np.testing.assert_allclose(result.vjp, u @ jac, rtol=1e-12)
    value = x**2 * np.roll(x, 1, axis=1)
    steps = np.linalg.solve(jac, -value[..., None])[..., 0]
    np.testing.assert_allclose(result.newton_step, steps, rtol=1e-10)
    np.testing.assert_allclose(
        result.singular_values, np.linalg.svd(jac, compute_uv=False), rtol=1e-10
    )
    np.testing.assert_allclose(result.condition_number, np.linalg.cond(jac), rtol=1e-9)
    assert result.slogdet[1].shape == (points,)


def test_an_empty_batch_of_second_derivatives(client: jacserve.Client) -> None:
    result = client.evaluate(
        "cubes",
        np.ones((0, 3)),
        quantities=("hessian", "hvp", "gradient"),
        tangents=np.ones((0, 2, 3)),
    )
    assert result.hessian.shape == (0, 3, 3)
    assert result.hvp.shape == (0, 2, 3)
    assert result.gradient.shape == (0, 3)
    assert result.finite


def test_arguments_without_numbers(client: jacserve.Client) -> None:
    none, y = np.ones(0), np.array([1.0, 3.0])
    options: Any = {
        "quantities": ("jacobian", "jvp", "vjp", "newton_step", "singular_values")
    }
    result = client.evaluate(
        "with_empty", (none, y), tangents=y, cotangents=y, **options
    )
    np.testing.assert_array_equal(result.jacobian, 2 * np.eye(2))
    np.testing.assert_array_equal(result.jvp, 2 * y)
    np.testing.assert_array_equal(result.vjp, 2 * y)
    np.testing.assert_array_equal(result.newton_step, -y)
    np.testing.assert_array_equal(result.singular_values, [2.0, 2.0])
    nothing = client.evaluate(
        "with_empty", (none, y), wrt="x", tangents=none, cotangents=y, **options
    )
    assert nothing.jacobian.shape == (2, 0)
    np.testing.assert_array_equal(nothing.jvp, np.zeros(2))
    assert nothing.vjp.shape == (0,)
    assert nothing.newton_step.shape == (0,)
    assert nothing.singular_values.shape == (0,)
    blocks = client.vjp(
        "with_empty", (none, y), {"none": none, "double": y}, layout="blocks"
    )
    assert blocks["x"].shape == (0,)
    np.testing.assert_array_equal(blocks["y"], 2 * y)


@pytest.mark.parametrize("k", [(), (2,)], ids=str)
@pytest.mark.parametrize("points", [0, 3])
def test_rows_that_may_not_be_vmapped(
    client: jacserve.Client, points: int, k: tuple[int, ...]
) -> None:
    x = RANDOM.uniform(0.5, 1.5, size=(points, 3))
    v, u = normal(points, *k, 3), normal(3)
    quantities: Any = ("jacobian", "jvp", "vjp", "newton_step", "singular_values")
    rows, together = (
        client.evaluate(name, x, quantities=quantities, tangents=v, cotangents=u)
        for name in ("one_by_one", "rolled")
    )
    for quantity in quantities:
        found = rows.quantities[quantity]
        np.testing.assert_allclose(found, together.quantities[quantity], rtol=1e-12)


def test_cast_converts_inputs_and_tangents(client: jacserve.Client) -> None:
    jvp = client.jvp("rolled", [1, 2, 3], [1, 0, 0], wrt="x", cast=True)
    assert jvp.dtype == "float64"
    narrow = client.jvp("rolled", X.astype("float32"), [1.0, 0.0, 0.0], cast=True)
    assert narrow.dtype == "float32"
    blocks = client.jvp(
        "product", (X.astype("float32"), X), ([1, 0, 0], [0, 1, 0]), cast=True,
        layout="blocks",
    )  # fmt: skip
    np.testing.assert_allclose(blocks, [2 * X[0] ** 2, X[1] ** 2, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_cast_converts_cotangents(client: jacserve.Client, dtype: str) -> None:
    x = X.astype("float32")
    u = np.array([1, 0, 2], dtype)
    vjp = client.vjp("rolled", x, u, cast=True)
    assert vjp.dtype == "float32"
    np.testing.assert_allclose(vjp, u @ client.jacobian("rolled", x), rtol=1e-5)


def test_whole_numbers_are_cast_to_the_dtype_of_the_result(
    client: jacserve.Client,
) -> None:
    x = X.astype("float32")
    vjp = client.vjp("rolled", x, [1, 0, 2], cast=True)
    assert vjp.dtype == "float32"
    np.testing.assert_allclose(vjp, [1, 0, 2] @ client.jacobian("rolled", x), rtol=1e-5)


def test_the_hvp_of_a_real_function_with_a_complex_result(
    client: jacserve.Client,
) -> None:
    hessian = client.hessian("phase", X)
    assert hessian.dtype == "complex128"
    np.testing.assert_allclose(client.hvp("phase", X, X), hessian @ X, rtol=1e-12)


def test_a_cotangent_does_not_change_the_dtype_of_the_value(
    client: jacserve.Client,
) -> None:
    x = X.astype("float32")
    assert client.value("weighted", x).dtype == "float32"
    with pytest.raises(jacserve.InvalidRequestError, match="float64") as caught:
        client.vjp("weighted", x, np.ones(3))
    assert caught.value.reason == "DTYPE_MISMATCH"


def test_a_hessian_is_made_in_chunks_beside_a_gradient_too(
    client: jacserve.Client,
) -> None:
    x = np.linspace(0.5, 1.5, 600)
    alone = client.evaluate("cubes", x, quantities="hessian")
    beside = client.evaluate("cubes", x, quantities=("gradient", "hessian"))
    assert alone.chunk_size is not None
    assert beside.chunk_size == alone.chunk_size
