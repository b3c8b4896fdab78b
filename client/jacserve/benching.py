"""Measures a function of a running server under load, beside an empty call.

Callers ask for the same quantities at the same random point, level by level: more
callers at each. At every level they take turns with callers of an empty call on the
same server, in random order, so that a busy machine slows both alike. Nothing is
printed here.
"""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from jacserve import load, trees
from jacserve.client import Client
from jacserve.connection import Connection
from jacserve.dimensions import DimensionError, size_of
from jacserve.errors import ServerError, translated
from jacserve.functions import ArgumentInfo, FunctionInfo
from jacserve.load import Load
from jacserve.queries import EvaluateOptions
from jacserve.sampling import random_array
from jacserve.tensors import Array, format_shape
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import ModeOption, Quantity

# Of calls and of empty calls, at each level.
TURNS = 4
_HEALTH = "/grpc.health.v1.Health/Check"
_GET_FUNCTION = "/jacserve.v1.JacobianService/GetFunction"


class BenchError(ValueError):
    """What was asked for can't be measured; the text says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked of a function; its inputs are random.

    Attributes:
        quantities: What to compute.
        sizes: Sizes of its symbolic dimensions; those left out are known to work.
        dtype: The dtype of the arguments that take it; None for the widest of each.
        batch: Points in one call; None for one point without a batch axis.
        shared: Names of arguments that all points of a batch share.
        mode: How to differentiate.
        timeout_s: Seconds for each call; None for no limit.
        seed: Of the random numbers.
    """

    quantities: tuple[Quantity, ...] = ("jacobian",)
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    dtype: str | None = None
    batch: int | None = None
    shared: tuple[str, ...] = ()
    mode: ModeOption = "auto"
    timeout_s: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """The arguments of `Client.evaluate`, the same in every call."""

    function: str
    inputs: Mapping[str, Array]
    quantities: tuple[Quantity, ...]
    options: EvaluateOptions

    @property
    def inputs_text(self) -> str:
        """The inputs in one line, such as "x: float32[64, 3]"."""
        return ", ".join(
            f"{name}: {x.dtype.name}{format_shape(x.shape)}"
            for name, x in self.inputs.items()
        )


def random_question(
    client: Client, function: FunctionInfo, settings: Settings
) -> Question:
    """Draws the inputs, and the vectors that products are made with.

    Args:
        client: Asked for f(x) where its size has to be known.
        function: The function.
        settings: What to ask.

    Returns:
        The question.

    Raises:
        BenchError: The settings do not fit the function.
        JacobianError: f(x) can't be had.
    """
    _check_names(function, settings)
    name = f"{function.name}@{function.version}"
    random = np.random.default_rng(settings.seed)
    point = _draw(random, function, settings, batch=None)
    options: EvaluateOptions = {"mode": settings.mode, "timeout_s": settings.timeout_s}
    if {"jvp", "hvp"}.intersection(settings.quantities):
        columns = [point[a.name] for a in function.arguments if a.differentiable]
        options["tangents"] = _vector(random, columns)
    if "vjp" in settings.quantities:
        value = client.value(name, point, timeout_s=settings.timeout_s)
        options["cotangents"] = _vector(random, [x for _, x in trees.flatten(value)])
    if settings.batch is not None:
        point = _draw(random, function, settings, batch=settings.batch)
    return Question(name, point, settings.quantities, options)


def _check_names(function: FunctionInfo, settings: Settings) -> None:
    names = [argument.name for argument in function.arguments]
    for name in settings.shared:
        if name not in names:
            raise BenchError(
                f"{function.signature} has no argument {name} that points could share. "
                f"Take one of {', '.join(names)}."
            )
    symbols = sorted(function.sizes)
    for name in settings.sizes:
        if name not in symbols:
            there_are = f"it has {', '.join(symbols)}" if symbols else "it has none"
            raise BenchError(
                f"{function.signature} has no dimension {name} by name; {there_are}."
            )
    dtype = settings.dtype
    if dtype is not None and not any(dtype in a.dtypes for a in function.arguments):
        accepted = dict.fromkeys(d for a in function.arguments for d in a.dtypes)
        raise BenchError(
            f"no argument of {function.signature} takes {dtype}. "
            f"Take one of {', '.join(accepted)}."
        )


