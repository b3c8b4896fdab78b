"""What planning has to know of each quantity; `transforms/` computes them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jacserve.vocabulary import Quantity


@dataclass(frozen=True, slots=True)
class QuantitySpec:
    """What a quantity depends on.

    Attributes:
        is_derivative: Whether it depends on mode and wrt.
        has_layout: Whether it differs between layouts.
    """

    is_derivative: bool
    has_layout: bool = False


# In the order of the contract, which is the order of a program's outputs.
QUANTITIES: Mapping[Quantity, QuantitySpec] = MappingProxyType(
    {
        "value": QuantitySpec(is_derivative=False),
        "jacobian": QuantitySpec(is_derivative=True, has_layout=True),
        "gradient": QuantitySpec(is_derivative=True, has_layout=True),
        "determinant": QuantitySpec(is_derivative=True),
        "abs_determinant": QuantitySpec(is_derivative=True),
        "slogdet": QuantitySpec(is_derivative=True),
    }
)


def in_order(quantities: Iterable[Quantity]) -> tuple[Quantity, ...]:
    """Returns quantities in the order of the contract, each once."""
    asked = set(quantities)
    return tuple(quantity for quantity in QUANTITIES if quantity in asked)
