"""What throughput is measured of: plain data, for the loop's process as well."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from jacserve.vocabulary import Quantity


@dataclass(frozen=True, slots=True)
class Case:
    """One function, and one quantity of it.

    Attributes:
        function: The function.
        n: Its inputs, and its results.
        dtype: Of both.
        quantity: What is computed.
        is_heavy: Whether it takes long, or gives 16 KiB, at each point.
        goal: The least ratio of a job's rate to that of the loop.
    """

    function: str
    n: int
    dtype: str
    quantity: Quantity
    is_heavy: bool = False
    goal: float = 0.9

    @property
    def label(self) -> str:
        """What it is called."""
        return f"n = {self.n}, {self.dtype}, {self.quantity}"


_CASES = (
    Case("sphere", 3, "float32", "jacobian"),
    Case("sphere", 3, "float32", "slogdet"),
    Case("sphere", 3, "float64", "jacobian"),
    Case("sphere", 3, "float64", "slogdet"),
    Case("layers", 64, "float32", "jacobian", is_heavy=True, goal=0.95),
    Case("layers", 64, "float32", "slogdet", is_heavy=True, goal=0.95),
    Case("layers", 64, "float32", "vjp", goal=0.95),
)
CASES: Mapping[str, Case] = MappingProxyType({case.label: case for case in _CASES})


def cotangent(n: int) -> np.ndarray:
    """Returns the u of u^T J, the same at all points."""
    return np.linspace(-1.0, 1.0, n, dtype="f4")
