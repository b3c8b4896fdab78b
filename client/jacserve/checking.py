"""Compares derivatives with differences of the function itself.

In a random direction v at a random point x, J v is the limit of

    (f(x + h v) - f(x - h v)) / (2 h)    for h -> 0.

A large h errs by the curvature of f, a small one by rounding. Ridders' method halves h
several times, extrapolates to h = 0 and estimates its own error (C. J. F. Ridders,
Accurate computation of F'(x) and F'(x) F''(x), Advances in Engineering Software 4,
1982), so no step has to be chosen, neither for float32 nor for float64.

Nothing here calls a server: `checks` yields what it wants evaluated and is sent the
results, so that both clients can drive it.
"""

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from jacserve import trees
from jacserve.dimensions import size_of
from jacserve.errors import InvalidRequestError, JacobianError
from jacserve.functions import ArgumentInfo, FunctionInfo
from jacserve.queries import Inputs
from jacserve.results import Result
from jacserve.sampling import random_array
from jacserve.tensors import Array, format_shape
from jacserve.vocabulary import Direction, Quantity

# 16-bit numbers are too coarse for differences.
_DTYPES = ("float64", "float32", "complex128", "complex64")
_STEPS = 10
_LARGEST_STEP = 0.1
_MOST_ENTRIES = 1_000_000  # Of a Jacobian that is asked for as a whole.
_MOST_COLUMNS = 64  # That are searched for the worst one.
_TRIES = 20
# Differences that doubt themselves by more than this prove nothing.
_DOUBT = 1e-2


@dataclass(frozen=True, slots=True)
class Check:
    """One derivative of one function, compared with differences.

    Attributes:
        function: The function's name and version.
        dtype: The dtype of its inputs.
        derivative: What was compared: "jacobian (forward)", "jvp", "hvp" ...
        error: The largest difference found, as a part of the largest number compared;
            NaN where nothing could be compared.
        tolerance: The largest that rounding explains.
        detail: Where the error is, or why nothing could be compared.
    """

    function: str
    dtype: str
    derivative: str
    error: float
    tolerance: float
    detail: str

    @property
    def was_compared(self) -> bool:
        """Whether there was something to compare with."""
        return not np.isnan(self.error)

    @property
    def ok(self) -> bool:
        """Whether the derivative agrees; false also where it was not compared."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Ask:
    """What `checks` wants evaluated: the arguments of `Client.evaluate`."""

    inputs: Mapping[str, Array]
    quantities: tuple[Quantity, ...]
    options: Mapping[str, Any]


# What `checks` is sent: a result, or the error that the call raised.
Answer = Result | JacobianError


def checks(
    function: FunctionInfo,
    *,
    inputs: Mapping[str, Array] | None,
    sizes: Mapping[str, int],
    points: int,
    seed: int,
) -> Generator[Ask, Answer, list[Check]]:
    """Compares every derivative of a function with differences.

    Args:
        function: The function.
        inputs: The point to compare at, by argument name; None for random ones.
        sizes: Sizes of its symbolic dimensions; those left out are known to work.
        points: How many random points and directions, for each dtype.
        seed: Of the random numbers.

    Yields:
        What is to be evaluated.

    Returns:
        A check for each dtype and derivative.
    """
    found: list[Check] = []
    for dtype in _dtypes(function, inputs):
        worst: dict[str, Check] = {}
        for place in range(points):
            random = np.random.default_rng([seed, place])
            checker = _Checker(function, dtype, random)
            if inputs is None:
                at = yield from checker.finite_point({**function.sizes, **sizes})
            else:
                at = inputs
            for check in (yield from checker.compare(at)):
                known = worst.get(check.derivative)
                if known is None or np.isnan(known.error) or check.error > known.error:
                    worst[check.derivative] = check
        found.extend(worst.values())
    return found


def _dtypes(
    function: FunctionInfo, inputs: Mapping[str, Array] | None
) -> Sequence[str]:
    differentiable = [a for a in function.arguments if a.differentiable]
    if not differentiable or not function.modes:
        return ()
    if inputs is not None:
        return (inputs[differentiable[0].name].dtype.name,)
    accepted = [d for d in _DTYPES if any(d in a.dtypes for a in differentiable)]
    # A function of real numbers need not be holomorphic where it also takes others.
    real = [dtype for dtype in accepted if dtype.startswith("float")]
    return real or accepted


def named_arrays(inputs: Inputs, function: FunctionInfo) -> dict[str, Array]:
    """Returns a call's inputs as arrays by argument name."""
    if isinstance(inputs, Mapping):
        named = inputs
    else:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        names = [argument.name for argument in function.arguments]
        named = dict(zip(names, given, strict=True))
    return {name: np.asarray(x) for name, x in named.items()}


