"""Rounds of measurements, and the rows they become.

In each round everything is measured once, in an order of its own, and compared with
its floor of the same round; figures and ratios are medians over the rounds. What slows
the machine for a while slows both.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Rounds of everything.
        calls: Small calls of each kind in a round.
        seconds: Seconds of each load of concurrent callers.
    """

    rounds: int
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio, or a figure without a floor, should be."""

    bound: float
    is_most: bool

    def is_met(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value <= self.bound if self.is_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.is_most else '>='} {self.bound:g}"


def at_most(bound: float) -> Target:
    """Returns the target of what should be small."""
    return Target(bound, is_most=True)


def at_least(bound: float) -> Target:
    """Returns the target of what should be large."""
    return Target(bound, is_most=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside its floor.

    Attributes:
        name: What was measured.
        unit: Of figure and floor.
        figure: The median over the rounds.
        floor: The same of what it is compared with; None where it is compared with
            nothing.
        floor_name: What that is.
        ratio: The median of the rounds' ratios, figure over floor.
        least: The least of them; of the figures where there is no floor.
        most: The most.
        target: What the ratio should be, or the figure where there is no floor.
    """

    name: str
    unit: str
    figure: float
    floor: float | None
    floor_name: str
    ratio: float | None
    least: float
    most: float
    target: Target | None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.target.is_met(self.figure if self.ratio is None else self.ratio)


def compared(
    name: str,
    unit: str,
    figures: Array,
    floor_name: str,
    floors: Array,
    target: Target | None,
) -> Row:
    """Makes a row of figures and floors, an entry for each round."""
    ratios = figures / floors
    return Row(
        name=name,
        unit=unit,
        figure=float(np.median(figures)),
        floor=float(np.median(floors)),
        floor_name=floor_name,
        ratio=float(np.median(ratios)),
        least=float(ratios.min()),
        most=float(ratios.max()),
        target=target,
    )


def alone(name: str, unit: str, figures: Array, target: Target | None) -> Row:
    """Makes a row of figures that have no floor, an entry for each round."""
    return Row(
        name=name,
        unit=unit,
        figure=float(np.median(figures)),
        floor=None,
        floor_name="",
        ratio=None,
        least=float(figures.min()),
        most=float(figures.max()),
        target=target,
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of what has no target: curves, and where time goes."""

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """What one file of these benchmarks has measured.

    Attributes:
        rows: Figures beside their floors.
        grids: Further tables.
        curves: What is plotted: numbers by name, as JSON takes them.
    """

    rows: Sequence[Row] = ()
    grids: Sequence[Grid] = ()
    curves: Mapping[str, Any] = field(default_factory=dict)


def interleaved(
    measures: Sequence[Callable[[], Mapping[str, float]]],
    rounds: int,
    random: np.random.Generator,
) -> dict[str, Array]:
    """Measures everything once in each round, in an order of its own.

    Args:
        measures: Each measures some figures, by name.
        rounds: How many rounds.
        random: Of the order.

    Returns:
        The figures by name, an entry for each round.
    """
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for place in random.permutation(len(measures)).tolist():
            for name, figure in measures[place]().items():
                found.setdefault(name, []).append(figure)
    return {name: np.array(figures) for name, figures in found.items()}


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def mixed_seconds(
    calls: Mapping[str, Callable[[], object]], turns: int, random: np.random.Generator
) -> dict[str, Array]:
    """Times small calls one by one: in each turn all of them, in an order of its own.

    Args:
        calls: The calls by name.
        turns: How many turns.
        random: Of the order.

    Returns:
        Seconds of each call by name, [turns].
    """
    names = list(calls)
    found = np.zeros((turns, len(names)))
    for turn in range(turns):
        for place in random.permutation(len(names)).tolist():
            found[turn, place] = seconds_of(calls[names[place]])
    return dict(zip(names, found.T, strict=True))
