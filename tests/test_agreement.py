"""Jacobians over the wire against closed forms, in-process JAX and differences.

Tolerances follow from the machine epsilon of the dtype alone. A result that took a
few dozen roundings errs by some 100 eps of its largest entry; a central difference
with the step eps^(1/3) by some 100 eps^(2/3). A function's `growth` multiplies both
where it multiplies errors itself.
"""

import jax
import numpy as np
import pytest

import jacserve
import zoo
from jacserve import trees
from zoo import ZOO, Animal

POINTS = 3
WIDE = {"float64", "complex128", "int64"}
CASES = [
    pytest.param(
        animal,
        mode,
        dtype,
        id=f"{animal.name}-{mode}-{dtype}",
        # The others have each mode and each dtype of each animal once.
        marks=[pytest.mark.slow]
        if (animal.modes.index(mode) + animal.dtypes.index(dtype)) % 2
        else [],
    )
    for animal in ZOO
    for mode in animal.modes
    for dtype in animal.dtypes
]


def tolerance(animal: Animal, dtype: str) -> float:
    return 100 * animal.growth * float(np.finfo(dtype).eps)


def assert_close(actual, expected, relative: float) -> None:
    assert np.shape(actual) == np.shape(expected)
    scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    error = float(np.max(np.abs(np.asarray(actual) - expected), initial=0.0))
    assert error <= relative * scale, f"off by {error:.2e}, scale {scale:.2e}"


def sample(animal: Animal, dtype: str, seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    """Points that are exact in the dtype; integers stay integers."""
    random = np.random.default_rng(seed)
    return [
        tuple(
            array if np.asarray(array).dtype.kind in "iu" else np.asarray(array, dtype)
            for array in animal.sample(random)
        )
        for _ in range(POINTS)
    ]


def local_jacobian(animal: Animal, mode: str, point) -> np.ndarray:
    """J of in-process JAX, assembled by hand from its own blocks."""
    wrt = [place for place, x in enumerate(point) if x.dtype.kind in "fc"]
    differentiate = jax.jacfwd if mode == "forward" else jax.jacrev
    with jax.enable_x64(any(x.dtype.name in WIDE for x in point)):
        jac = jax.jit(
            differentiate(
                lambda *args: [
                    leaf for _, leaf in trees.flatten(animal.function(*args))
                ],
                argnums=wrt,
                holomorphic=bool(point[0].dtype.kind == "c"),
            )
        )(*point)
    return np.vstack(
        [
            np.hstack(
                [
                    np.reshape(block, (-1, point[place].size))
                    for place, block in zip(wrt, row, strict=True)
                ]
            )
            for row in jac
        ]
    )


@pytest.mark.parametrize(("animal", "mode", "dtype"), CASES)
def test_the_jacobian_agrees(
    client: jacserve.Client, animal: Animal, mode: jacserve.ModeOption, dtype: str
) -> None:
    points = sample(animal, dtype)
    relative = tolerance(animal, dtype)
    singles = [client.evaluate(animal.name, point, mode=mode) for point in points]
    batch = client.evaluate(
        animal.name, tuple(map(np.stack, zip(*points, strict=True))), mode=mode
    )
    assert batch.mode == mode
    is_complex = animal.name == "spectrum" or np.dtype(dtype).kind == "c"
    assert batch.jacobian.dtype == (
        np.result_type(dtype, "complex64") if is_complex else dtype
    )
    for row, (point, single) in enumerate(zip(points, singles, strict=True)):
        if animal.jacobian is not None:
            wide = [x if x.dtype.kind in "iu" else x * 1.0 for x in map(upcast, point)]
            assert_close(single.jacobian, animal.jacobian(*wide), relative)
        assert_close(single.jacobian, local_jacobian(animal, mode, point), relative)
        assert_close(batch.jacobian[row], single.jacobian, relative)
        assert single.jacobian.dtype == batch.jacobian.dtype
        local = dict(trees.flatten(local_value(animal, point)))
        served = dict(trees.flatten(single.value))
        assert served.keys() == local.keys()
        for path, leaf in served.items():
            assert leaf.dtype == local[path].dtype
            assert_close(leaf, np.asarray(local[path]), relative)
        pairs = zip(
            trees.flatten(batch.value), trees.flatten(single.value), strict=True
        )
        for (path, rows), (other, leaf) in pairs:
            assert path == other
            assert_close(rows[row], leaf, relative)


def local_value(animal: Animal, point):
    with jax.enable_x64(any(x.dtype.name in WIDE for x in point)):
        return jax.jit(animal.function)(*point)


def upcast(x: np.ndarray) -> np.ndarray:
    return x.astype({"f": "float64", "c": "complex128"}.get(x.dtype.kind, x.dtype))


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_the_jacobian_is_the_limit_of_differences(
    client: jacserve.Client, animal: Animal
) -> None:
    dtype = animal.dtypes[-1]
    point = sample(animal, dtype)[0]
    eps = float(np.finfo(dtype).eps)
    jac = client.jacobian(animal.name, point)
    columns = []
    for place, x in enumerate(point):
        if x.dtype.kind in "iu":
            continue
        h = eps ** (1 / 3)
        steps = h * np.eye(x.size).reshape(x.size, *x.shape)
        moved = [
            tuple(x + sign * steps if at == place else y for at, y in enumerate(point))
            for sign in (1, -1)
        ]
        up, down = (flat_values(client, animal, inputs, x.size) for inputs in moved)
        columns.append(((up - down) / (2 * h)).T)
    relative = 100 * animal.growth * eps ** (2 / 3)
    assert_close(np.hstack(columns), jac, relative)


def flat_values(client, animal, inputs, rows: int) -> np.ndarray:
    leaves = trees.flatten(client.value(animal.name, inputs))
    return np.hstack([leaf.reshape(rows, -1) for _, leaf in leaves])


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_the_published_modes_are_those_that_exist(
    client: jacserve.Client, animal: Animal
) -> None:
    info = client.describe(animal.name)
    assert info.modes == animal.modes
    assert set(info.missing_modes) == {"forward", "reverse"} - set(animal.modes)


def test_the_zoo_is_large_enough() -> None:
    assert len(ZOO) >= 25


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["elementwise", "spherical", "softmax", "burgers"])
def test_sixteen_bit_dtypes(client: jacserve.Client, name: str, dtype: str) -> None:
    animal = next(animal for animal in ZOO if animal.name == name)
    numpy_dtype = np.dtype(jax.numpy.dtype(dtype))
    (x,) = animal.sample(np.random.default_rng(0))
    x = x.astype(numpy_dtype)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert animal.jacobian is not None
    for mode in ("forward", "reverse"):
        jac = client.jacobian(name, x, mode=mode)
        assert jac.dtype == numpy_dtype
        expected = animal.jacobian(x.astype("float64"))
        assert_close(jac.astype("float64"), expected, 30 * eps)


def test_laws(client: jacserve.Client) -> None:
    x = np.random.default_rng(5).uniform(0.5, 2.5, size=3)
    eps = float(np.finfo("float64").eps)
    forward = client.jacobian("spherical", x, mode="forward")
    reverse = client.jacobian("spherical", x, mode="reverse")
    assert_close(forward, reverse, 100 * eps)
    inner = client.evaluate("spherical", x)
    outer = client.jacobian("elementwise", inner.value)
    composed = zoo.elementwise, zoo.spherical
    with jax.enable_x64(True):
        chain = jax.jacfwd(lambda y: composed[0](composed[1](y)))(x)
    assert_close(outer @ inner.jacobian, np.asarray(chain), 100 * eps)