def _draw(
    random: np.random.Generator,
    function: FunctionInfo,
    settings: Settings,
    *,
    batch: int | None,
) -> dict[str, Array]:
    sizes = {**function.sizes, **settings.sizes}
    found: dict[str, Array] = {}
    for argument in function.arguments:
        # Around 1, where most functions are finite.
        shape = _shape(function, argument, sizes)
        if batch is not None and argument.name not in settings.shared:
            shape = (batch, *shape)
        accepted = argument.dtypes
        dtype = settings.dtype if settings.dtype in accepted else accepted[0]
        found[argument.name] = random_array(random, shape, dtype, is_positive=True)
    return found


def _shape(
    function: FunctionInfo, argument: ArgumentInfo, sizes: Mapping[str, int]
) -> tuple[int, ...]:
    try:
        return tuple(size_of(cast("int | str", d), sizes) for d in argument.shape)
    except DimensionError as error:
        raise BenchError(
            f"{function.signature}: {error}. Pass --size NAME=SIZE for each."
        ) from error


def _vector(random: np.random.Generator, arrays: Sequence[Array]) -> Array:
    """Draws as many numbers as real and complex arrays have together."""
    flat = [x.ravel() for x in arrays if x.dtype.kind not in "iub"]
    like = np.concatenate(flat) if flat else np.zeros(0)
    return random_array(random, like.shape, like.dtype.name)


@dataclass(frozen=True, slots=True)
class EmptyCall:
    """A call with next to no message and no work: what any call costs at least.

    Attributes:
        name: What is called.
        make: Makes one call, from any thread.
    """

    name: str
    make: Callable[[], object]


@contextmanager
def empty_call(connection: Connection, function: str) -> Generator[EmptyCall]:
    """Connects for empty calls.

    Args:
        connection: Where to, and how.
        function: A function of it, to be described where the server has no health.

    Yields:
        A health check, for which the client needs no package of its own; else the
        description of the function.

    Raises:
        JacobianError: The server answers neither.
    """
    with connection.channel() as channel:

        def caller(method: str, request: bytes) -> Callable[[], object]:
            # No serializers: bytes go out as they are.
            stub: Callable[[bytes], bytes] = cast("Any", channel).unary_unary(method)

            def make() -> object:
                with translated(connection.name):
                    return stub(request)

            return make

        found = EmptyCall("health check", caller(_HEALTH, b""))
        try:
            found.make()
        except ServerError as error:
            if error.code != "UNIMPLEMENTED":
                raise
            request = pb.GetFunctionRequest(name=function).SerializeToString()
            found = EmptyCall("GetFunction", caller(_GET_FUNCTION, request))
            found.make()
        yield found


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """What some callers measured, taking turns.

    Attributes:
        calls: Of the function.
        empty: Of the empty call.
    """

    calls: Load
    empty: Load


def levels(
    call: Callable[[], object],
    empty: Callable[[], object],
    *,
    concurrency: Sequence[int],
    seconds: float,
    stop: threading.Event,
    on_turn: Callable[[int], None],
    seed: int = 0,
) -> Generator[Level]:
    """Measures level by level.

    Args:
        call: Makes one call.
        empty: Makes one empty call.
        concurrency: How many callers there are at each level.
        seconds: Seconds of each level for the calls, and as many for the empty ones.
        stop: Ends it early once it is set; what was measured till then is yielded.
        on_turn: Told before each turn how many callers it has; there are 2 * TURNS
            at each level.
        seed: Of the order of turns.

    Yields:
        The levels at which something was measured.
    """
    random = np.random.default_rng(seed)
    for callers in concurrency:
        of_calls: list[Load] = []
        of_empty: list[Load] = []
        for turn in random.permutation(2 * TURNS).tolist():
            on_turn(callers)
            is_empty = turn % 2
            found = load.run(
                empty if is_empty else call,
                callers=callers,
                seconds=seconds / TURNS,
                stop=stop,
            )
            (of_empty if is_empty else of_calls).append(found)
        level = Level(load.joined(of_calls), load.joined(of_empty))
        if len(level.calls.latencies_s) or level.calls.error_count:
            yield level
        if stop.is_set():
            return
