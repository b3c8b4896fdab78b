"""Compiled programs: one for each `ProgramKey`, made once, kept while in use."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Executor as Pool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jacserve import trees
from jacserve.tensors import Array, dtype_named
from jacserve.trees import Path
from jacserve.vocabulary import Mode, Quantity
from jacserve_server.catalog import RegisteredFunction, result_size, x64
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.query import ProgramKey
from jacserve_server.transforms import evaluate
from jacserve_server.transforms.point import Point, is_inexact

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
# Type checkers see a variable in what is a class.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]


class SingleFlight(Generic[K, V]):
    """A bounded cache whose entries are made once, however many ask meanwhile.

    Used from one event loop; making runs in a pool. Whoever stops waiting leaves the
    making to the others and to the next who asks. What fails is not kept.
    """

    def __init__(self, pool: Pool, *, capacity: int) -> None:
        """Starts empty.

        Args:
            pool: Where entries are made.
            capacity: The most entries kept; the least recently used goes first.
        """
        self._pool = pool
        self._capacity = capacity
        self._entries: OrderedDict[K, asyncio.Future[V]] = OrderedDict()

    def __len__(self) -> int:
        """Returns the number of entries, unfinished ones included."""
        return len(self._entries)

    def is_ready(self, key: K) -> bool:
        """Tells whether an entry is there and finished."""
        return key in self._entries and self._entries[key].done()

    async def get(self, key: K, make: Callable[[], V]) -> V:
        """Returns an entry, made if need be.

        Args:
            key: Which entry.
            make: Makes it; runs in the pool.

        Returns:
            The entry.

        Raises:
            Exception: Whatever `make` raises, to all who wait for it.
        """
        entry = self._entries.get(key)
        if entry is None:
            loop = asyncio.get_running_loop()
            entry = asyncio.ensure_future(loop.run_in_executor(self._pool, make))
            self._entries[key] = entry
            entry.add_done_callback(lambda made: self._settle(key, made))
        self._entries.move_to_end(key)
        return await asyncio.shield(entry)

    def _settle(self, key: K, entry: asyncio.Future[V]) -> None:
        if entry.cancelled() or entry.exception() is not None:
            del self._entries[key]
        finished = (key for key, entry in self._entries.items() if entry.done())
        for key in list(finished)[: max(0, len(self) - self._capacity)]:
            del self._entries[key]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A compiled program on one device.

    Attributes:
        key: What it computes; the mode is never "auto".
        outline: Quantity and path of each of its arrays.
    """

    key: ProgramKey
    outline: tuple[tuple[Quantity, Path], ...]
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
            with x64(self.key.inputs):
                arrays, finite = jax.block_until_ready(self._executable(*inputs))
        except jax.errors.JaxRuntimeError as error:
            raise _execution_error(self.key, error) from error
        return [np.asarray(array) for array in arrays], np.asarray(finite)


def choose_mode(function: RegisteredFunction, key: ProgramKey) -> Mode:
    """Chooses the mode that costs fewer products: n of them forward, m in reverse.

    Args:
        function: A function that has both modes.
        key: The program wanted.

    Returns:
        "forward" when n <= m, else "reverse".

    Raises:
        ServiceError: The function can't be traced for these shapes.
    """
    names = [argument.name for argument in function.spec.signature.arguments]
    n = sum(math.prod(key.inputs[names.index(name)].shape) for name in key.wrt)
    with _traced(function):
        m = result_size(function.call, key.inputs)
    return "forward" if n <= m else "reverse"


def compile_program(
    function: RegisteredFunction,
    key: ProgramKey,
    device: Device,
    *,
    max_result_bytes: int,
) -> Program:
    """Traces, lowers and compiles a program.

    Args:
        function: The function that the key names.
        key: What to compute; its mode is not "auto".
        device: Where it is to run.
        max_result_bytes: The most that it may return.

    Returns:
        The program.

    Raises:
        ServiceError: The function can't be traced for these shapes, a quantity does
            not exist for them, the result would be too large, or XLA fails.
    """
    at_point, outline = _at_point(function, key)
    batched = at_point if key.bucket is None else _batched(at_point, key, function)
    sharding = SingleDeviceSharding(device)
    structs = [
        jax.ShapeDtypeStruct(
            (key.bucket, *spec.shape) if spec.is_batched else spec.shape,
            dtype_named(spec.dtype),
            sharding=sharding,
        )
        for spec in key.inputs
    ]
    with x64(key.inputs):
        with _traced(function):
            lowered = jax.jit(batched).lower(*structs)
        _check_result_size(lowered, function, max_result_bytes)
        try:
            executable = lowered.compile()
        except Exception as error:
            raise ServiceError(
                "COMPILATION_FAILED",
                f"XLA could not compile {function.spec.resource}: "
                f"{describe_exception(error)}",
                function=function.spec.qualified_name,
            ) from error
    return Program(key, tuple(outline), executable)


