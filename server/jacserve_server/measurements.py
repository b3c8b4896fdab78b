"""Which strategies were measured to be the fastest, kept in a file.

A measurement is a hint: it holds for a function's name, inputs and device, and whoever
takes it still checks that the mode exists. So a file that is old costs time at worst.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from jacserve.tensors import format_shape
from jacserve.vocabulary import Direction
from jacserve_server.work import InputSpec, ProgramKey, Strategy

_log = logging.getLogger(__name__)
_FILE = "strategies.json"


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one way to J took.

    Attributes:
        mode: "forward", "reverse" or "sparse".
        chunk_size: How many products at once; None for all.
        seconds: The median of its runs.
    """

    mode: str
    chunk_size: int | None
    seconds: float

    @property
    def label(self) -> str:
        """The way in words, such as "forward by 128"."""
        return self.mode + (f" by {self.chunk_size}" if self.chunk_size else "")

    @property
    def strategy(self) -> Strategy:
        """The strategy that was timed."""
        return Strategy(
            jacobian=cast("Direction", self.mode),
            chunk_size=self.chunk_size,
            is_measured=True,
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """The ways to one Jacobian, each timed.

    Attributes:
        function: Name and version.
        device: The kind of device, such as "cpu".
        inputs: Dtype and shape of each input at one point, such as "float64[3]".
        wrt: The arguments differentiated.
        bucket: The rows of the batch; None for one point.
        timings: The ways, the fastest first.
        rule_s: The seconds of the way that the shapes would have chosen.
    """

    function: str
    device: str
    inputs: tuple[str, ...]
    wrt: tuple[str, ...]
    bucket: int | None
    timings: tuple[Timing, ...]
    rule_s: float

    @property
    def subject(self) -> tuple[Any, ...]:
        """What was measured, whatever came of it."""
        return self.function, self.device, self.inputs, self.wrt, self.bucket

    @property
    def speedup(self) -> float:
        """How many times faster the fastest is than the rule."""
        return self.rule_s / self.timings[0].seconds


def describe_input(spec: InputSpec) -> str:
    """Returns an input as measurements name it, such as "float64[2, 3]"."""
    return f"{spec.dtype}{format_shape(spec.shape)}"


class Measurements:
    """All that was measured, by what it was measured of."""

    def __init__(self, measurements: Iterable[Measurement] = ()) -> None:
        """Keeps measurements; of two of the same subject, the later."""
        self._by_subject = {each.subject: each for each in measurements}

    @staticmethod
    def load(folder: Path) -> "Measurements":
        """Reads the file of a folder; one that is not there or not whole is empty."""
        path = folder / _FILE
        try:
            entries: Any = json.loads(path.read_bytes())
            return Measurements(map(_decode, entries))
        except FileNotFoundError:
            return Measurements()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("%s can't be read, and is left aside: %s", path, error)
            return Measurements()

    def save(self, folder: Path) -> Path:
        """Writes the file of a folder, whole or not at all.

        Args:
            folder: The folder; made if need be, for its owner alone.

        Returns:
            The file's path.

        Raises:
            OSError: It can't be written.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        entries = [asdict(each) for each in self._by_subject.values()]
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(entries, file, indent=1)
        os.replace(file.name, folder / _FILE)
        return folder / _FILE

    def updated(self, measurements: Iterable[Measurement]) -> "Measurements":
        """Returns these and others; of two of the same subject, the other."""
        return Measurements([*self._by_subject.values(), *measurements])

    def of(self, function: str, device: str) -> list[Measurement]:
        """Returns what was measured of a function on a kind of device."""
        return [
            each
            for each in self._by_subject.values()
            if (each.function, each.device) == (function, device)
        ]

    def find(self, key: ProgramKey, device: str) -> list[Strategy]:
        """Returns the ways to the J of a program, the fastest first.

        Args:
            key: The program. A batch that was not measured itself counts as the one
                nearest in size that was.
            device: The kind of device.

        Returns:
            The strategies; none where nothing was measured.
        """
        computation = key.computation
        inputs = tuple(map(describe_input, computation.inputs))
        alike = [
            each
            for each in self.of(computation.function, device)
            if (each.inputs, each.wrt) == (inputs, computation.wrt)
        ]
        if not alike:
            return []
        rows = math.log2(key.bucket or 1)
        nearest = min(alike, key=lambda each: abs(math.log2(each.bucket or 1) - rows))
        return [timing.strategy for timing in nearest.timings]


def _decode(entry: Mapping[str, Any]) -> Measurement:
    timings: Sequence[Mapping[str, Any]] = entry["timings"]
    return Measurement(
        function=entry["function"],
        device=entry["device"],
        inputs=tuple(entry["inputs"]),
        wrt=tuple(entry["wrt"]),
        bucket=entry["bucket"],
        timings=tuple(Timing(**timing) for timing in timings),
        rule_s=entry["rule_s"],
    )
