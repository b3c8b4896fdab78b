"""Compiled programs: traced, lowered and compiled ahead of time for one device."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jacserve import trees
from jacserve.sampling import random_array
from jacserve.sparse import Pattern
from jacserve.tensors import Array, dtype_named
from jacserve.trees import Path
from jacserve.vocabulary import Mode, Quantity
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.diagnosis import execution_error, explained
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.quantities import QUANTITIES
from jacserve_server.result_sizes import check_result_size
from jacserve_server.strategies import Decision, wrt_of
from jacserve_server.tracing import has_linear_algebra, has_steady_cost, has_x64, x64
from jacserve_server.transforms import COMPUTE
from jacserve_server.transforms.point import Compressed, Point
from jacserve_server.work import (
    Computation,
    InputSpec,
    Outline,
    ProgramKey,
    Strategy,
)

# Type checkers see a variable in what is a class.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]

# What is tried when all products at once would not fit.
_CHUNK_SIZES = (512, 64, 8, 1)
# Well under what it takes to hand work to a thread and to wait for it.
_BRIEF_S = 50e-6
_TIMED_RUNS = 60
_MOST_OPERATIONS = 1e6
# No more than that is copied, or made up to be timed, in so short a time.
_MOST_BRIEF_BYTES = 2**20


def device_name(device: Device) -> str:
    """Returns a device's name, such as "cpu:0"."""
    return f"{device.platform}:{device.id}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take.

    Attributes:
        result_bytes: The most that one result may take.
        program_bytes: The most that arguments, results and intermediates of one
            program may take on the device together.
    """

    result_bytes: int
    program_bytes: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Program:
    """A compiled program on one device.

    Attributes:
        key: What it computes.
        outline: What its results are.
        decision: How it was made, so that it can be made for another device.
        device: Where it runs.
        row_bytes: Bytes of one point's result.
        results: Shape and dtype of each array of the outline.
        has_x64: Whether it was traced with 64-bit types.
        is_lone: Whether it must not run beside its like.
        is_brief: Whether it was measured to take less time than handing it to a
            thread, and takes the same whatever its inputs are.
        lane: Names the places that can run it.
    """

    key: ProgramKey
    outline: Outline
    decision: Decision
    device: Device
    row_bytes: int
    results: tuple[InputSpec, ...]
    has_x64: bool
    is_lone: bool
    is_brief: bool
    lane: ClassVar[str] = ""
    _is_remote: bool
    _executable: Any

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Runs the program and waits for it.

        Args:
            inputs: Arrays of exactly the key's shapes and dtypes. XLA itself would
                take another dtype without a word.

        Returns:
            The arrays of the outline, as read-only views.

        Raises:
            ServiceError: The device failed.
        """
        try:
            if self.has_x64:
                with jax.enable_x64(True):
                    arrays = self._executable(*inputs)
            else:  # It makes no difference, and takes time.
                arrays = self._executable(*inputs)
            if self._is_remote:
                # All leave the device at once, before the first is waited for.
                for array in arrays:
                    array.copy_to_host_async()
            # This waits, too, and in less time than jax.block_until_ready.
            return [np.asarray(array) for array in arrays]
        except Exception as error:
            raise execution_error(self.key, error) from error


def compile_program(
    function: RegisteredFunction,
    key: ProgramKey,
    decision: Decision,
    device: Device,
    limits: Limits,
) -> Program:
    """Traces, lowers and compiles a program.

    Where all products with J at once would take too much memory, they are made in
    chunks, as small as need be.

    Args:
        function: The function that the key names.
        key: What to compute.
        decision: How to differentiate.
        device: Where it is to run.
        limits: What it may take.

    Returns:
        The program.

    Raises:
        ServiceError: The function can't be traced for these shapes, a quantity does
            not exist for them, the program would take too much, or XLA fails.
    """
    total = 0
    for strategy in (decision.strategy, *smaller(decision.strategy)):
        program, total, temporary, is_steady = _compiled(
            function, key, replace(decision, strategy=strategy), device, limits
        )
        if total <= limits.program_bytes:
            return _timed(program) if is_steady else program
        if total - temporary > limits.program_bytes:
            break  # Arguments and results alone are too large.
    raise ServiceError(
        "DEVICE_OUT_OF_MEMORY",
        f"{function.spec.resource} at {key.bucket or 1} points would take "
        f"{total} bytes of the device's memory, but may take "
        f"{limits.program_bytes}. Ask for fewer points at once, or raise the server's "
        "max_program_bytes.",
        function=function.spec.resource,
        program_bytes=total,
        max_program_bytes=limits.program_bytes,
    )


