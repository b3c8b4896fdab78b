"""What a server says of its functions, as values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from jacserve import framing, trees
from jacserve.sparse import Pattern, decode_pattern
from jacserve.tensors import format_shape
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import (
    DTYPES,
    ISOLATIONS,
    MODE_OPTIONS,
    MODES,
    Direction,
    Isolation,
    Mode,
    ModeOption,
    word,
)

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class ArgumentInfo:
    """One array argument.

    Attributes:
        name: The parameter's name.
        dtypes: The dtypes that it accepts, the widest first.
        shape: Sizes, names such as "n" that each call binds, and expressions of
            such names.
        differentiable: Whether a derivative with respect to it exists.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: Shape
    differentiable: bool


@dataclass(frozen=True, slots=True)
class ResultInfo:
    """One array of a function's result.

    Attributes:
        path: Dictionary keys and tuple indices that lead to it; empty when the
            result is one array.
        shape: Like an argument's; None where the size shows only when it runs.
    """

    path: trees.Path
    shape: Shape


@dataclass(frozen=True, slots=True)
class MeasuredStrategy:
    """The fastest of the ways to J that were timed.

    Attributes:
        inputs: The inputs it was measured at, such as "x: float64[3]".
        wrt: The arguments differentiated.
        bucket: The rows of the batch; None for one point.
        mode: The fastest mode.
        chunk_size: How many products it makes at once; None for all.
        speedup: How many times faster it was than the rule by shape.
    """

    inputs: str
    wrt: tuple[str, ...]
    bucket: int | None
    mode: Mode
    chunk_size: int | None
    speedup: float


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Where a Jacobian or Hessian can be other than zero, whatever the point.

    Attributes:
        pattern: The pattern.
        color_count: How many products give the whole matrix.
        mode: Which: "forward" or "reverse"; "forward_over_reverse" for a Hessian.
        inputs: The inputs it was found at, such as "u: float32[32]".
    """

    pattern: Pattern
    color_count: int
    mode: Mode
    inputs: str


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """A registered function.

    Attributes:
        name: Its name, without the version.
        version: Its version.
        documentation: What its author says of it.
        arguments: The arguments, in declared order.
        results: The arrays of the result, in declared order.
        modes: The modes in which it can be differentiated.
        missing_modes: The modes that it lacks, with the reason of each.
        preferred_mode: What "auto" stands for; "auto" itself when shapes decide.
        max_batch: The most points of one call; None for no limit.
        measured_strategies: What was measured to be the fastest way to J, and is
            what "auto" stands for at these inputs.
        sizes: Sizes of its symbolic dimensions at which it is known to work.
        isolation: "process" if it runs in a process of its own, which is ended when
            it does not end; else "none".
        quarantine_reason: Why it is not run any more; "" where it is.
    """

    name: str
    version: int
    documentation: str
    arguments: tuple[ArgumentInfo, ...]
    results: tuple[ResultInfo, ...]
    modes: tuple[Direction, ...]
    missing_modes: Mapping[Direction, str]
    preferred_mode: ModeOption
    max_batch: int | None
    measured_strategies: tuple[MeasuredStrategy, ...]
    sizes: Mapping[str, int]
    isolation: Isolation
    quarantine_reason: str

    @property
    def signature(self) -> str:
        """The function in one line, such as "spherical(x: [3]) -> [3]"."""
        arguments = ", ".join(
            f"{argument.name}: {format_shape(argument.shape)}"
            for argument in self.arguments
        )
        results = ", ".join(
            trees.format_path(result.path)
            + (": " if result.path else "")
            + format_shape(tuple("?" if d is None else d for d in result.shape))
            for result in self.results
        )
        return f"{self.name}({arguments}) -> {results}"


def decode_function(message: pb.Function) -> FunctionInfo:
    """Decodes a function's description."""
    name, _, version = message.name.removeprefix("functions/").rpartition("@")
    return FunctionInfo(
        name=name,
        version=int(version),
        documentation=message.documentation,
        arguments=tuple(
            ArgumentInfo(
                name=argument.name,
                dtypes=tuple(word(DTYPES, dtype) for dtype in argument.dtypes),
                shape=_decode_shape(argument.shape),
                differentiable=argument.differentiable,
            )
            for argument in message.arguments
        ),
        results=tuple(
            ResultInfo(
                path=trees.decode_path(result.path), shape=_decode_shape(result.shape)
            )
            for result in message.results
        ),
        modes=tuple(_direction(mode) for mode in message.modes),
        missing_modes={
            _direction(gap.mode): gap.reason for gap in message.missing_modes
        },
        preferred_mode=cast("ModeOption", word(MODE_OPTIONS, message.preferred_mode)),
        max_batch=message.max_batch or None,
        measured_strategies=tuple(
            MeasuredStrategy(
                inputs=measured.inputs,
                wrt=tuple(measured.wrt),
                bucket=measured.bucket if measured.HasField("bucket") else None,
                mode=cast("Mode", word(MODES, measured.mode)),
                chunk_size=measured.chunk_size or None,
                speedup=measured.speedup,
            )
            for measured in message.measured_strategies
        ),
        sizes=dict(message.sizes),
        isolation=cast("Isolation", word(ISOLATIONS, message.isolation)),
        quarantine_reason=message.quarantine_reason,
    )


def decode_sparsity(raw: bytes) -> Sparsity:
    """Decodes a pattern and what it costs.

    Args:
        raw: A serialized pb.Sparsity.

    Returns:
        The pattern.
    """
    message, payloads = framing.opened(raw, pb.Sparsity)
    return Sparsity(
        pattern=decode_pattern(message.pattern, iter(payloads)),
        color_count=message.color_count,
        mode=cast("Mode", word(MODES, message.mode)),
        inputs=message.inputs,
    )


def _direction(number: int) -> Direction:
    return cast("Direction", word(MODES, number))


def _decode_shape(dimensions: Iterable[pb.Dimension]) -> Shape:
    return tuple(
        getattr(dimension, kind) if (kind := dimension.WhichOneof("kind")) else None
        for dimension in dimensions
    )
