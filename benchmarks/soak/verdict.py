"""Whether the soak has held, in a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.soak.server import Sample

MIB = 2**20
# Of the time since the server was last started, what counts as warming up.
WARM_UP = 0.4
# In less time than this memory is not judged: it rises and falls by as much by itself,
# since what is free goes back to the system every half a minute.
LEAST_JUDGED_S = 90.0
# What the medians of the first and the last third after that may differ by.
MOST_GROWTH_MIB = 24.0
MOST_THREADS = 4
MOST_FILES = 12
# A worker lives for some seconds here, in which its pools of threads fill.
MOST_WORKER_GROWTH_MIB = 48.0
MOST_WORKER_THREADS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the verdict.

    Attributes:
        what: What is said of.
        found: What was found.
        bound: What it had to be.
        holds: Whether it was that; None where nothing is asked of it.
    """

    what: str
    found: str
    bound: str = ""
    holds: bool | None = None


def flat_lines(samples: Sequence[Sample]) -> list[Line]:
    """Judges whether what a server and its worker take is flat.

    Args:
        samples: Since it was last started.

    Returns:
        A line for memory, one for threads and one for files, of each.
    """
    start, stop = samples[0].at, samples[-1].at
    warm = [s for s in samples if s.at >= start + WARM_UP * (stop - start)]
    workers = [s.worker for s in warm if s.worker is not None]
    lines = _flat("server", warm, MOST_GROWTH_MIB, MOST_THREADS)
    if not workers:
        return lines
    growth = MOST_WORKER_GROWTH_MIB, MOST_WORKER_THREADS
    return [*lines, *_flat("worker", workers, *growth)]


def _flat(
    whose: str, warm: Sequence[Sample], most_mib: float, most_threads: int
) -> list[Line]:
    third = max(1, len(warm) // 3)
    first, last = warm[:third], warm[-third:]
    minutes = np.array([s.at - warm[0].at for s in warm]) / 60
    memory = np.array([s.memory_bytes for s in warm]) / MIB
    slope = float(np.polyfit(minutes, memory, 1)[0]) if len(warm) > 1 else 0.0

    def medians(name: str) -> tuple[float, float]:
        one, other = ([getattr(s, name) for s in part] for part in (first, last))
        return float(np.median(one)), float(np.median(other))

    is_long = last[-1].at - first[0].at >= LEAST_JUDGED_S

    def line(name: str, unit: str, scale: float, most: float, extra: str = "") -> Line:
        before, after = (each / scale for each in medians(name))
        what, found = (
            f"{unit} of the {whose}",
            f"{before:,.0f} then {after:,.0f}{extra}",
        )
        if name == "memory_bytes" and not is_long:
            return Line(what, found, "too short to tell")
        return Line(what, found, f"at most {most:.0f} more", after - before <= most)

    return [
        line("memory_bytes", "MiB", MIB, most_mib, f" ({slope:+.1f} MiB a minute)"),
        line("threads", "threads", 1, most_threads),
        line("files", "open files", 1, MOST_FILES),
    ]


def print_verdict(lines: Sequence[Line], console: Console) -> bool:
    """Prints the table; returns whether everything holds."""
    table = Table(title="The soak", title_justify="left")
    for heading in ("", "found", "bound", "holds"):
        table.add_column(heading)
    for line in lines:
        holds = "" if line.holds is None else "yes" if line.holds else "NO"
        table.add_row(line.what, line.found, line.bound, holds)
    console.print(table)
    return all(line.holds is not False for line in lines)
