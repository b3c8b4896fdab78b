"""What is registered, and what is refused: which file, which function, the remedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float, Float32, Int, PyTree

import jacserve
from jacserve_server import RegistrationError, Registry, serving
from jacserve_server.registration import build_catalog


def build(function, **options):
    registry = Registry()
    registry.function(**options)(function)
    return build_catalog([registry]).specs[0]


def test_the_function_itself_is_returned_unchanged() -> None:
    registry = Registry()

    def double(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return 2 * x

    assert registry.function(double) is double
    assert registry.function(name="again")(double) is double


def test_versions_live_side_by_side_and_a_bare_name_is_the_newest() -> None:
    registry = Registry()

    def make(version: int):
        def power(x: Float[Array, ""]) -> Float[Array, ""]:
            return x**version

        return power

    for version in (2, 10, 1):
        registry.function(name="power", version=version)(make(version))
    with serving(registry) as server, jacserve.Client(server.target) as client:
        assert [f.version for f in client.functions()] == [1, 2, 10]
        assert client.value("power", 2.0) == 1024.0
        assert client.value("power@2", 2.0) == 4.0
        assert client.value("functions/power@1", 2.0) == 2.0
        assert client.evaluate("power", 2.0).function == "power@10"
        assert client.describe("power").version == 10


def test_dimensions_and_dtypes_are_published() -> None:
    def f(
        x: Float[Array, "n 3"],
        i: Int[Array, "rows=2"],
        w: Float32[Array, "n+1 2*n"],
        z: Complex[Array, ""],
    ):
        """Adds.

        At length.
        """
        return {"a": x.sum(), "b": (jnp.concatenate([x, x]), w), "c": i}

    spec = build(f)
    assert spec.documentation == "Adds.\n\nAt length."
    shapes = [argument.shape for argument in spec.signature.arguments]
    assert shapes == [("n", 3), (2,), ("n+1", "2*n"), ()]
    assert spec.signature.arguments[2].dtypes == ("float32",)
    assert [a.is_differentiable for a in spec.signature.arguments] == [
        True, False, True, True
    ]  # fmt: skip
    assert spec.results == (
        (("a",), ()),
        (("b", 0), ("2*n", 3)),
        (("b", 1), ("n + 1", "2*n")),
        (("c",), (2,)),
    )


def test_partials_callable_objects_and_jitted_functions() -> None:
    def scaled(x: Float[Array, "n"], k: float, *, power: int) -> Float[Array, "n"]:
        """Scales."""
        return k * x**power

    class Affine:
        """An object with state."""

        offset = 3.0

        def __call__(self, x: Float[Array, "n"]) -> Float[Array, "n"]:
            """Shifts."""
            return x + self.offset

    def jitted(x: Float[Array, "n"]) -> Float[Array, "n"]:
        """Sines."""
        return jnp.sin(x)

    registry = Registry()
    partial = functools.partial(scaled, k=2.0, power=3)
    registry.function(name="cubes")(partial)
    registry.function(name="affine")(Affine())
    registry.function(jax.jit(jitted))
    with serving(registry) as server, jacserve.Client(server.target) as client:
        assert [f.documentation for f in client.functions()] == [
            "Shifts.", "Scales.", "Sines."
        ]  # fmt: skip
        x = np.array([1.0, 2.0])
        np.testing.assert_array_equal(client.value("cubes", x), [2.0, 16.0])
        np.testing.assert_array_equal(client.value("affine", x), x + 3.0)
        np.testing.assert_allclose(client.value("jitted", x), np.sin(x))


def test_sizes_that_a_function_needs_are_found_or_given() -> None:
    def even(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return x.reshape(-1, 2).sum(axis=1)

    def images(x: Float[Array, "n"]) -> Float[Array, ""]:
        return x.reshape(28, 28).sum()

    assert build(even).modes == ("forward", "reverse")
    assert build(images, sizes={"n": 784}).modes == ("forward", "reverse")
    with pytest.raises(RegistrationError, match=r"at n = 3 failed.*pass sizes="):
        build(images)
    with pytest.raises(RegistrationError, match=r"sizes= names m, .*dimensions are n"):
        build(images, sizes={"m": 784})


def test_a_file_with_postponed_annotations(tmp_path) -> None:
    from jacserve_server.loading import load_registries

    file = tmp_path / "postponed.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from jaxtyping import Array, Float\n"
        "from jacserve_server import Registry\n"
        "registry = Registry()\n"
        "@registry.function\n"
        'def f(x: Float[Array, "n 2"]) -> Float[Array, "n"]:\n'
        "    return helper(x)\n"
        "def helper(x):\n"
        "    return x.sum(axis=1)\n"
    )
    [spec] = build_catalog(load_registries([str(file)])).specs
    assert spec.signature.arguments[0].shape == ("n", 2)


def test_a_function_without_any_mode_still_has_a_value() -> None:
    registry = Registry()

    @registry.function
    def callback(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return jax.pure_callback(np.sin, x, x)

    with serving(registry) as server, jacserve.Client(server.target) as client:
        assert client.describe("callback").modes == ()
        x = np.ones(3)
        np.testing.assert_allclose(client.value("callback", x), np.sin(x))
        with pytest.raises(jacserve.InvalidRequestError, match="value alone"):
            client.jacobian("callback", x)


def no_annotation(x, y: Float[Array, ""]):
    return y


def not_an_array(x: float):
    return x


def a_pytree(x: PyTree[Float[Array, ""]]):
    return x


def any_rank(x: Float[Array, "*shape"]):
    return x


def anonymous(x: Float[Array, "_ 3"]):
    return x


def many(*xs: Float[Array, ""]):
    return xs[0]


def nothing():
    return jnp.ones(3)


def returns_text(x: Float[Array, ""]):
    return {"a": x, "b": "text"}


def returns_none(x: Float[Array, ""]):
    del x


def numbered(x: Float[Array, ""]):
    return {1: x}


def raises(x: Float[Array, "3"]):
    raise ZeroDivisionError("no luck")


def exits(x: Float[Array, "3"]):
    raise SystemExit(0)


def branches(x: Float[Array, "3"]):
    return x if x[0] > 0 else -x


def narrow(x: Float[Array, "3"]):
    return x.astype(jnp.float8_e4m3fn)


def spaced(x: Float[Array, "n - 1"]):
    return x


def unbound(x: Float[Array, "n+1"]):
    return x


def odd_expression(x: Float[Array, "n"], y: Float[Array, "n**2"]):
    return x


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_annotation, ["parameter x has no annotation", "jaxtyping"]),
        (not_an_array, ["parameter x is annotated float", "jaxtyping"]),
        (a_pytree, ["parameter x", "jaxtyping"]),
        (any_rank, ["'*shape'"]),
        (anonymous, ["'_'"]),
        (many, ["parameter xs", "Name each array"]),
        (nothing, ["takes no arguments"]),
        (returns_text, ["it returns a str at result['b']", "Return arrays"]),
        (returns_none, ["it returns no array"]),
        (numbered, ["dictionary key 1 is not a printable string"]),
        (raises, ["tracing it failed", "ZeroDivisionError: no luck"]),
        (exits, ["tracing it failed", "SystemExit: 0"]),
        (branches, ["tracing it failed", "TracerBoolConversionError", "jax.jit"]),
        (narrow, ["returns float8_e4m3fn at result, which can't be sent"]),
        (spaced, ["'-' stands alone", "without spaces"]),
        (unbound, ["no argument has the dimension 'n' by itself"]),
        (odd_expression, ["'n ** 2' is not a sum"]),
    ],
)
def test_an_unfit_function_is_refused_in_words(function, words: list[str]) -> None:
    with pytest.raises(RegistrationError) as caught:
        build(function)
    [problem] = caught.value.problems
    assert "test_registration.py:" in problem
    assert f"functions/{function.__name__}: " in problem
    for text in words:
        assert text in problem


def test_all_problems_are_reported_together() -> None:
    registry = Registry()
    for function in (raises, no_annotation, nothing):
        registry.function(function)
    with pytest.raises(RegistrationError) as caught:
        build_catalog([registry])
    assert len(caught.value.problems) == 3


def test_a_duplicate_is_refused_within_and_across_registries() -> None:
    first, second = Registry(), Registry()

    def f(x: Float[Array, ""]) -> Float[Array, ""]:
        return x

    first.function(f)
    with pytest.raises(RegistrationError, match=r"f@1 is already registered, at .*py"):
        first.function(f)
    second.function(f)
    with pytest.raises(RegistrationError, match=r"f@1 is already .*version=2"):
        build_catalog([first, second])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "no spaces"}, "not a valid name"),
        ({"name": "a@2"}, "not a valid name"),
        ({"version": 0}, "version is 0"),
        ({"version": "2"}, "version is '2'"),
        ({"mode": "sideways"}, "mode is 'sideways'"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"batchable": "no"}, "batchable is 'no'"),
        ({"sizes": {"n": 2.5}}, "sizes is"),
        ({"sizes": 5}, "sizes is 5"),
        ({"name": 5}, "5 is not a valid name"),
        ({"mode": []}, "mode is"),
    ],
)
def test_a_bad_option_is_refused_where_it_stands(options, words: str) -> None:
    def f(x: Float[Array, ""]) -> Float[Array, ""]:
        return x

    with pytest.raises(RegistrationError, match=words):
        Registry().function(**options)(f)


def test_what_is_not_a_function_is_refused() -> None:
    with pytest.raises(RegistrationError, match="'polar' is not a function"):
        Registry().function("polar")  # pyright: ignore
    with pytest.raises(RegistrationError, match="no name of its own"):
        Registry().function(functools.partial(build, 1))


def test_a_structure_that_differs_between_sizes_has_unknown_shapes() -> None:
    def pair_or_not(x: Float[Array, "n"]):
        return (x, x) if isinstance(x.shape[0], int) else x

    assert build(pair_or_not).results == (((0,), (None,)), ((1,), (None,)))


def test_a_dimension_may_be_called_in() -> None:
    def dense(x: Float[Array, "in"], w: Float[Array, "out in"]):
        return w @ x

    assert build(dense).modes == ("forward", "reverse")


def test_settings_under_which_nothing_can_be_served() -> None:
    with (
        jax.disable_jit(),
        pytest.raises(RegistrationError, match="jax_disable_jit is on"),
    ):
        build(raises)


def test_a_preferred_mode_must_exist() -> None:
    def loop(x: Float[Array, ""]) -> Float[Array, ""]:
        return jax.lax.while_loop(lambda y: y < 9, lambda y: 2 * y, x)

    assert build(loop).modes == ("forward",)
    with pytest.raises(RegistrationError, match=r"mode='reverse'.*while_loop"):
        build(loop, mode="reverse")
