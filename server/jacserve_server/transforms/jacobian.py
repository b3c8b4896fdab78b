"""The Jacobian J[i, j] = d f_i / d x_j."""

from typing import Any

from jacserve import trees
from jacserve.vocabulary import Layout
from jacserve_server.transforms.point import Point


def jacobian(point: Point, layout: Layout) -> Any:
    """Returns J [m, n], its blocks, or its values [nnz].

    A block has the shape of a result followed by that of an argument. The blocks
    are structured as the result; where several arguments were asked for, each is a
    dictionary by argument name.
    """
    if point.is_values("jacobian", layout):
        return point.data("jacobian")
    if layout != "blocks":
        return point.matrix
    return trees.unflatten(
        (leaf.path, by_argument(point, blocks)) for leaf, blocks in point.blocks
    )


def by_argument(point: Point, arrays: list[Any]) -> Any:
    """Returns the only array, or all of them in a dictionary by argument name."""
    if len(point.wrt) == 1:
        return arrays[0]
    return {name: array for (_, name), array in zip(point.wrt, arrays, strict=True)}
