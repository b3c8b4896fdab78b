"""The frozen values that flow from the service to the device and back.

A `Query` is what a client asked; `Work` is the same after it was checked against
the function's signature; an `Outcome` is what came of it. All of it is plain data:
names, shapes and numpy arrays, no closures, so that the executor may live in
another process.
"""

from dataclasses import dataclass

from jacserve.tensors import Array
from jacserve.trees import Path
from jacserve.vocabulary import Layout, Mode, Quantity


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What a client asked of one function.

    Attributes:
        function: A name, with a version or without.
        inputs: Argument names ("" for the next in order) and arrays.
        quantities: What to compute, in the order asked, without repeats.
        wrt: Arguments to differentiate with respect to; empty for all.
        mode: "auto", "forward" or "reverse".
        layout: "matrix" or "blocks".
        cast: Whether inputs may be converted to a dtype that is accepted.
        require_finite: Whether NaN and Inf are errors.
    """

    function: str
    inputs: tuple[tuple[str, Array], ...]
    quantities: tuple[Quantity, ...]
    wrt: tuple[str, ...] = ()
    mode: Mode = "auto"
    layout: Layout = "matrix"
    cast: bool = False
    require_finite: bool = False


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One argument as a program takes it.

    Attributes:
        shape: The shape of one point.
        dtype: The dtype's name.
        is_batched: Whether it has one value for each row of the batch.
    """

    shape: tuple[int, ...]
    dtype: str
    is_batched: bool


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """Everything that a compiled program depends on, but the device.

    Attributes:
        function: Name and version, "spherical@1".
        quantities: What it computes, in order.
        wrt: The arguments differentiated, in order.
        mode: "auto" until a program is chosen; None without a derivative.
        layout: "matrix" or "blocks".
        inputs: The arguments, in declared order.
        bucket: The rows of its batch; None for one point without a batch axis.
    """

    function: str
    quantities: tuple[Quantity, ...]
    wrt: tuple[str, ...]
    mode: Mode | None
    layout: Layout
    inputs: tuple[InputSpec, ...]
    bucket: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A query that fits its function: which program to run, and on what.

    Attributes:
        key: The program.
        inputs: The arrays, in declared order; batched ones have `batch` rows.
        batch: The rows asked for, at most the key's bucket; None for one point.
    """

    key: ProgramKey
    inputs: tuple[Array, ...]
    batch: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of a piece of work.

    Attributes:
        key: The program that ran; its mode is never "auto".
        outputs: Quantity, path and array, in the order asked.
        finite: For each row, whether all of its numbers are finite; a scalar for
            one point.
        device: The device that ran it.
        queue_s: Seconds of waiting for a device thread.
        compile_s: Seconds of waiting for the program to be compiled.
        execute_s: Seconds of running it.
    """

    key: ProgramKey
    outputs: tuple[tuple[Quantity, Path, Array], ...]
    finite: Array
    device: str
    queue_s: float
    compile_s: float
    execute_s: float
