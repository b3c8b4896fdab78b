"""Every quantity against what numpy makes of J, for the whole zoo.

All that a function has comes from one program, and each dtype and each mode is asked
for at a point or in a batch in turn, because compiling is what takes time. Tolerances
are those of `test_agreement`; what is computed of J errs by J's own error times the
condition of the problem.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

import jacserve
from jacserve import trees
from jacserve.vocabulary import QUANTITIES
from test_agreement import WIDE, assert_close, sample, tolerance
from zoo import ZOO, Animal

ROWS = 2
SQUARE = {"determinant", "abs_determinant", "slogdet"}
SCALAR = {"gradient", "hessian", "hvp"}
BY_MODE = {"value", "jacobian", "gradient", "jvp", "vjp"}
Inputs = tuple[np.ndarray, ...]


def flat_function(animal: Animal) -> Callable[..., list[jax.Array]]:
    return lambda *xs: [leaf for _, leaf in trees.flatten(animal.function(*xs))]


def local(compute: Callable[..., Any], point: Inputs) -> Any:
    with jax.enable_x64(any(x.dtype.name in WIDE for x in point)):
        return compute(*point)


def results(animal: Animal, point: Inputs) -> list[jax.ShapeDtypeStruct]:
    return local(lambda *xs: jax.eval_shape(flat_function(animal), *xs), point)


def places(point: Inputs) -> list[int]:
    return [place for place, x in enumerate(point) if x.dtype.kind in "fc"]


@cache
def shape(animal: Animal) -> tuple[int, int]:
    point = sample(animal, animal.dtypes[0])[0]
    m = sum(leaf.size for leaf in results(animal, point))
    return m, sum(point[place].size for place in places(point))


def quantities_of(animal: Animal, mode: str) -> list[str]:
    m, n = shape(animal)
    missing = (SQUARE if m != n else set()) | (SCALAR if m != 1 else set())
    if mode != animal.modes[0]:
        missing |= set(QUANTITIES) - BY_MODE
    if animal.name == "spectrum":
        missing |= {"vjp"}  # Has a test of its own.
    return [quantity for quantity in QUANTITIES if quantity not in missing]


def vectors(length: int, dtype: Any) -> np.ndarray:
    """One of ones, the others at random."""
    random = np.random.default_rng(length)
    numbers = random.uniform(-1, 1, size=(ROWS, length)) + 0j
    if np.dtype(dtype).kind == "c":
        numbers += 1j * random.uniform(-1, 1, size=(ROWS, length))
    numbers[0] = 1.0
    return (numbers if np.dtype(dtype).kind == "c" else numbers.real).astype(dtype)


def vectors_for(animal: Animal, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    m, n = shape(animal)
    leaves = results(animal, sample(animal, dtype)[0])
    return vectors(n, dtype), vectors(m, np.result_type(*(x.dtype for x in leaves)))


def evaluate(
    client: jacserve.Client, animal: Animal, mode: Any, inputs: Inputs, v: Any, u: Any
) -> jacserve.Result:
    quantities: Any = quantities_of(animal, mode)
    options: Any = {"cotangents": u} if "vjp" in quantities else {}
    return client.evaluate(
        animal.name, inputs, quantities=quantities, mode=mode, tangents=v, **options
    )


@dataclass(frozen=True)
class Row:
    """What was answered at one point, and the vectors of its products."""

    quantities: dict[str, Any]
    tangents: np.ndarray
    cotangents: np.ndarray

    @property
    def jacobian(self) -> np.ndarray:
        return wide(self.quantities["jacobian"])

    @property
    def hessian(self) -> np.ndarray:
        return wide(self.quantities["hessian"])

    @property
    def value(self) -> np.ndarray:
        leaves = [leaf for _, leaf in trees.flatten(self.quantities["value"])]
        return np.concatenate([wide(leaf).ravel() for leaf in leaves])

    def dtype(self, quantity: str) -> np.dtype:
        found = self.quantities[quantity]
        return (found[0] if quantity == "slogdet" else found).dtype

    def expected_dtype(self, quantity: str) -> np.dtype:
        dtype = self.quantities["jacobian"].dtype
        return np.finfo(dtype).dtype if quantity in REAL else dtype


def wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.result_type(array, "float64"))


@cache
def single_row(
    client: jacserve.Client, animal: Animal, mode: str, dtype: str, place: int
) -> Row:
    """At one point, with all the vectors."""
    point, (v, u) = sample(animal, dtype)[place], vectors_for(animal, dtype)
    result = evaluate(client, animal, mode, point, v, u)
    assert result.modes["jacobian"] == mode
    return Row(dict(result.quantities), v, u)


@cache
def batch_rows(
    client: jacserve.Client, animal: Animal, mode: str, dtype: str
) -> list[Row]:
    """At every point, each with a vector of its own."""
    points, (v, u) = sample(animal, dtype)[:ROWS], vectors_for(animal, dtype)
    result = evaluate(client, animal, mode, stacked(points), v, u)
    assert result.modes["jacobian"] == mode
    return [
        Row(
            {
                name: trees.unflatten(
                    (path, leaf[place]) for path, leaf in trees.flatten(tree)
                )
                for name, tree in result.quantities.items()
            },
            v[place],
            u[place],
        )
        for place in range(ROWS)
    ]


def stacked(points: list[Inputs]) -> Inputs:
    return tuple(map(np.stack, zip(*points, strict=True)))


def newton_step(row: Row, eps: float) -> np.ndarray:
    jac, (m, n) = row.jacobian, row.jacobian.shape
    if m != n:
        return np.linalg.lstsq(jac, -row.value, rcond=max(m, n) * eps)[0]
    if np.linalg.cond(jac) > 1 / eps:
        return np.full(n, np.nan)
    return np.linalg.solve(jac, -row.value)


EXPECTED: dict[str, Callable[[Row, float], Any]] = {
    "jvp": lambda row, _: row.tangents @ row.jacobian.T,
    "vjp": lambda row, _: row.cotangents @ row.jacobian,
    "gradient": lambda row, _: row.jacobian[0],
    "hessian": lambda row, _: row.hessian.T,
    "hvp": lambda row, _: row.tangents @ row.hessian,
    "determinant": lambda row, _: np.linalg.det(row.jacobian),
    "abs_determinant": lambda row, _: np.abs(np.linalg.det(row.jacobian)),
    "slogdet": lambda row, _: np.linalg.slogdet(row.jacobian),
    "newton_step": newton_step,
    "singular_values": lambda row, _: np.linalg.svd(row.jacobian, compute_uv=False),
    "condition_number": lambda row, _: np.linalg.cond(row.jacobian),
}
REAL = {"abs_determinant", "singular_values", "condition_number"}


def assert_within(actual: Any, expected: Any, bound: float) -> None:
    assert np.shape(actual) == np.shape(expected)
    is_finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(actual), is_finite)
    difference = np.where(is_finite, wide(actual), 0) - np.where(is_finite, expected, 0)
    worst = np.max(np.abs(difference), initial=0.0)
    assert worst <= bound, f"off by {worst:.2e}, allowed {bound:.2e}"


def assert_agrees(
    quantity: str, actual: Any, expected: Any, jac: np.ndarray, relative: float
) -> None:
    """Compares as closely as a J that errs by `relative` determines a quantity."""
    values = np.linalg.svd(jac, compute_uv=False)
    kept = values[values > relative * values[0]]
    condition = float(values[0] / kept[-1]) if len(kept) else 1.0
    has_full_rank = len(kept) == len(values)
    largest = max(1.0, float(np.max(np.abs(np.nan_to_num(expected, posinf=1.0)))))
    if quantity in SQUARE:
        if quantity == "slogdet":
            actual, expected = (
                wide(sign) * np.exp(wide(log)) for sign, log in (actual, expected)
            )
        hadamard = float(np.prod(np.linalg.norm(jac, axis=1)))
        assert_within(actual, expected, relative * hadamard)
    elif quantity in {"hessian", "hvp"}:
        assert_within(actual, expected, relative * largest)
    elif quantity == "condition_number":
        if has_full_rank:
            assert_within(actual, expected, relative * condition * largest)
        else:
            assert actual > 0.1 / relative
    elif quantity == "newton_step":
        if has_full_rank or jac.shape[0] != jac.shape[1] or np.isnan(expected).all():
            power = 1 if jac.shape[0] == jac.shape[1] else 2
            assert_within(actual, expected, relative * condition**power * largest)
    else:
        assert_within(actual, expected, relative * max(1.0, float(values[0])))


def in_turn(animal: Animal, mode: str, dtype: str) -> int:
    return animal.modes.index(mode) + animal.dtypes.index(dtype)


CASES = [
    pytest.param(
        animal,
        mode,
        dtype,
        quantity,
        id=f"{animal.name}-{mode}-{dtype}-{quantity}",
        # The others have each mode and each dtype of each animal once, for one
        # quantity in three.
        marks=[pytest.mark.slow]
        if in_turn(animal, mode, dtype) % 2 or (place + number) % 3
        else [],
    )
    for number, animal in enumerate(ZOO)
    for mode in animal.modes
    for dtype in animal.dtypes
    for place, quantity in enumerate(quantities_of(animal, mode))
]


@pytest.mark.parametrize(("animal", "mode", "dtype", "quantity"), CASES)
def test_a_quantity_is_what_numpy_makes_of_j(
    client: jacserve.Client, animal: Animal, mode: str, dtype: str, quantity: str
) -> None:
    relative, eps = tolerance(animal, dtype), float(np.finfo(dtype).eps)
    if in_turn(animal, mode, dtype) % 2:
        rows = batch_rows(client, animal, mode, dtype)
    else:
        rows = [single_row(client, animal, mode, dtype, 0)]
    for place, row in enumerate(rows):
        actual, point = row.quantities[quantity], sample(animal, dtype)[place]
        if quantity == "value":
            assert_same_trees(actual, client.value(animal.name, point), relative)
        elif quantity == "jacobian":
            assert actual.shape == shape(animal)
        else:
            expected = EXPECTED[quantity](row, eps)
            assert_agrees(quantity, actual, expected, row.jacobian, relative)
            assert row.dtype(quantity) == row.expected_dtype(quantity)


def assert_same_trees(actual: Any, expected: Any, relative: float) -> None:
    pairs = zip(trees.flatten(actual), trees.flatten(expected), strict=True)
    for (path, leaf), (other, array) in pairs:
        assert (path, leaf.dtype) == (other, array.dtype)
        assert_close(leaf, array, relative)


@pytest.mark.parametrize(
    "name", ["spherical", "pendulum", "kepler", "complex_square", "heron_root"]
)
def test_a_batch_is_a_stack_of_points_in_every_quantity(
    client: jacserve.Client, name: str
) -> None:
    animal = named(name)
    mode, dtype = animal.modes[0], animal.dtypes[-1]
    relative = tolerance(animal, dtype)
    for place, row in enumerate(batch_rows(client, animal, mode, dtype)):
        single = single_row(client, animal, mode, dtype, place)
        assert_same_trees(row.quantities["value"], single.quantities["value"], relative)
        for quantity in quantities_of(animal, mode):
            if quantity != "value":
                actual, expected = row.quantities[quantity], single.quantities[quantity]
                if quantity in {"jvp", "vjp", "hvp"}:
                    expected = expected[place]
                assert_agrees(quantity, actual, expected, single.jacobian, relative)


def named(name: str) -> Animal:
    return next(animal for animal in ZOO if animal.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "rosenbrock", "logsumexp", "kepler", "spherical", "bilinear", "robot_arm",
        "pendulum", "special", "gram", "gather", "inverse", "heron_root",
        "with_custom_vjp", "complex_wave", "spectrum",
    ],
)  # fmt: skip
def test_second_derivatives_are_those_of_jax(
    client: jacserve.Client, name: str
) -> None:
    animal = named(name)
    dtype = animal.dtypes[-1]
    point = sample(animal, dtype)[0]
    wrt = places(point)
    differentiate = jax.jacrev if "reverse" in animal.modes else jax.jacfwd
    options: dict[str, Any] = {"argnums": wrt, "holomorphic": dtype == "complex128"}
    second = jax.jacfwd(differentiate(flat_function(animal), **options), **options)
    expected = jax.tree.leaves(local(jax.jit(second), point))
    blocks = client.hessian(animal.name, point, layout="blocks")
    actual = [leaf for _, leaf in trees.flatten(blocks)]
    for block, array in zip(actual, expected, strict=True):
        assert block.dtype == array.dtype
        assert_close(block, np.asarray(array), tolerance(animal, dtype))


@pytest.mark.parametrize("is_batch", [False, True], ids=["point", "batch"])
@pytest.mark.parametrize("name", ["bilinear", "rosenbrock", "complex_wave"])
def test_one_vector_for_all_one_for_each_and_several_at_once(
    client: jacserve.Client, name: str, is_batch: bool
) -> None:
    animal = named(name)
    dtype = animal.dtypes[-1]
    points = stacked(sample(animal, dtype)[:ROWS])
    inputs = points if is_batch else tuple(x[0] for x in points)
    m, n = shape(animal)
    curved = ("hessian", "hvp") if m == 1 else ()
    random = np.random.default_rng(0)
    for leading in [(), (ROWS,), (ROWS, 3)] if is_batch else [(), (3,)]:
        v, u = (random.normal(size=(*leading, size)).astype(dtype) for size in (n, m))
        result = client.evaluate(
            name,
            inputs,
            quantities=("jacobian", "jvp", "vjp", *curved),
            tangents=v,
            cotangents=u,
        )
        place = -3 if len(leading) > is_batch else 0
        jac = np.expand_dims(result.jacobian, place) if place else result.jacobian
        relative = tolerance(animal, dtype)
        assert_close(result.jvp, np.einsum("...ij,...j->...i", jac, v), relative)
        assert_close(result.vjp, np.einsum("...ij,...i->...j", jac, u), relative)
        if curved:
            hessian = result.hessian
            hessian = np.expand_dims(hessian, place) if place else hessian
            expected = np.einsum("...ij,...j->...i", hessian, v)
            assert_close(result.hvp, expected, relative)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("spherical", "elementwise"),
        ("linear_tall", "softmax"),
        ("burgers", "logsumexp"),
        ("complex_wave", "complex_square"),
        ("heron_root", "with_custom_vjp"),
    ],
)
def test_the_chain_rule(client: jacserve.Client, inner: str, outer: str) -> None:
    first, second = named(inner), named(outer)
    dtype = first.dtypes[-1]
    relative = tolerance(first, dtype) * second.growth
    (x,) = sample(first, dtype)[0]
    y, inner_jac = client.value_and_jacobian(inner, x)
    value, outer_jac = client.value_and_jacobian(outer, y)
    v, u = (vectors(size, dtype)[1] for size in (x.size, value.size))
    along = client.jvp(outer, y, client.jvp(inner, x, v))
    back = client.vjp(inner, x, client.vjp(outer, y, u))
    np.testing.assert_array_equal(value, client.value(outer, client.value(inner, x)))
    h = float(np.finfo(dtype).eps) ** (1 / 3)
    ends = [
        client.value(outer, client.value(inner, x + sign * h * v)) for sign in (1, -1)
    ]
    difference = (np.asarray(ends[0]) - ends[1]) / (2 * h)
    assert_close(along, np.atleast_1d(difference), 100 * h**2)
    assert_close(along, outer_jac @ (inner_jac @ v), relative)
    assert_close(back, u @ outer_jac @ inner_jac, relative)
    assert_close(u @ along, back @ v, relative)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_vjp_of_a_real_function_with_complex_results_is_complex(
    client: jacserve.Client, dtype: str
) -> None:
    (x,) = sample(named("spectrum"), dtype)[0]
    jac = client.jacobian("spectrum", x)
    u = vectors(3, jac.dtype)
    vjp = client.vjp("spectrum", x, u)
    assert vjp.dtype == jac.dtype
    assert_close(vjp, u @ jac, 100 * float(np.finfo(dtype).eps))
