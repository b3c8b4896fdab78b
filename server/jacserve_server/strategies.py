"""Decides how a program differentiates: modes, and how many products at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import jax.numpy as jnp

from jacserve.tensors import dtype_named
from jacserve.vocabulary import DIRECTIONS, Curvature, Direction, Quantity
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.diagnosis import trace_error
from jacserve_server.errors import ServiceError
from jacserve_server.quantities import needs_of
from jacserve_server.sparsity import ColoredPattern, Kind
from jacserve_server.tracing import mode_problem
from jacserve_server.transforms.point import (
    FunctionError,
    Leaf,
    is_inexact,
    nothing_to_differentiate,
)
from jacserve_server.work import Computation, ProgramKey, Strategy

# More products come in chunks of this many: no slower in `make bench-chunks`, up to
# three times faster, and in less memory.
_CHUNK = 512

Find = Callable[[Kind], ColoredPattern]
Trace = Callable[[], list[Leaf]]


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """How a program is to be made.

    Attributes:
        strategy: The modes and the chunk size.
        patterns: The patterns of those derivatives whose mode is sparse.
    """

    strategy: Strategy
    patterns: Mapping[Quantity, ColoredPattern] = field(
        default_factory=dict[Quantity, ColoredPattern]
    )


def decide(
    function: RegisteredFunction,
    key: ProgramKey,
    measured: Sequence[Strategy],
    trace: Trace,
    find: Find,
) -> Decision:
    """Decides how to differentiate.

    Args:
        function: The function.
        key: What is wanted, and for how many points at once.
        measured: The ways to its J that were measured, the fastest first.
        trace: Returns the function's results at one point, without their numbers.
        find: Finds a sparsity pattern; raises ServiceError.

    Returns:
        The decision.

    Raises:
        ServiceError: The function can't be traced for these shapes, has no mode, or
            its sparsity can't be found where nothing else will do.
    """
    if not needs_of(key.computation.quantities):
        return Decision(Strategy())
    return _Decider(function, key, measured, trace, find).decision()


class _Decider:
    """What a decision depends on, each found out when it matters."""

    def __init__(
        self,
        function: RegisteredFunction,
        key: ProgramKey,
        measured: Sequence[Strategy],
        trace: Trace,
        find: Find,
    ) -> None:
        self._function = function
        self._computation = key.computation
        self._bucket = key.bucket
        self._measured = measured
        self._trace = trace
        self._find = find
        self._wrt = wrt_of(function, key.computation)
        self._patterns: dict[Quantity, ColoredPattern] = {}

    def decision(self) -> Decision:
        needs = needs_of(self._computation.quantities)
        strategy = Strategy()
        if "jvp" in needs:
            strategy = replace(strategy, jvp=self._product_direction("forward"))
        if "vjp" in needs:
            strategy = replace(strategy, vjp=self._product_direction("reverse"))
        if "hvp" in needs:
            strategy = replace(strategy, hvp=self._curvature())
        if "hessian" in needs:
            is_sparse = self._is_sparse("hessian")
            mode = "sparse" if is_sparse else self._curvature()
            strategy = replace(strategy, hessian=mode)
            if not is_sparse:
                strategy = replace(strategy, chunk_size=self._chunk_size(self._n))
        # A product against the grain of its mode is made of J.
        made_of_jacobian = strategy.jvp == "reverse" or strategy.vjp == "forward"
        if "jacobian" in needs or made_of_jacobian:
            strategy = self._with_jacobian(strategy)
        return Decision(strategy, self._patterns)

    @property
    def _n(self) -> int:
        inputs = self._computation.inputs
        return sum(math.prod(inputs[place].shape) for place, _ in self._wrt)

    @property
    def _m(self) -> int:
        return sum(math.prod(leaf.array.shape) for leaf in self._results)

    @property
    def _results(self) -> list[Leaf]:
        """Those that have derivatives."""
        try:
            leaves = self._trace()
        except FunctionError as error:
            raise trace_error(self._function, error) from error
        return [leaf for leaf in leaves if is_inexact(leaf.array)]

    @property
    def _widens(self) -> bool:
        """Whether a result is of a wider dtype than an argument."""
        inputs = self._computation.inputs
        dtypes = [dtype_named(inputs[place].dtype) for place, _ in self._wrt]
        return any(
            jnp.promote_types(leaf.array.dtype, dtype) != dtype
            for leaf in self._results
            for dtype in dtypes
        )

    def _problem(self, mode: Direction | Curvature) -> str | None:
        if mode in self._function.spec.modes:
            return None
        inputs = self._computation.inputs
        problem = mode_problem(self._function.call, inputs, self._wrt, mode)
        if problem is not None and not self._results:
            raise nothing_to_differentiate(self._function.spec.resource)
        return problem

    def _product_direction(self, natural: Direction) -> Direction:
        option = self._computation.mode
        if option in DIRECTIONS:
            return option
        other: Direction = "reverse" if natural == "forward" else "forward"
        return natural if self._problem(natural) is None else other

    def _curvature(self) -> Curvature:
        modes: tuple[Curvature, ...] = get_args(Curvature)
        problems = {}
        for mode in modes:
            problems[mode] = self._problem(mode)
            if problems[mode] is None:
                return mode
        raise self._no_mode(problems, "twice")

    def _with_jacobian(self, strategy: Strategy) -> Strategy:
        option = self._computation.mode
        if option in DIRECTIONS:
            return self._by(option, strategy)
        if self._is_sparse("jacobian"):
            is_measured = option == "auto" and bool(self._measured)
            return replace(strategy, jacobian="sparse", is_measured=is_measured)
        for measured in self._measured:
            direction = measured.jacobian
            if direction in DIRECTIONS and self._problem(direction) is None:
                return replace(
                    strategy,
                    jacobian=direction,
                    chunk_size=_smaller(strategy.chunk_size, measured.chunk_size),
                    is_measured=True,
                )
        return self._by(self._direction(), strategy)

    def _by(self, direction: Direction, strategy: Strategy) -> Strategy:
        own = self._chunk_size(self._n if direction == "forward" else self._m)
        chunk_size = _smaller(strategy.chunk_size, own)
        return replace(strategy, jacobian=direction, chunk_size=chunk_size)

    def _is_sparse(self, kind: Kind) -> bool:
        """Decides for sparse mode, and keeps the pattern."""
        option, layout = self._computation.mode, self._computation.layout
        if kind == "hessian" and self._m != 1:
            return False  # Tracing it will say that there is no such matrix.
        if option == "sparse":
            self._patterns[kind] = self._find(kind)
            return True
        is_preferred = self._function.spec.preferred_mode == "sparse"
        may_be = layout == "csr" or (is_preferred and layout != "blocks")
        if option != "auto" or not may_be:
            return False
        fastest = self._measured[0].jacobian if self._measured else "sparse"
        if kind == "jacobian" and fastest != "sparse":
            return False
        try:
            found = self._find(kind)
        except ServiceError:
            return False
        dense = min(self._n, self._m) if kind == "jacobian" else self._n
        if found.sparsity.color_count >= dense:
            return False
        self._patterns[kind] = found
        return True

    def _direction(self) -> Direction:
        """Chooses forward for n <= m, or where reverse mode would lose precision.

        It rounds to the arguments' dtype, which may be narrower than the results'.
        """
        directions: list[Direction] = list(DIRECTIONS)
        if self._m < self._n and not self._widens:
            directions.reverse()
        preferred = self._function.spec.preferred_mode
        if preferred in DIRECTIONS:
            directions = [preferred]
        problems: dict[Direction, str | None] = {}
        for direction in directions:
            problems[direction] = self._problem(direction)
            if problems[direction] is None:
                return direction
        raise self._no_mode(problems, "")

    def _chunk_size(self, products: int) -> int | None:
        if products <= _CHUNK:
            return None
        # The points of a batch are computed at once, too.
        return max(_CHUNK // (self._bucket or 1), 16)

    def _no_mode(self, problems: Mapping[Any, str | None], how_often: str) -> Exception:
        resource, wrt = self._function.spec.resource, ", ".join(self._computation.wrt)
        reasons = "; ".join(f"{mode}: {problem}" for mode, problem in problems.items())
        return ServiceError(
            "MODE_UNSUPPORTED",
            f"{resource} can't be differentiated {how_often}".rstrip()
            + f" with respect to {wrt}: {reasons}. Choose wrt differently, or ask for "
            f"{'jacobian' if how_often else 'value'} alone.",
            field="mode",
            function=resource,
            wrt=wrt,
        )


def _smaller(one: int | None, other: int | None) -> int | None:
    """Returns the chunk size that suits both, where None stands for no chunks."""
    return min((size for size in (one, other) if size is not None), default=None)


def wrt_of(
    function: RegisteredFunction, computation: Computation
) -> list[tuple[int, str]]:
    """Returns position and name of the arguments differentiated, in order."""
    names = [argument.name for argument in function.spec.signature.arguments]
    return [(names.index(name), name) for name in computation.wrt]
