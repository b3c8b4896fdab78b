"""Finds sparsity patterns and colours them, by asdex.

Columns of J that share no row have one colour, and one Jacobian-vector product gives
them all (Curtis, Powell, Reid, On the estimation of sparse Jacobian matrices, IMA
Journal of Applied Mathematics 13, 1974); rows and vector-Jacobian products likewise.
The pattern is read off the traced function and holds at every point.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jacserve.sampling import random_array
from jacserve.sparse import Pattern
from jacserve.tensors import dtype_named
from jacserve.vocabulary import DIRECTIONS, Direction, Mode
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.diagnosis import trace_error
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.tracing import abstract_results, mode_problem, x64
from jacserve_server.transforms.point import (
    Compressed,
    FunctionError,
    Point,
    check_scalar,
    is_inexact,
    nothing_to_differentiate,
)
from jacserve_server.transforms.products import ravelled, shaped
from jacserve_server.work import InputSpec, Sparsity, SparsityKey, Strategy

Kind = Literal["jacobian", "hessian"]

# Points and vectors at which a sparse matrix is compared with dense products.
_CHECKED_POINTS, _CHECKED_VECTORS = 3, 4
# What is looked for takes memory for each result, however few bytes have asked for it.
_MOST_RESULTS = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class ColoredPattern:
    """A pattern, and how to compute a matrix that has it.

    Attributes:
        sparsity: The pattern, and the products that give the matrix.
        kind: Whether the matrix is J or H.
    """

    sparsity: Sparsity
    kind: Kind
    _coloring: Any

    def compressed(self, *, holomorphic: bool) -> Compressed:
        """Returns how to compute the values, for a `Point`."""
        asdex = _import_asdex()
        evaluate = {
            "jacobian": asdex.value_and_compressed_jacobian_from_coloring,
            "hessian": asdex.value_and_compressed_hessian_from_coloring,
        }[self.kind]

        def values(f: Callable[..., Any], *arguments: jax.Array) -> Any:
            transformed = evaluate(
                f, self._coloring, has_aux=True, holomorphic=holomorphic
            )
            (_, everything), products = transformed(*arguments)
            return asdex.decompress_data(products, self._coloring), everything

        pattern = self.sparsity.pattern
        return Compressed(values, pattern.rows, pattern.columns, pattern.shape)


def find_sparsity(function: RegisteredFunction, sought: SparsityKey) -> ColoredPattern:
    """Finds, colours and checks a pattern.

    Args:
        function: The function.
        sought: At which inputs, of which derivative.

    Returns:
        The pattern.

    Raises:
        ServiceError: asdex is not installed, does not know the function's
            operations, or found a pattern that does not hold.
    """
    asdex = _import_asdex()
    resource, inputs, kind = function.spec.resource, sought.inputs, sought.kind
    names = [argument.name for argument in function.spec.signature.arguments]
    wrt = [(names.index(name), name) for name in sought.wrt]
    try:
        leaves = abstract_results(function.call, inputs)
    except FunctionError as error:
        raise trace_error(function, error) from error
    if not any(is_inexact(leaf.array) for leaf in leaves):
        raise nothing_to_differentiate(resource)
    results = sum(math.prod(leaf.array.shape) for leaf in leaves)
    if results > _MOST_RESULTS:
        raise ServiceError(
            "SHAPE_MISMATCH",
            f"{resource} has {results} results at inputs of these sizes, and at most "
            f"{_MOST_RESULTS} are allowed. Pass smaller sizes.",
            field="sizes",
            results=results,
        )
    if kind == "hessian":
        check_scalar(resource, leaves, "hessian", "Only a scalar function has one.")
    problems: dict[Direction, str | None] = {
        direction: None
        if direction in function.spec.modes
        else mode_problem(function.call, inputs, wrt, direction)
        for direction in DIRECTIONS
    }
    directions: list[Direction] = [d for d in DIRECTIONS if problems[d] is None]
    if not directions:
        raise ServiceError(
            "MODE_UNSUPPORTED",
            f"{resource} can't be differentiated with respect to "
            f"{', '.join(sought.wrt)}: "
            + "; ".join(f"{mode}: {problem}" for mode, problem in problems.items())
            + ". Choose wrt differently, or ask for value alone.",
            field="mode",
            function=resource,
            mode="sparse",
        )
    # The arguments to differentiate first. The others are unknown numbers to it, too.
    first = [place for place, _ in wrt]
    order = [*first, *(place for place in range(len(inputs)) if place not in first)]

    def f(*arguments: Any) -> Any:
        given = dict(zip(order, arguments, strict=True))
        ordered = [given[place] for place in sorted(order)]
        point = _point(function, ordered, wrt, kind)
        return _f(point, kind)(*point.arguments)

    samples = [
        np.zeros(inputs[place].shape, dtype_named(inputs[place].dtype))
        for place in order
    ]
    detect = {
        "jacobian": asdex.jacobian_sparsity,
        "hessian": asdex.hessian_sparsity,
    }[kind]
    try:
        with x64(inputs), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            places = tuple(range(len(wrt)))
            sparsity = detect(f, *samples, argnums=places, has_aux=True)
            coloring = _colored(asdex, sparsity, kind, directions, samples[: len(wrt)])
            found = _found(sparsity, coloring, kind)
            worst, most = _error(function, inputs, wrt, found)
    except ServiceError:
        raise
    except Exception as error:
        raise ServiceError(
            "SPARSITY_UNSUPPORTED",
            f"the sparsity of {resource} can't be found: {describe_exception(error)}. "
            "Use mode auto, forward or reverse.",
            field="mode",
            function=resource,
            mode="sparse",
        ) from error
    if worst > most:
        raise ServiceError(
            "SPARSITY_UNSUPPORTED",
            f"the sparsity found of {resource} does not hold: products with the "
            f"sparse matrix are off by {worst:.1e}. Use mode auto, forward or reverse, "
            "and report it.",
            field="mode",
            function=resource,
            mode="sparse",
        )
    return found


def _found(sparsity: Any, coloring: Any, kind: Kind) -> ColoredPattern:
    mode: Mode = "forward_over_reverse"
    if kind == "jacobian":
        mode = "forward" if coloring.mode == "fwd" else "reverse"
    shape = (int(sparsity.shape[0]), int(sparsity.shape[1]))
    pattern = Pattern.of(shape, np.asarray(sparsity.rows), np.asarray(sparsity.cols))
    count = int(coloring.num_colors)
    return ColoredPattern(Sparsity(pattern, count, mode), kind, coloring)


def _import_asdex() -> Any:
    try:
        import asdex
    except ImportError as error:
        problem = f"needs {error.name}, which this server has not"
        if not isinstance(error, ModuleNotFoundError):
            problem = f"needs asdex, which does not fit JAX {jax.__version__} here"
        raise ServiceError(
            "NOT_INSTALLED",
            f"sparse mode {problem}. Install jacserve[sparse] where it runs: pip "
            'install "jacserve[sparse]"; or use mode auto, forward or reverse.',
            field="mode",
            mode="sparse",
        ) from error
    return asdex


def _point(
    function: RegisteredFunction,
    inputs: Sequence[Any],
    wrt: Sequence[tuple[int, str]],
    kind: Kind,
) -> Point:
    is_jacobian = kind == "jacobian"
    strategy = (
        Strategy(jacobian="sparse") if is_jacobian else Strategy(hessian="sparse")
    )
    return Point(
        function.call,
        inputs,
        resource=function.spec.resource,
        wrt=wrt,
        strategy=strategy,
    )


def _f(point: Point, kind: Kind) -> Callable[..., Any]:
    return point.f if kind == "jacobian" else point.scalar_f


def _colored(
    asdex: Any,
    sparsity: Any,
    kind: Kind,
    directions: Sequence[Direction],
    wanted: Sequence[Any],
) -> Any:
    # The compiled function takes the differentiated arguments alone.
    own = asdex.SparsityPattern(
        sparsity.rows,
        sparsity.cols,
        sparsity.shape,
        input_avals=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wanted),
        argnums=tuple(range(len(wanted))),
    )
    if kind == "hessian":
        return asdex.hessian_coloring_from_sparsity(own)
    colorings = [
        asdex.jacobian_coloring_from_sparsity(
            own, mode="fwd" if direction == "forward" else "rev"
        )
        for direction in directions
    ]
    return min(colorings, key=lambda coloring: coloring.num_colors)


def _error(
    function: RegisteredFunction,
    inputs: Sequence[InputSpec],
    wrt: Sequence[tuple[int, str]],
    found: ColoredPattern,
) -> tuple[float, float]:
    """Compares the sparse matrix with products that do not know the pattern.

    Returns:
        The largest error, and the largest that rounding explains.
    """
    pattern, mode = found.sparsity.pattern, found.sparsity.mode
    dtypes = [dtype_named(inputs[place].dtype) for place, _ in wrt]
    is_holomorphic = any(dtype.kind == "c" for dtype in dtypes)
    compressed = found.compressed(holomorphic=is_holomorphic)
    places = tuple(range(len(wrt)))

    def errors(samples: Sequence[jax.Array], vectors: jax.Array) -> jax.Array:
        point = _point(function, samples, wrt, found.kind)
        f = _f(point, found.kind)
        data, _ = compressed.evaluate(f, *point.arguments)
        derivative = f
        if found.kind == "hessian":
            derivative = jax.grad(f, places, has_aux=True, holomorphic=is_holomorphic)

        def error(vector: jax.Array) -> jax.Array:
            if mode == "reverse":
                outputs, pullback, _ = jax.vjp(f, *point.arguments, has_aux=True)
                products = pullback(shaped(vector, outputs))
                to, of = pattern.columns, pattern.rows
            else:
                tangents = shaped(vector, point.arguments)
                _, products, _ = jax.jvp(
                    derivative, point.arguments, tangents, has_aux=True
                )
                to, of = pattern.rows, pattern.columns
            dense = ravelled(products, products)
            terms = data * vector[of].astype(data.dtype)
            sparse = jnp.zeros(dense.shape, data.dtype).at[to].add(terms)
            scale = jnp.max(jnp.abs(dense), initial=1.0)
            return jnp.max(jnp.abs(sparse - dense), initial=0.0) / scale

        return jax.vmap(error)(vectors)

    random = np.random.default_rng(0)
    length = pattern.shape[mode != "reverse"]
    widest = jnp.result_type(*dtypes)
    worst = 0.0
    compiled = jax.jit(errors)
    for place in range(_CHECKED_POINTS):
        samples = [
            random_array(random, spec.shape, spec.dtype, is_positive=place > 0)
            for spec in inputs
        ]
        vectors = random_array(random, (_CHECKED_VECTORS, length), widest.name)
        each = np.asarray(compiled(samples, vectors), np.float64)
        worst = max(worst, float(np.max(each[np.isfinite(each)], initial=0.0)))
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return worst, 1000 * eps * math.sqrt(max(pattern.shape))
