"""Compiled programs: traced, lowered and compiled ahead of time for one device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jacserve import trees
from jacserve.tensors import Array, dtype_named
from jacserve.trees import Path
from jacserve.vocabulary import Mode, Quantity
from jacserve_server.catalog import RegisteredFunction
from jacserve_server.diagnosis import execution_error, explained, trace_error
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.tracing import abstract_results, mode_problem, x64
from jacserve_server.transforms import COMPUTE
from jacserve_server.transforms.point import FunctionError, Leaf, Point, is_inexact
from jacserve_server.work import Computation, InputSpec, ProgramKey

# Type checkers see a variable in what is a class.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]


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


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A compiled program on one device.

    Attributes:
        key: What it computes; the mode is decided.
        outline: Quantity and path of each of its arrays.
        row_bytes: Bytes of one point's result.
    """

    key: ProgramKey
    outline: tuple[tuple[Quantity, Path], ...]
    row_bytes: int
    _executable: Any

    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], Array]:
        """Runs the program and waits for it.

        Args:
            inputs: Arrays of exactly the key's shapes and dtypes. XLA itself would
                take another dtype without a word.

        Returns:
            The arrays of the outline as read-only views, and whether the numbers
            of each row are all finite.

        Raises:
            ServiceError: The device failed.
        """
        try:
            with x64(self.key.computation.inputs):
                arrays, finite = jax.block_until_ready(self._executable(*inputs))
            return [np.asarray(array) for array in arrays], np.asarray(finite)
        except Exception as error:
            raise execution_error(self.key, error) from error


def choose_mode(function: RegisteredFunction, computation: Computation) -> Mode:
    """Chooses the mode that costs fewer products: n of them forward, m in reverse.

    Args:
        function: The function.
        computation: What is wanted of it.

    Returns:
        "forward" when n <= m, or when a result is of a wider dtype than an argument,
        whose precision reverse mode would lose; else "reverse". The other where that
        does not exist.

    Raises:
        ServiceError: The function can't be traced for these shapes, or has no mode.
    """
    wrt = _wrt(function, computation)
    n = sum(math.prod(computation.inputs[place].shape) for place, _ in wrt)
    try:
        leaves = abstract_results(function.call, computation.inputs)
    except FunctionError as error:
        raise trace_error(function, error) from error
    m = sum(math.prod(leaf.array.shape) for leaf in leaves if is_inexact(leaf.array))
    modes: list[Mode] = ["forward", "reverse"]
    if m < n and not _widens(computation, wrt, leaves):
        modes.reverse()
    for mode in modes:
        if mode in function.spec.modes:
            return mode
    problems = {
        mode: mode_problem(function.call, computation.inputs, wrt, mode)
        for mode in modes
    }
    for mode in modes:
        if problems[mode] is None:
            return mode
    raise ServiceError(
        "MODE_UNSUPPORTED",
        f"{function.spec.resource} can't be differentiated with respect to "
        f"{', '.join(computation.wrt)}: "
        + "; ".join(f"{mode}: {problem}" for mode, problem in problems.items())
        + ". Choose wrt differently, or ask for value alone.",
        field="mode",
        function=function.spec.resource,
        wrt=", ".join(computation.wrt),
    )


def _widens(
    computation: Computation, wrt: list[tuple[int, str]], leaves: list[Leaf]
) -> bool:
    dtypes = [dtype_named(computation.inputs[place].dtype) for place, _ in wrt]
    return any(
        jnp.promote_types(leaf.array.dtype, dtype) != dtype
        for leaf in leaves
        if is_inexact(leaf.array)
        for dtype in dtypes
    )


