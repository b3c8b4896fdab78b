"""The frozen values between the service and the device.

A query that fits its function is `Work`: a `Computation` on arrays. The program that
does it is named by a `ProgramKey`; what comes back is an `Outcome`. All of it is
plain data: names, shapes and numpy arrays, no closures, so that the executor may
live in another process.
"""

from dataclasses import dataclass

from jacserve.tensors import Array
from jacserve.trees import Path
from jacserve.vocabulary import Layout, Mode, ModeOption, Quantity


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
class Computation:
    """What to compute of a function, whatever the points and however many.

    Attributes:
        function: Name and version, "spherical@1".
        quantities: What to compute, in the order of the contract.
        wrt: The arguments differentiated, in order; empty without a derivative.
        mode: How to differentiate; None without a derivative.
        layout: How derivatives are laid out; "matrix" where it makes no difference.
        inputs: The arguments, in declared order.
    """

    function: str
    quantities: tuple[Quantity, ...]
    wrt: tuple[str, ...]
    mode: ModeOption | None
    layout: Layout
    inputs: tuple[InputSpec, ...]


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """Everything that a compiled program depends on, but the device.

    Attributes:
        computation: What it computes.
        bucket: The rows of its batch; None for one point without a batch axis.
    """

    computation: Computation
    bucket: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A query that fits its function.

    Attributes:
        computation: What to compute.
        inputs: The arrays, in declared order; batched ones have `batch` rows.
        batch: The rows; None for one point.
    """

    computation: Computation
    inputs: tuple[Array, ...]
    batch: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of a piece of work.

    Attributes:
        function: Name and version of the function that ran.
        outputs: Quantity, path and array, in the order of the contract.
        finite: For each row, whether all of its numbers are finite; a scalar for
            one point.
        mode: The mode that ran; None without a derivative.
        bucket: The rows that the program computed; None for one point.
        device: The device that ran it.
        execute_s: Seconds of running it.
        queue_s: Seconds of waiting for the device.
        compile_s: Seconds of waiting for the program to be compiled.
    """

    function: str
    outputs: tuple[tuple[Quantity, Path, Array], ...]
    finite: Array
    mode: Mode | None
    bucket: int | None
    device: str
    execute_s: float
    queue_s: float = 0.0
    compile_s: float = 0.0