def smaller(strategy: Strategy) -> Iterator[Strategy]:
    """Yields strategies that take ever less memory: J or H in ever smaller chunks."""
    if "sparse" in strategy.modes or not (strategy.jacobian or strategy.hessian):
        return
    for chunk_size in _CHUNK_SIZES:
        if strategy.chunk_size is None or chunk_size < strategy.chunk_size:
            yield replace(strategy, chunk_size=chunk_size)


class _Compiled(NamedTuple):
    """A program, and what it takes.

    Attributes:
        program: The program.
        total: Bytes on its device.
        temporary: Those of them for intermediates.
        is_steady: Whether it takes the same time whatever its inputs are.
    """

    program: Program
    total: int
    temporary: int
    is_steady: bool


def _compiled(
    function: RegisteredFunction,
    key: ProgramKey,
    decision: Decision,
    device: Device,
    limits: Limits,
) -> _Compiled:
    computation = key.computation
    with x64(computation.inputs):
        traced, lowered, outline = _lowered(function, key, decision, device)
        row_bytes = _row_bytes(lowered.out_info, key)
        # The smallest batch that this bucket serves.
        check_result_size(
            computation.function,
            row_bytes,
            key.bucket // 2 + 1 if key.bucket else key.bucket,
            limits.result_bytes,
        )
        try:
            executable = lowered.compile()
        except Exception as error:
            raise ServiceError(
                "COMPILATION_FAILED",
                f"XLA could not compile {function.spec.resource}: "
                f"{describe_exception(error)}. Try another mode or other shapes.",
                function=function.spec.resource,
            ) from error
    is_sparse = computation.layout == "csr"
    patterns: dict[Quantity, Pattern] = {
        quantity: found.sparsity.pattern
        for quantity, found in decision.patterns.items()
        if is_sparse and quantity in computation.quantities
    }
    program = Program(
        key=key,
        outline=Outline(
            function=computation.function,
            arrays=tuple(outline),
            modes=_modes(computation, decision.strategy),
            patterns=patterns,
            strategy=decision.strategy,
            bucket=key.bucket,
            device=device_name(device),
        ),
        decision=decision,
        device=device,
        row_bytes=row_bytes,
        results=tuple(_result(array, key) for array in lowered.out_info),
        has_x64=has_x64(computation.inputs),
        is_lone=device.platform == "cpu" and has_linear_algebra(traced.jaxpr),
        is_brief=False,
        _is_remote=device.platform != "cpu",
        _executable=executable,
    )
    steady = (
        device.platform == "cpu"
        and has_steady_cost(traced.jaxpr)
        and _is_small(executable)
    )
    analysis = executable.memory_analysis()
    if analysis is None:
        return _Compiled(program, 0, 0, steady)
    temporary = analysis.temp_size_in_bytes
    fixed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    steady = steady and fixed <= _MOST_BRIEF_BYTES
    return _Compiled(program, fixed + temporary, temporary, steady)


def _lowered(
    function: RegisteredFunction, key: ProgramKey, decision: Decision, device: Device
) -> tuple[Any, Any, list[tuple[Quantity, Path]]]:
    """Traces and lowers a program; also returns what its results are."""
    computation = key.computation
    at_point, outline = _at_point(function, computation, decision)
    sharding = SingleDeviceSharding(device)
    arguments = [
        jax.ShapeDtypeStruct(
            (key.bucket, *spec.shape)
            if key.bucket is not None and spec.is_batched
            else spec.shape,
            dtype_named(spec.dtype),
            sharding=sharding,
        )
        for spec in computation.arrays
    ]
    try:
        traced = jax.jit(_batched(function, key, at_point)).trace(*arguments)
        return traced, traced.lower(), outline
    except ServiceError:
        raise
    # A function may raise anything, SystemExit included.
    except BaseException as error:
        wrt = wrt_of(function, computation)
        modes = decision.strategy.modes
        raise explained(function, key, wrt, modes, error) from error


def fingerprint(
    function: RegisteredFunction, key: ProgramKey, decision: Decision, device: Device
) -> str:
    """Identifies what a program computes, in this process and in later ones.

    Args:
        function: The function that the key names.
        key: What to compute.
        decision: How to differentiate.
        device: Where it is to run.

    Returns:
        A hash of all that XLA is given: other code, other constants, another way to
        differentiate or another version of JAX have another one.

    Raises:
        ServiceError: The function can't be traced for these shapes.
    """
    with x64(key.computation.inputs):
        _, lowered, _ = _lowered(function, key, decision, device)
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def _is_small(executable: Any) -> bool:
    """Tells whether a program is worth timing at all, from XLA's own estimate."""
    cost = executable.cost_analysis() or {}
    operations = cost.get("flops", 0.0) + 20 * cost.get("transcendentals", 0.0)
    return operations < _MOST_OPERATIONS


