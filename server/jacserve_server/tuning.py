"""Times every way to a function's Jacobian, to find the fastest."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from jacserve.sampling import random_array
from jacserve.tensors import Array
from jacserve.vocabulary import DIRECTIONS, Direction, Layout
from jacserve_server.batches import bucket_for
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.diagnosis import trace_error
from jacserve_server.errors import ServiceError
from jacserve_server.measurements import Measurement, Timing, describe_input
from jacserve_server.programs import Device, Limits, Program, compile_program
from jacserve_server.signature import FunctionSpec
from jacserve_server.sparsity import ColoredPattern, Kind, find_sparsity
from jacserve_server.strategies import Decision, decide, wrt_of
from jacserve_server.tracing import abstract_results
from jacserve_server.transforms.point import FunctionError, is_inexact
from jacserve_server.work import (
    Computation,
    InputSpec,
    ProgramKey,
    SparsityKey,
    Strategy,
)

_DTYPES = ("float32", "float64")
_CHUNK_SIZES = (32, 128, 512)
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 50
_SECONDS = 0.5  # Of timing each way.
_LEAD = 1.05  # What is not faster than the rule by this much may be so by chance.


def keys_to_measure(
    spec: FunctionSpec,
    sizes: Mapping[str, int],
    dtypes: Sequence[str] | None,
    buckets: Sequence[int | None],
) -> list[ProgramKey]:
    """Returns what to measure of a function: J with respect to all arguments.

    Args:
        spec: The function.
        sizes: Sizes of its symbolic dimensions; those left out are known to work.
        dtypes: Dtypes of its inputs; None for float32 and float64.
        buckets: The rows of batches; None for one point.

    Returns:
        A key for each dtype that it accepts and each batch; none without a mode.

    Raises:
        DimensionError: The sizes do not fit.
    """
    arguments = spec.signature.arguments
    names = tuple(a.name for a in arguments if a.is_differentiable)
    accepted = {dtype for a in arguments if a.is_differentiable for dtype in a.dtypes}
    wanted = [dtype for dtype in dtypes or _DTYPES if dtype in accepted]
    if not spec.modes:
        return []
    shapes = spec.signature.shapes({**spec.sizes, **sizes})
    return [
        ProgramKey(
            Computation(
                function=spec.qualified_name,
                quantities=("jacobian",),
                wrt=names,
                mode="auto",
                layout="matrix",
                inputs=tuple(
                    InputSpec(
                        shape,
                        dtype if dtype in argument.dtypes else argument.trial_dtype,
                        is_batched=bucket is not None,
                    )
                    for argument, shape in zip(arguments, shapes, strict=True)
                ),
            ),
            bucket_for(bucket),
        )
        for dtype in wanted or sorted(accepted)[:1]
        for bucket in buckets
    ]


def measure(
    function: RegisteredFunction,
    key: ProgramKey,
    device: Device,
    limits: Limits,
) -> Measurement:
    """Times the ways to a Jacobian at random points, in turn.

    Args:
        function: The function.
        key: Its Jacobian at given inputs and batch, as `keys_to_measure` makes it.
        device: Where to time it.
        limits: What a program may take.

    Returns:
        The timings, the fastest first; but the rule's way first where nothing is
        clearly faster.

    Raises:
        ServiceError: The function can't be traced for these shapes, or there is no way
            that can be compiled and run.
    """
    computation, bucket = key.computation, key.bucket
    points = tuple(replace(spec, is_batched=False) for spec in computation.inputs)
    sought = SparsityKey(computation.function, points, computation.wrt, "jacobian")
    try:
        leaves = abstract_results(function.call, points)
    except FunctionError as error:
        raise trace_error(function, error) from error
    rule = decide(function, key, (), lambda: leaves, _no_pattern).strategy
    products: dict[Direction, int] = {
        "forward": sum(
            math.prod(points[place].shape) for place, _ in wrt_of(function, computation)
        ),
        "reverse": sum(x.array.size for x in leaves if is_inexact(x.array)),
    }
    programs: dict[Strategy, Program] = {}
    problem: ServiceError | None = None
    for layout, decision in _ways(
        rule, products, partial(find_sparsity, function, sought)
    ):
        made = replace(key, computation=replace(computation, layout=layout))
        try:
            program = compile_program(function, made, decision, device, limits)
        except ServiceError as error:
            problem = problem or error
        else:
            programs.setdefault(program.outline.strategy, program)
    if problem is not None and not programs:
        raise problem
    random = np.random.default_rng(0)
    rows = () if bucket is None else (bucket,)
    inputs = [
        random_array(random, (*rows, *spec.shape), spec.dtype, is_positive=True)
        for spec in computation.inputs
    ]
    seconds = _timed(programs, inputs)
    if rule not in seconds:  # It would not fit.
        rule = min(seconds, key=lambda strategy: seconds[strategy])
    order = sorted(seconds, key=lambda s: seconds[s] / (_LEAD if s == rule else 1.0))
    return Measurement(
        function=computation.function,
        device=device.device_kind,
        inputs=tuple(map(describe_input, computation.inputs)),
        wrt=computation.wrt,
        bucket=bucket,
        timings=tuple(Timing(str(s.jacobian), s.chunk_size, seconds[s]) for s in order),
        rule_s=seconds[rule],
    )


def _no_pattern(kind: Kind) -> ColoredPattern:
    raise ServiceError("SPARSITY_UNSUPPORTED", f"the rule needs no pattern of {kind}")


def _ways(
    rule: Strategy,
    products: Mapping[Direction, int],
    find: Callable[[], ColoredPattern],
) -> Iterator[tuple[Layout, Decision]]:
    """Yields the ways to J, the rule's first."""
    yield "matrix", Decision(rule)
    for direction in DIRECTIONS:
        yield "matrix", Decision(Strategy(jacobian=direction))
        for chunk_size in _CHUNK_SIZES:
            if chunk_size < products[direction]:
                strategy = Strategy(jacobian=direction, chunk_size=chunk_size)
                yield "matrix", Decision(strategy)
    try:
        found = find()
    except ServiceError:
        return
    yield "csr", Decision(Strategy(jacobian="sparse"), {"jacobian": found})


def _timed(
    programs: Mapping[Strategy, Program], inputs: Sequence[Array]
) -> dict[Strategy, float]:
    """Returns the median seconds of each program, run in turn."""
    times: dict[Strategy, list[float]] = {strategy: [] for strategy in programs}
    for program in programs.values():
        program.run(inputs)
    end = time.monotonic() + _SECONDS * len(programs)
    for turn in range(_MOST_ROUNDS):
        for strategy, program in programs.items():
            start = time.perf_counter()
            program.run(inputs)
            times[strategy].append(time.perf_counter() - start)
        if turn + 1 >= _FEWEST_ROUNDS and time.monotonic() > end:
            break
    return {strategy: statistics.median(taken) for strategy, taken in times.items()}
