"""What planning has to know of each quantity; `transforms/` computes them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from jacserve.vocabulary import Quantity

# What has to be differentiated, each in a mode of its own.
Need = Literal["jacobian", "jvp", "vjp", "hessian", "hvp"]


@dataclass(frozen=True, slots=True)
class QuantitySpec:
    """What a quantity depends on.

    Attributes:
        needs: The derivative that it is computed of; None for the value.
        takes: The vectors that it is a product with.
        has_blocks: Whether the blocks layout has another form of it.
        has_values: Whether it can be given as the values of a sparse matrix.
    """

    needs: Need | None
    takes: Literal["tangents", "cotangents"] | None = None
    has_blocks: bool = False
    has_values: bool = False


# In the order of the contract.
QUANTITIES: Mapping[Quantity, QuantitySpec] = MappingProxyType(
    {
        "value": QuantitySpec(None),
        "jacobian": QuantitySpec("jacobian", has_blocks=True, has_values=True),
        "gradient": QuantitySpec("jacobian", has_blocks=True),
        "determinant": QuantitySpec("jacobian"),
        "abs_determinant": QuantitySpec("jacobian"),
        "slogdet": QuantitySpec("jacobian"),
        "jvp": QuantitySpec("jvp", takes="tangents", has_blocks=True),
        "vjp": QuantitySpec("vjp", takes="cotangents", has_blocks=True),
        "hessian": QuantitySpec("hessian", has_blocks=True, has_values=True),
        "hvp": QuantitySpec("hvp", takes="tangents", has_blocks=True),
        "newton_step": QuantitySpec("jacobian", has_blocks=True),
        "singular_values": QuantitySpec("jacobian"),
        "condition_number": QuantitySpec("jacobian"),
    }
)


def in_order(quantities: Iterable[Quantity]) -> tuple[Quantity, ...]:
    """Returns quantities in the order of the contract, each once."""
    asked = set(quantities)
    return tuple(quantity for quantity in QUANTITIES if quantity in asked)


def needs_of(quantities: Iterable[Quantity]) -> tuple[Need, ...]:
    """Returns what has to be differentiated for quantities, each once."""
    found: dict[Need, None] = {}
    for quantity in quantities:
        if need := QUANTITIES[quantity].needs:
            found[need] = None
    return tuple(found)