def _timed(program: Program) -> Program:
    """Measures whether a program whose cost is always the same is brief."""
    computation, bucket = program.key.computation, program.key.bucket
    random = np.random.default_rng(0)
    inputs = [
        random_array(
            random,
            spec.shape
            if bucket is None or not spec.is_batched
            else (bucket, *spec.shape),
            spec.dtype,
            is_positive=True,
        )
        for spec in computation.arrays
    ]
    fastest = math.inf
    for turn in range(_TIMED_RUNS):
        start = time.perf_counter()
        program.run(inputs)
        fastest = min(fastest, time.perf_counter() - start)
        # The first runs are slow, but not a hundred times as slow; and others may be
        # compiled meanwhile.
        is_hopeless = fastest > (4 if turn >= 10 else 100) * _BRIEF_S
        if fastest < _BRIEF_S or is_hopeless:
            break
    return replace(program, is_brief=fastest < _BRIEF_S)


def _modes(computation: Computation, strategy: Strategy) -> dict[Quantity, Mode]:
    found: dict[Quantity, Mode] = {}
    for quantity in computation.quantities:
        if need := QUANTITIES[quantity].needs:
            found[quantity] = getattr(strategy, need)
    return found


def _result(array: Any, key: ProgramKey) -> InputSpec:
    is_batched = key.bucket is not None
    return InputSpec(tuple(array.shape[is_batched:]), array.dtype.name, is_batched)


def _row_bytes(arrays: Sequence[Any], key: ProgramKey) -> int:
    """Returns the bytes of one point's result."""
    return sum(
        math.prod(array.shape[key.bucket is not None :]) * array.dtype.itemsize
        for array in arrays
    )


def _at_point(
    function: RegisteredFunction, computation: Computation, decision: Decision
) -> tuple[Callable[..., Any], list[tuple[Quantity, Path]]]:
    """Returns the function to compile, and the outline that tracing it fills."""
    outline: list[tuple[Quantity, Path]] = []
    arguments, tangents = len(computation.inputs), len(computation.tangents)
    wrt = wrt_of(function, computation)
    is_holomorphic = any(
        computation.inputs[place].dtype.startswith("complex") for place, _ in wrt
    )
    compressed: dict[Quantity, Compressed] = {
        quantity: found.compressed(holomorphic=is_holomorphic)
        for quantity, found in decision.patterns.items()
    }
    # The value comes last: whatever differentiates f has evaluated it.
    quantities = sorted(computation.quantities, key=lambda q: q == "value")

    def at_point(*arrays: jax.Array) -> list[jax.Array]:
        vectors = arrays[arguments:]
        paths = [path for path, _ in computation.cotangents]
        point = Point(
            function.call,
            arrays[:arguments],
            resource=function.spec.resource,
            wrt=wrt,
            strategy=decision.strategy,
            compressed=compressed,
            tangents=vectors[:tangents],
            cotangents=list(zip(paths, vectors[tangents:], strict=True)),
        )
        leaves: list[tuple[Quantity, Path, jax.Array]] = [
            (quantity, path, array)
            for quantity in quantities
            for path, array in trees.flatten(
                COMPUTE[quantity](point, computation.layout)
            )
        ]
        outline[:] = [(quantity, path) for quantity, path, _ in leaves]
        return [array for _, _, array in leaves]

    return at_point, outline


def _batched(
    function: RegisteredFunction, key: ProgramKey, at_point: Callable[..., Any]
) -> Callable[..., Any]:
    specs = key.computation.arrays
    if key.bucket is None:
        return at_point
    if function.batchable:
        axes = tuple(0 if spec.is_batched else None for spec in specs)
        return jax.vmap(at_point, in_axes=axes)

    def one_by_one(*arrays: jax.Array) -> Any:
        def at_row(rows: list[jax.Array]) -> Any:
            row = iter(rows)
            pairs = zip(specs, arrays, strict=True)
            return at_point(*(next(row) if s.is_batched else x for s, x in pairs))

        pairs = zip(specs, arrays, strict=True)
        return jax.lax.map(at_row, [x for s, x in pairs if s.is_batched])

    return one_by_one