def _at_point(
    function: RegisteredFunction, key: ProgramKey
) -> tuple[Callable[..., Any], list[tuple[Quantity, Path]]]:
    """Returns the function to compile, and the outline that tracing it fills."""
    outline: list[tuple[Quantity, Path]] = []
    names = [argument.name for argument in function.spec.signature.arguments]

    def at_point(*inputs: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        point = Point(
            function.call,
            inputs,
            resource=function.spec.resource,
            wrt=[(names.index(name), name) for name in key.wrt],
            mode=key.mode,
        )
        leaves: list[tuple[Quantity, Path, jax.Array]] = [
            (quantity, path, array)
            for quantity, tree in evaluate(point, key.quantities, key.layout).items()
            for path, array in trees.flatten(tree)
        ]
        outline[:] = [(quantity, path) for quantity, path, _ in leaves]
        arrays = [array for _, _, array in leaves]
        finite = [jnp.all(jnp.isfinite(array)) for array in filter(is_inexact, arrays)]
        return arrays, jnp.all(jnp.array([True, *finite]))

    return at_point, outline


def _batched(
    at_point: Callable[..., Any], key: ProgramKey, function: RegisteredFunction
) -> Callable[..., Any]:
    if function.batchable:
        axes = tuple(0 if spec.is_batched else None for spec in key.inputs)
        return jax.vmap(at_point, in_axes=axes)

    def one_by_one(*inputs: jax.Array) -> Any:
        def at_row(rows: list[jax.Array]) -> Any:
            row = iter(rows)
            pairs = zip(key.inputs, inputs, strict=True)
            return at_point(*(next(row) if s.is_batched else x for s, x in pairs))

        pairs = zip(key.inputs, inputs, strict=True)
        return jax.lax.map(at_row, [x for s, x in pairs if s.is_batched])

    return one_by_one


@contextmanager
def _traced(function: RegisteredFunction) -> Generator[None]:
    """Reports whatever the user's function raises while JAX traces it."""
    try:
        yield
    except ServiceError:
        raise
    # A function may raise anything, SystemExit included.
    except BaseException as error:
        raise ServiceError(
            "TRACE_FAILED",
            f"{function.spec.resource} raised {describe_exception(error)}. "
            "Pass inputs that it can take, or mend the function.",
            function=function.spec.qualified_name,
        ) from error


def _check_result_size(
    lowered: Any, function: RegisteredFunction, max_result_bytes: int
) -> None:
    arrays, _ = lowered.out_info
    sizes = [math.prod(array.shape) * array.dtype.itemsize for array in arrays]
    if sum(sizes) > max_result_bytes:
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise ServiceError(
            "RESULT_TOO_LARGE",
            f"the result of {function.spec.resource} would take {sum(sizes)} bytes "
            f"(shapes {shapes}), but this server sends at most {max_result_bytes}. "
            "Ask for fewer points at once or fewer quantities, or raise the server's "
            "max_message_bytes.",
            result_bytes=sum(sizes),
            max_result_bytes=max_result_bytes,
        )


def _execution_error(key: ProgramKey, error: Exception) -> ServiceError:
    text = describe_exception(error)
    if str(error).startswith("RESOURCE_EXHAUSTED"):
        return ServiceError(
            "DEVICE_OUT_OF_MEMORY",
            f"functions/{key.function} does not fit into the device's memory at "
            f"{key.bucket or 1} points: {text}. Ask for fewer points at once.",
            function=key.function,
            bucket=key.bucket or 1,
        )
    return ServiceError(
        "EXECUTION_FAILED",
        f"functions/{key.function} failed while it ran: {text}",
        function=key.function,
    )
