"""What can be computed of a function at a point: one file a family of quantities.

A quantity is a pure function from a `Point`, which differentiates the registered
function once however many ask, to a tree of arrays. Everything here is traced by
JAX: one program computes all that a query asks for.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jacserve.vocabulary import Layout, Quantity
from jacserve_server.transforms.determinants import (
    abs_determinant,
    determinant,
    slogdet,
)
from jacserve_server.transforms.gradient import gradient
from jacserve_server.transforms.jacobian import jacobian
from jacserve_server.transforms.point import Point
from jacserve_server.transforms.value import value

QUANTITIES: Mapping[Quantity, Callable[[Point, Layout], Any]] = MappingProxyType(
    {
        "jacobian": jacobian,
        "gradient": gradient,
        "determinant": determinant,
        "abs_determinant": abs_determinant,
        "slogdet": slogdet,
        # Last: it falls out of the differentiation where there is one.
        "value": value,
    }
)


def evaluate(
    point: Point, quantities: Sequence[Quantity], layout: Layout
) -> dict[Quantity, Any]:
    """Evaluates quantities of a function at one point.

    Args:
        point: The function and where.
        quantities: What to compute.
        layout: How derivatives are laid out.

    Returns:
        A tree of arrays for each quantity, in the order asked for.

    Raises:
        ServiceError: A quantity does not exist for the function's shapes.
    """
    found = {
        quantity: compute(point, layout)
        for quantity, compute in QUANTITIES.items()
        if quantity in quantities
    }
    return {quantity: found[quantity] for quantity in quantities}