class _NotComparableError(Exception):
    """There is nothing to compare; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class _Difference:
    """A derivative in a direction, by differences.

    Attributes:
        slope: The derivative, [m].
        doubt: How far each number of it may be off.
        size: The size of what was differentiated over that of x.
        rows: What each number belongs to, in words.
    """

    slope: Array
    doubt: Array
    size: float
    rows: Sequence[str]


class _Checker:
    """Compares the derivatives of one function in one dtype."""

    def __init__(
        self, function: FunctionInfo, dtype: str, random: np.random.Generator
    ) -> None:
        self._function = function
        self._dtype = dtype
        self._random = random
        self._eps = float(np.finfo(dtype).eps)
        # Rounding by eps, differentiated with a step that is not smaller than its
        # cube root, errs by the 2/3rd power.
        self._tolerance = 100 * self._eps ** (2 / 3)
        self._wrt = [a.name for a in function.arguments if a.differentiable]

    def finite_point(
        self, sizes: Mapping[str, int]
    ) -> Generator[Ask, Answer, Mapping[str, Array]]:
        """Draws points until f is finite at one; returns the last otherwise."""
        point: dict[str, Array] = {}
        for attempt in range(_TRIES):
            point = {
                argument.name: random_array(
                    self._random,
                    tuple(size_of(cast("int | str", d), sizes) for d in argument.shape),
                    self._dtype_of(argument),
                    is_positive=attempt % 2 == 1,
                )
                for argument in self._function.arguments
            }
            result = yield Ask(point, ("value",), {})
            if isinstance(result, Result) and result.finite:
                break
        return point

    def _dtype_of(self, argument: ArgumentInfo) -> str:
        return self._dtype if self._dtype in argument.dtypes else argument.dtypes[0]

    def compare(
        self, point: Mapping[str, Array]
    ) -> Generator[Ask, Answer, list[Check]]:
        """Compares every derivative at one point in one direction."""
        wrt = [name for name in self._wrt if point[name].dtype.kind in "fc"]
        direction = {
            name: random_array(self._random, point[name].shape, point[name].dtype.name)
            for name in wrt
        }
        try:
            value = yield from self._evaluated(point, ("value",), {})
            if not value.finite:
                raise _NotComparableError(
                    "f is not finite at random points; pass inputs"
                )
            slope, doubt = yield from self._slope(point, direction, "value")
        except _NotComparableError as reason:
            return [self._unknown("jacobian", str(reason))]
        f = _flat(value.value)
        along = _Difference(slope, doubt, _largest(f) / _scale(point), _rows(value))
        found: list[Check] = []
        for mode in self._function.modes:
            check = yield from self._jacobian(mode, point, direction, along)
            found.append(check)
        if "forward" in self._function.modes:
            found.append((yield from self._jvp(point, direction, along)))
        if "reverse" in self._function.modes:
            found.append((yield from self._vjp(point, direction, along, f)))
        if slope.size == 1 and self._dtype.startswith("float"):
            found.extend((yield from self._curvature(point, direction)))
        return found

    def _jacobian(
        self,
        mode: Direction,
        point: Mapping[str, Array],
        direction: Mapping[str, Array],
        along: "_Difference",
    ) -> Generator[Ask, Answer, Check]:
        """Compares J v, and looks for the entry of J that is off."""
        label, flat = f"jacobian ({mode})", _join(list(direction.values()))
        try:
            if along.slope.size * flat.size > _MOST_ENTRIES:
                shape = format_shape((along.slope.size, flat.size))
                raise _NotComparableError(f"it is {shape}, too large to ask for")
            options = {"wrt": list(direction), "mode": mode}
            result = yield from self._evaluated(point, ("jacobian",), options)
        except _NotComparableError as reason:
            return self._unknown(label, str(reason))
        check = self._compared(label, result.jacobian @ flat, along)
        if check.ok or flat.size > _MOST_COLUMNS:
            return check
        wrt = list(direction)
        return (
            yield from self._located(check, result.jacobian, point, wrt, along.rows)
        )

    def _jvp(
        self,
        point: Mapping[str, Array],
        direction: Mapping[str, Array],
        along: "_Difference",
    ) -> Generator[Ask, Answer, Check]:
        options = {"wrt": list(direction), "tangents": _join(list(direction.values()))}
        try:
            result = yield from self._evaluated(point, ("jvp",), options)
        except _NotComparableError as reason:
            return self._unknown("jvp", str(reason))
        return self._compared("jvp", result.jvp, along)

    def _vjp(
        self,
        point: Mapping[str, Array],
        direction: Mapping[str, Array],
        along: "_Difference",
        f: Array,
    ) -> Generator[Ask, Answer, Check]:
        """Compares (u^T J) v with u^T (J v)."""
        u = random_array(self._random, f.shape, f.dtype.name)
        try:
            options = {"wrt": list(direction), "cotangents": u}
            result = yield from self._evaluated(point, ("vjp",), options)
        except _NotComparableError as reason:
            return self._unknown("vjp", str(reason))
        product = result.vjp @ _join(list(direction.values()))
        expected = _Difference(
            (u @ along.slope)[None],
            (abs(u) @ along.doubt)[None],
            float(abs(u) @ abs(f)) / _scale(point),
            ["the product with v"],
        )
        return self._compared("vjp", product[None], expected)

    def _curvature(
        self, point: Mapping[str, Array], direction: Mapping[str, Array]
    ) -> Generator[Ask, Answer, list[Check]]:
        """Compares H v with differences of the gradient."""
        options: dict[str, Any] = {"wrt": list(direction)}
        tangents = _join(list(direction.values()))
        try:
            result = yield from self._evaluated(
                point, ("hvp",), {**options, "tangents": tangents}
            )
            gradient = yield from self._evaluated(point, ("gradient",), options)
            slope, doubt = yield from self._slope(point, direction, "gradient")
        except _NotComparableError:
            return []  # Not everything can be differentiated twice.
        size = _largest(gradient.gradient) / _scale(point)
        along = _Difference(slope, doubt, size, _places(point, list(direction)))
        return [self._compared("hvp", result.hvp, along)]

    def _evaluated(
        self,
        inputs: Mapping[str, Array],
        quantities: tuple[Quantity, ...],
        options: Mapping[str, Any],
    ) -> Generator[Ask, Answer, Result]:
        result = yield Ask(inputs, quantities, options)
        if isinstance(result, InvalidRequestError):
            raise _NotComparableError(str(result))
        if isinstance(result, JacobianError):
            raise result
        return result

    def _slope(
        self,
        point: Mapping[str, Array],
        direction: Mapping[str, Array],
        quantity: Quantity,
    ) -> Generator[Ask, Answer, tuple[Array, Array]]:
        """Returns the derivative in a direction by Ridders' method, and its doubt.

        What it returns is flat: [m].
        """
        steps = _LARGEST_STEP * _scale(point) * 0.5 ** np.arange(_STEPS)
        values: list[Array] = []
        offsets = np.concatenate([steps, -steps])
        most = self._function.max_batch or len(offsets)
        for start in range(0, len(offsets), most):
            batch = {
                name: _moved(array, direction[name], offsets[start : start + most])
                if name in direction
                else array
                for name, array in point.items()
            }
            wrt = {} if quantity == "value" else {"wrt": list(direction)}
            result = yield from self._evaluated(batch, (quantity,), wrt)
            values.append(_flat(result.quantities[quantity], batched=True))
        rows = np.concatenate(values)
        return ridders(rows[:_STEPS], rows[_STEPS:], steps)

    def _located(
        self,
        check: Check,
        jacobian: Array,
        point: Mapping[str, Array],
        wrt: Sequence[str],
        rows: Sequence[str],
    ) -> Generator[Ask, Answer, Check]:
        """Finds the entry of J that is the furthest off."""
        worst, detail = 0.0, check.detail
        columns = _places(point, wrt)
        factors = (1.0, 1.0j) if self._dtype.startswith("complex") else (1.0,)
        for place, factor in itertools.product(range(len(columns)), factors):
            unit = _unit(point, wrt, place, factor)
            slope, doubt = yield from self._slope(point, unit, "value")
            off = np.abs(jacobian[:, place] * factor - slope) - 2 * doubt
            row = int(np.argmax(np.where(np.isfinite(off), off, -1)))
            if off[row] > worst:
                worst = float(off[row])
                detail = (
                    f"d {rows[row]} / d {columns[place]} is "
                    f"{jacobian[row, place]:.6g}, by differences "
                    f"{slope[row] / factor:.6g}"
                )
                if factor != 1.0:
                    detail += " along the imaginary axis: is f holomorphic?"
        return Check(
            check.function,
            check.dtype,
            check.derivative,
            check.error,
            check.tolerance,
            detail,
        )

    def _compared(self, derivative: str, product: Array, along: "_Difference") -> Check:
        """Compares a product with the derivative in the same direction."""
        slope, doubt = along.slope, along.doubt
        scale = max(
            _largest(slope),
            _largest(product),
            # A derivative far smaller than f is a difference of numbers of f's size,
            # and as uncertain as their rounding.
            along.size * self._eps ** (1 / 3),
            self._eps,
        )
        is_known = np.isfinite(slope) & (doubt <= _DOUBT * scale)
        if not is_known.any() and slope.size:
            return self._unknown(
                derivative, "differences do not settle: f may be rough or discontinuous"
            )
        # NaN in the product is an error; a doubtful difference proves nothing.
        off = np.where(is_known, np.abs(product - slope) - 2 * doubt, 0.0) / scale
        off = np.where(np.isnan(off), np.inf, np.maximum(off, 0.0))
        if not off.size:
            return self._check(derivative, 0.0, "")
        row = int(np.argmax(off))
        detail = (
            f"at {along.rows[row]}: {product[row]:.6g}, by differences {slope[row]:.6g}"
        )
        return self._check(derivative, float(off[row]), detail)

    def _check(self, derivative: str, error: float, detail: str) -> Check:
        function = f"{self._function.name}@{self._function.version}"
        return Check(function, self._dtype, derivative, error, self._tolerance, detail)

    def _unknown(self, derivative: str, reason: str) -> Check:
        return self._check(derivative, float("nan"), reason)


def ridders(up: Array, down: Array, steps: Array) -> tuple[Array, Array]:
    """Extrapolates central differences to a step of zero.

    Args:
        up: f(x + h v) for each step, [s, m].
        down: f(x - h v) for each step, [s, m].
        steps: h, each half the one before, [s].

    Returns:
        The derivative in the direction v, [m]; and how far it may be off, [m].
    """
    wide = np.result_type(up.dtype, np.float64)
    row = (up.astype(wide) - down.astype(wide)) / (2 * steps[:, None])
    best: Array = row[-1]
    doubt = np.inf * np.ones(row.shape[1])
    # What rounding alone does to a difference, the more the smaller its step.
    eps = float(np.finfo(up.dtype).eps)
    noise = eps * np.maximum(abs(up), abs(down)).astype(float) / steps[:, None]
    factor = 4.0
    with np.errstate(invalid="ignore", over="ignore"):
        while len(row) > 1:
            # Errors are even in h: each column removes one more power of h^2.
            refined = (factor * row[1:] - row[:-1]) / (factor - 1.0)
            off = np.maximum(abs(refined - row[1:]), abs(refined - row[:-1]))
            noise = noise[1:]
            off = np.where(np.isfinite(off), np.maximum(off, noise), np.inf)
            place = np.argmin(off, axis=0)[None]
            least = np.take_along_axis(off, place, axis=0)[0]
            found = np.take_along_axis(refined, place, axis=0)[0]
            best = np.where(least < doubt, found, best)
            doubt = np.minimum(least, doubt)
            row, factor = refined, factor * 4.0
    return best, doubt


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _scale(point: Mapping[str, Array]) -> float:
    """Returns the size of the largest number of a point, or 1."""
    return max(1.0, *map(_largest, point.values()))


def _moved(array: Array, direction: Array, offsets: Array) -> Array:
    shape = (-1,) + (1,) * array.ndim
    return (array + offsets.reshape(shape) * direction).astype(array.dtype)


def _flat(tree: Any, *, batched: bool = False) -> Array:
    """Joins the real and complex arrays of a result: [m], or [b, m]."""
    arrays = [x for _, x in trees.flatten(tree) if x.dtype.kind not in "iub"]
    rows = arrays[0].shape[:1] if batched else ()
    return np.concatenate([x.reshape(*rows, -1) for x in arrays], axis=-1)


def _join(arrays: Sequence[Array]) -> Array:
    return np.concatenate([array.ravel() for array in arrays])


def _rows(result: Result) -> list[str]:
    """Names the numbers of f(x), such as "f['z'][0, 1]"."""
    return [
        f"f{trees.format_path(path)}{_index(array, place)}"
        for path, array in trees.flatten(result.value)
        if array.dtype.kind not in "iub"
        for place in range(array.size)
    ]


def _places(point: Mapping[str, Array], wrt: Sequence[str]) -> list[str]:
    """Names the numbers of x, such as "A[0, 1]"."""
    return [
        f"{name}{_index(point[name], place)}"
        for name in wrt
        for place in range(point[name].size)
    ]


def _index(array: Array, place: int) -> str:
    index = np.unravel_index(place, array.shape)
    return format_shape(tuple(map(int, index))) if array.ndim else ""


def _unit(
    point: Mapping[str, Array], wrt: Sequence[str], place: int, factor: complex
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name in wrt:
        unit = np.zeros(point[name].size, point[name].dtype)
        if 0 <= place < unit.size:
            unit[place] = factor
        place -= unit.size
        found[name] = unit.reshape(point[name].shape)
    return found
