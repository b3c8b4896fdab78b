"""Arrays arrive as they were sent, whatever their dtype, strides and byte order."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array, Float, Inexact, Int, Num, Shaped

import jacserve
from jacserve_server import Registry, serving

registry = Registry()
DTYPES = [
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
]


@registry.function
def identity(x: Shaped[Array, "m n"]) -> Shaped[Array, "m n"]:
    return x


@registry.function
def scalar(x: Shaped[Array, ""]) -> Shaped[Array, ""]:
    return x


@registry.function
def square(x: Inexact[Array, "n"]) -> Inexact[Array, "n"]:
    return x * x


@registry.function
def shaped(x: Shaped[Array, "n"]) -> Shaped[Array, "n"]:
    return x


@registry.function
def labels(i: Int[Array, "n"]) -> Int[Array, "n"]:
    return i


@registry.function
def large_sum(x: Float[Array, "n"]) -> Float[Array, ""]:
    return 1e6 * x.astype(jnp.float32).sum()


@registry.function
def mixed(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
    return x * y


@registry.function
def with_constants(x: Num[Array, "n"]) -> Num[Array, "n"]:
    return x * jnp.linspace(0.0, 1.0, x.size) + 0.1


@pytest.fixture(scope="module")
def client():
    with serving(registry) as server, jacserve.Client(server.target) as connected:
        yield connected


def numbers(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(3)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    if kind.kind == "b":
        return random.integers(0, 2, size=shape).astype(kind)
    if kind.kind in "iu":
        info = np.iinfo(dtype)
        return random.integers(info.min, info.max, size=shape, dtype=kind)
    real = random.normal(size=shape)
    imaginary = 1j * random.normal(size=shape) if kind.kind == "c" else 0.0
    return (real + imaginary).astype(kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_makes_the_round_trip_bit_by_bit(
    client: jacserve.Client, dtype: str
) -> None:
    x = numbers(dtype, (2, 3))
    y = client.value("identity", x)
    assert y.dtype == x.dtype
    assert y.tobytes() == x.tobytes()


VIEWS = {
    "Fortran order": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "sliced": lambda x: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "nested lists": lambda x: x.tolist(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_and_byte_order_do_not_matter(
    client: jacserve.Client, view: str
) -> None:
    x = VIEWS[view](numbers("float64", (4, 3)))
    y = client.value("identity", x)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_arrays(client: jacserve.Client, shape: tuple[int, int]) -> None:
    value, jac = client.value_and_jacobian("identity", np.zeros(shape))
    assert value.shape == shape
    assert jac.shape == (0, 0)


def test_zero_dimensional_arrays(client: jacserve.Client) -> None:
    for x in (2.5, np.float64(2.5), np.array(2.5)):
        value, jac = client.value_and_jacobian("scalar", x)
        assert value.shape == ()
        assert value == 2.5
        np.testing.assert_array_equal(jac, [[1.0]])


def test_an_empty_batch(client: jacserve.Client) -> None:
    result = client.evaluate("square", np.zeros((0, 4)), quantities=("jacobian",))
    assert result.jacobian.shape == (0, 4, 4)
    assert result.finite


def test_a_batch_of_scalars(client: jacserve.Client) -> None:
    result = client.evaluate("scalar", np.arange(3.0))
    np.testing.assert_array_equal(result.value, [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(result.jacobian, np.ones((3, 1, 1)))


@pytest.mark.parametrize("dtype", DTYPES[-6:])
@pytest.mark.parametrize("quantity", ["value", "jacobian", "determinant"])
def test_derivatives_have_the_dtype_of_the_input(
    client: jacserve.Client, dtype: str, quantity: jacserve.Quantity
) -> None:
    x = numbers(dtype, (5,))
    result = client.evaluate("square", x, quantities=quantity)
    assert result.quantities[quantity].dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES[-6:])
def test_log_and_magnitude_of_a_determinant_are_real(
    client: jacserve.Client, dtype: str
) -> None:
    x = numbers(dtype, (5,))
    result = client.evaluate("square", x, quantities=("slogdet", "abs_determinant"))
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
    sign, log = result.slogdet
    assert sign.dtype == x.dtype
    assert log.dtype.name == result.abs_determinant.dtype.name == real


def test_float32_and_float64_keep_their_own_precision_side_by_side(
    client: jacserve.Client,
) -> None:
    x = np.array([0.1, 0.2, 0.3])
    wide, narrow = (client.value("with_constants", x.astype(t)) for t in "df")
    assert (wide.dtype, narrow.dtype) == (np.float64, np.float32)
    np.testing.assert_array_equal(wide, x * np.linspace(0, 1, 3) + 0.1)
    assert 0 < np.abs(narrow - wide).max() < 1e-7


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_mixed_dtypes_give_the_wider_derivative_in_either_mode(
    client: jacserve.Client, mode: jacserve.ModeOption
) -> None:
    x, y = np.array([1.5, 2.5], "f"), np.array([0.1, 0.2])
    result = client.evaluate("mixed", (x, y), mode=mode)
    assert result.value.dtype == result.jacobian.dtype == np.float64
    np.testing.assert_allclose(
        result.jacobian, np.hstack([np.diag(y), np.diag(x)]), rtol=1e-7
    )
    assert client.jacobian("mixed", (x, y), wrt="x", mode=mode).dtype == np.float64


def test_cast_converts_to_the_widest_dtype_and_only_on_request(
    client: jacserve.Client,
) -> None:
    with pytest.raises(jacserve.InvalidRequestError, match="int64"):
        client.jacobian("mixed", ([1, 2], [3, 4]))
    jac = client.jacobian("mixed", ([1, 2], [3, 4]), cast=True)
    assert jac.dtype == np.float64
    np.testing.assert_array_equal(jac, [[3, 0, 1, 0], [0, 4, 0, 2]])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([True, False]), "bool"),
        (np.array([3], np.uint8), "uint8"),
        (np.array([3]), "int64"),
    ],
)
def test_cast_is_not_needed_where_all_dtypes_are_taken(
    client: jacserve.Client, array: np.ndarray, expected: str
) -> None:
    assert client.value("shaped", array, cast=True).dtype == expected


def test_cast_takes_the_nearest_kind_and_loses_nothing(
    client: jacserve.Client,
) -> None:
    assert client.value("square", [3, 4], cast=True).dtype == np.float64
    assert client.value("labels", np.array([3], np.uint64), cast=True).dtype == np.int64
    for array, words in (
        (np.array([2**64 - 1], np.uint64), "does not fit into int64"),
        (np.array([1.0]), "can't hold"),
        (np.array([1j]), "can't hold"),
    ):
        with pytest.raises(jacserve.InvalidRequestError, match=words):
            client.value("labels", array, cast=True)


def test_auto_does_not_lose_precision_to_a_narrow_argument(
    client: jacserve.Client,
) -> None:
    jac = client.jacobian("large_sum", np.ones(2, np.float16))
    np.testing.assert_array_equal(jac, np.full((1, 2), 1e6, np.float32))


def test_results_are_the_callers_own_to_change(client: jacserve.Client) -> None:
    jac = client.jacobian("square", np.ones(2))
    jac[0, 0] = 7.0
    assert client.jacobian("square", np.ones(2))[0, 0] == 2.0
