"""What can be computed of a function at a point: one file a family of quantities.

A quantity is a pure function from a `Point`, which differentiates the registered
function once however many ask, to a tree of arrays. Everything here is traced by
JAX: one program computes all that a query asks for.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jacserve.vocabulary import Layout, Quantity
from jacserve_server.transforms.curvature import hessian, hvp
from jacserve_server.transforms.determinants import (
    abs_determinant,
    determinant,
    slogdet,
)
from jacserve_server.transforms.gradient import gradient
from jacserve_server.transforms.jacobian import jacobian
from jacserve_server.transforms.newton import newton_step
from jacserve_server.transforms.point import Point
from jacserve_server.transforms.products import jvp, vjp
from jacserve_server.transforms.singular_values import (
    condition_number,
    singular_values,
)
from jacserve_server.transforms.value import value

COMPUTE: Mapping[Quantity, Callable[[Point, Layout], Any]] = MappingProxyType(
    {
        "value": value,
        "jacobian": jacobian,
        "gradient": gradient,
        "determinant": determinant,
        "abs_determinant": abs_determinant,
        "slogdet": slogdet,
        "jvp": jvp,
        "vjp": vjp,
        "hessian": hessian,
        "hvp": hvp,
        "newton_step": newton_step,
        "singular_values": singular_values,
        "condition_number": condition_number,
    }
)
