"""The value f(x)."""

from typing import Any

from jacserve import trees
from jacserve.vocabulary import Layout
from jacserve_server.transforms.point import Point


def value(point: Point, layout: Layout) -> Any:
    """Returns f(x), structured as the function returns it, in either layout."""
    del layout
    return trees.unflatten(point.value)
