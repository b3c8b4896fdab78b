"""`Result` messages as values with arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from jacserve import tensors, trees
from jacserve.tensors import Array
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import MODE_OPTIONS, QUANTITIES, Mode, word


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the server's time for one call went, in seconds.

    Attributes:
        queue_s: Waiting for a free device thread.
        compile_s: Waiting for the program to be compiled; 0 when it was ready.
        execute_s: Running the program.
    """

    queue_s: float
    compile_s: float
    execute_s: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """The answer to one call: the quantities asked for, and how they came about.

    A quantity that was not asked for raises AttributeError. With a batch of b
    points, every array has a leading axis b.

    Attributes:
        function: The function and version that ran, such as "spherical@1".
        quantities: Everything that was asked for, by name.
        mode: The mode that ran, "forward" or "reverse"; None when no derivative
            was asked for.
        finite: Whether every number of the answer is finite.
        device: The device that ran it, such as "cpu:0".
        bucket: The rows computed: the batch padded to a bucket; None for one point.
        timing: Where the time went.
    """

    function: str
    quantities: Mapping[str, Any]
    mode: Mode | None
    finite: bool
    device: str
    bucket: int | None
    timing: Timing

    @property
    def value(self) -> Any:
        """f(x): an array, or a tuple or dictionary of arrays as f returns them."""
        return self._quantity("value")

    @property
    def jacobian(self) -> Any:
        """J [m, n]; in the blocks layout nested arrays of shape result + argument."""
        return self._quantity("jacobian")

    @property
    def gradient(self) -> Any:
        """J of a scalar function, [n]; in the blocks layout shaped like x."""
        return self._quantity("gradient")

    @property
    def determinant(self) -> Array:
        """Det J, a scalar."""
        return self._quantity("determinant")

    @property
    def abs_determinant(self) -> Array:
        """|det J|, a real scalar."""
        return self._quantity("abs_determinant")

    @property
    def slogdet(self) -> tuple[Array, Array]:
        """The sign of det J and log |det J|, two scalars."""
        return self._quantity("slogdet")

    def _quantity(self, name: str) -> Any:
        if name not in self.quantities:
            raise AttributeError(
                f"{name} was not asked for. Add it to quantities; they were "
                f"{', '.join(self.quantities)}."
            )
        return self.quantities[name]

    def __repr__(self) -> str:
        """Shows shapes instead of numbers."""
        shown = ", ".join(
            f"{name}{trees.format_path(path)}={array.dtype}{list(array.shape)}"
            for name, tree in self.quantities.items()
            for path, array in trees.flatten(tree)
        )
        return f"<Result {self.function} {shown} mode={self.mode} on {self.device}>"


def decode_result(message: pb.Result) -> Result:
    """Decodes an answer.

    Args:
        message: The message.

    Returns:
        The answer, with writable arrays of its own.
    """
    leaves: dict[str, list[tuple[trees.Path, Array]]] = {}
    for output in message.outputs:
        leaves.setdefault(word(QUANTITIES, output.quantity), []).append(
            (trees.decode_path(output.path), tensors.decode(output.tensor).copy())
        )
    return Result(
        function=message.function.removeprefix("functions/"),
        quantities={name: trees.unflatten(found) for name, found in leaves.items()},
        mode=cast("Mode", word(MODE_OPTIONS, message.mode)) if message.mode else None,
        finite=message.finite,
        device=message.device,
        bucket=message.bucket if message.HasField("bucket") else None,
        timing=Timing(
            queue_s=message.timing.queue_duration.ToTimedelta().total_seconds(),
            compile_s=message.timing.compile_duration.ToTimedelta().total_seconds(),
            execute_s=message.timing.execute_duration.ToTimedelta().total_seconds(),
        ),
    )