def compile_program(
    function: RegisteredFunction, key: ProgramKey, device: Device, limits: Limits
) -> Program:
    """Traces, lowers and compiles a program.

    Args:
        function: The function that the key names.
        key: What to compute; its mode is decided.
        device: Where it is to run.
        limits: What it may take.

    Returns:
        The program.

    Raises:
        ServiceError: The function can't be traced for these shapes, a quantity does
            not exist for them, the program would take too much, or XLA fails.
    """
    computation = key.computation
    at_point, outline = _at_point(function, computation)
    sharding = SingleDeviceSharding(device)
    arguments = [
        jax.ShapeDtypeStruct(
            (key.bucket, *spec.shape)
            if key.bucket is not None and spec.is_batched
            else spec.shape,
            dtype_named(spec.dtype),
            sharding=sharding,
        )
        for spec in computation.inputs
    ]
    with x64(computation.inputs):
        try:
            lowered = jax.jit(_batched(function, key, at_point)).lower(*arguments)
        except ServiceError:
            raise
        # A function may raise anything, SystemExit included.
        except BaseException as error:
            wrt = _wrt(function, computation)
            raise explained(function, key, wrt, error) from error
        row_bytes = _row_bytes(lowered.out_info[0], key)
        # The smallest batch that this bucket serves.
        check_result_size(
            function.spec.resource,
            row_bytes,
            key.bucket // 2 + 1 if key.bucket else key.bucket,
            limits,
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
    _check_memory(function.spec.resource, key, executable, limits)
    return Program(key, tuple(outline), row_bytes, executable)


def _row_bytes(arrays: Sequence[Any], key: ProgramKey) -> int:
    """Returns the bytes of one point's result."""
    return sum(
        math.prod(array.shape[key.bucket is not None :]) * array.dtype.itemsize
        for array in arrays
    )


def check_result_size(
    resource: str, row_bytes: int, batch: int | None, limits: Limits
) -> None:
    """Refuses a result that could not be sent.

    Args:
        resource: The function's name, for the message.
        row_bytes: Bytes of one point's result.
        batch: How many points; None for one.
        limits: What may be sent.

    Raises:
        ServiceError: The result is larger.
    """
    # Even an empty batch has axes that numpy must be able to hold; and a point
    # without results still has a flag that they are finite.
    points = batch or 1
    if max(row_bytes, 1) * points > limits.result_bytes:
        raise ServiceError(
            "RESULT_TOO_LARGE",
            f"the result of {resource} at {points} points would take "
            f"{row_bytes * points} bytes, but this server sends at most "
            f"{limits.result_bytes}. Ask for fewer points at once or fewer quantities, "
            "or raise the server's max_message_bytes.",
            function=resource,
            result_bytes=row_bytes * points,
            max_result_bytes=limits.result_bytes,
        )


def _wrt(
    function: RegisteredFunction, computation: Computation
) -> list[tuple[int, str]]:
    names = [argument.name for argument in function.spec.signature.arguments]
    return [(names.index(name), name) for name in computation.wrt]


def _at_point(
    function: RegisteredFunction, computation: Computation
) -> tuple[Callable[..., Any], list[tuple[Quantity, Path]]]:
    """Returns the function to compile, and the outline that tracing it fills."""
    outline: list[tuple[Quantity, Path]] = []
    mode = computation.mode
    if mode == "auto":
        raise AssertionError("a program was asked for before its mode was decided")

    def at_point(*inputs: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        point = Point(
            function.call,
            inputs,
            resource=function.spec.resource,
            wrt=_wrt(function, computation),
            mode=mode,
        )
        leaves: list[tuple[Quantity, Path, jax.Array]] = [
            (quantity, path, array)
            for quantity in computation.quantities
            for path, array in trees.flatten(
                COMPUTE[quantity](point, computation.layout)
            )
        ]
        outline[:] = [(quantity, path) for quantity, path, _ in leaves]
        arrays = [array for _, _, array in leaves]
        finite = [jnp.all(jnp.isfinite(array)) for array in filter(is_inexact, arrays)]
        return arrays, jnp.all(jnp.array([True, *finite]))

    return at_point, outline


def _batched(
    function: RegisteredFunction, key: ProgramKey, at_point: Callable[..., Any]
) -> Callable[..., Any]:
    inputs = key.computation.inputs
    if key.bucket is None:
        return at_point
    if function.batchable:
        axes = tuple(0 if spec.is_batched else None for spec in inputs)
        return jax.vmap(at_point, in_axes=axes)

    def one_by_one(*arrays: jax.Array) -> Any:
        def at_row(rows: list[jax.Array]) -> Any:
            row = iter(rows)
            pairs = zip(inputs, arrays, strict=True)
            return at_point(*(next(row) if s.is_batched else x for s, x in pairs))

        pairs = zip(inputs, arrays, strict=True)
        return jax.lax.map(at_row, [x for s, x in pairs if s.is_batched])

    return one_by_one


def _check_memory(
    resource: str, key: ProgramKey, executable: Any, limits: Limits
) -> None:
    analysis = executable.memory_analysis()
    if analysis is None:
        return
    needed = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    if needed > limits.program_bytes:
        raise ServiceError(
            "DEVICE_OUT_OF_MEMORY",
            f"{resource} at {key.bucket or 1} points would take {needed} bytes of the "
            f"device's memory, but may take {limits.program_bytes}. Ask for fewer "
            "points at once, or raise the server's max_program_bytes.",
            function=resource,
            program_bytes=needed,
            max_program_bytes=limits.program_bytes,
        )


def without_quantities(computation: Computation) -> Computation:
    """Returns what the choice of a mode depends on, and nothing else."""
    inputs = tuple(
        InputSpec(spec.shape, spec.dtype, is_batched=False)
        for spec in computation.inputs
    )
    return replace(computation, quantities=(), layout="matrix", inputs=inputs)
