"""What every file of these benchmarks measures with: a server, a client, the floors."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import jacserve
from benchmarks.fast_path.processes import Process, running, serving
from benchmarks.fast_path.rounds import Array, Effort
from jacserve.benching import empty_call
from jacserve.connection import connection


@dataclass(frozen=True, slots=True)
class Setting:
    """The server that most is measured on, and what it is compared with.

    Attributes:
        effort: How much is measured.
        random: Of points, and of the order of everything.
        device: Where functions run.
        cache_dir: The server's, for this run alone.
        target: Its address.
        client: A client of it.
        empty: Makes an empty call on it.
        reference: Calls compiled functions in a process of its own.
    """

    effort: Effort
    random: np.random.Generator
    device: str
    cache_dir: Path
    target: str
    client: jacserve.Client
    empty: Callable[[], object]
    reference: Process

    def in_process_s(
        self, function: str, n: int, *, batch: int | None = None, repeats: int = 100
    ) -> float:
        """Returns the median seconds of compiled calls in the other process."""
        seconds = self.reference.ask(
            function=function, n=n, batch=batch, repeats=repeats
        )
        return float(np.median(seconds))

    def point(self, *shape: int) -> Array:
        """Draws a point, or a batch of points."""
        return self.random.normal(size=shape).astype("f4")


@contextmanager
def prepared(effort: Effort, device: str, cache_dir: Path) -> Generator[Setting]:
    """Starts the processes; ends them with the block."""
    with (
        serving(device, cache_dir) as (target, _),
        running("benchmarks.fast_path.reference", device) as reference,
        jacserve.Client(target) as client,
        empty_call(connection(target, {}), "layer") as empty,
    ):
        yield Setting(
            effort=effort,
            random=np.random.default_rng(0),
            device=device,
            cache_dir=cache_dir,
            target=target,
            client=client,
            empty=empty.make,
            reference=reference,
        )
