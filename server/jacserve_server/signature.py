"""What a function takes, as plain data, and how a query's shapes bind to it.

A dimension is a fixed size, a name such as "n" that each query binds, or an
expression of names such as "2*n + 1".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jacserve.dimensions import Dimension, size_of
from jacserve.trees import Path
from jacserve.vocabulary import Direction, ModeOption

# The widest first: the dtype that a cast chooses loses the least.
DTYPES = (
    "complex128",
    "complex64",
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)
INEXACT = frozenset(DTYPES[:6])
WIDE = frozenset({"float64", "complex128", "int64", "uint64"})
_TRIAL_DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64")


@dataclass(frozen=True, slots=True)
class Argument:
    """One array argument.

    Attributes:
        name: The parameter's name.
        dtypes: The names of the dtypes accepted, the widest first.
        shape: The dimensions of one point.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[Dimension, ...]

    @property
    def trial_dtype(self) -> str:
        """The dtype that it is traced with where no query has given one.

        Complex numbers come last, because a function of real numbers may not be
        holomorphic.
        """
        suitable = [dtype for dtype in _TRIAL_DTYPES if dtype in self.dtypes]
        return suitable[0] if suitable else self.dtypes[-1]

    @property
    def is_differentiable(self) -> bool:
        """Whether it accepts real or complex numbers at all."""
        return not INEXACT.isdisjoint(self.dtypes)


@dataclass(frozen=True, slots=True)
class Signature:
    """A function's arguments, in declared order."""

    arguments: tuple[Argument, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """The names that a query binds to sizes, in order of appearance."""
        return tuple(
            dict.fromkeys(
                dimension
                for argument in self.arguments
                for dimension in argument.shape
                if isinstance(dimension, str) and dimension.isidentifier()
            )
        )

    def shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Returns the arguments' shapes for given sizes of the symbols.

        Args:
            sizes: A size for each of `symbols`.

        Returns:
            One shape for each argument.

        Raises:
            DimensionError: An expression can't be evaluated.
        """
        return [
            tuple(size_of(dimension, sizes) for dimension in argument.shape)
            for argument in self.arguments
        ]


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """All that is known of a registered function, but its code.

    Attributes:
        name: Its name.
        version: Its version, 1 or more.
        documentation: Its docstring.
        signature: What it takes.
        results: Path and shape of each array that it returns, in declared order;
            a dimension that shows only when it runs is None.
        modes: The modes in which it can be differentiated.
        missing_modes: Why it lacks each of the others.
        preferred_mode: What "auto" stands for; "auto" lets the shapes decide.
        max_batch: The most points of one query, or None.
        sizes: Sizes of its symbolic dimensions at which it could be traced.
        declared_sizes: Those of them that its author named.
    """

    name: str
    version: int
    documentation: str
    signature: Signature
    results: tuple[tuple[Path, tuple[Dimension | None, ...]], ...]
    modes: tuple[Direction, ...]
    missing_modes: Mapping[Direction, str]
    preferred_mode: ModeOption
    max_batch: int | None
    sizes: Mapping[str, int]
    declared_sizes: Mapping[str, int]

    @property
    def qualified_name(self) -> str:
        """Name and version, "spherical@1"."""
        return f"{self.name}@{self.version}"

    @property
    def resource(self) -> str:
        """The name as messages show it, "functions/spherical"."""
        return f"functions/{self.name}"


def trial_sizes(symbols: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Yields sizes to try a function with symbolic dimensions at.

    Different names get different sizes first, so that a function which confuses
    them shows it; then come sizes that suit functions which want even, equal,
    larger or very small ones.

    Args:
        symbols: The names.

    Yields:
        A size for each name.
    """
    primes = (3, 5, 7, 11, 13, 17, 19, 23)
    yield {symbol: primes[place % len(primes)] for place, symbol in enumerate(symbols)}
    yield {symbol: 4 * (place + 1) for place, symbol in enumerate(symbols)}
    for size in (4, 16, 64, 9, 2, 1):
        yield dict.fromkeys(symbols, size)
