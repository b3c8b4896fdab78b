"""The gradient of a scalar function."""

from typing import Any

from jacserve.vocabulary import Layout
from jacserve_server.transforms.jacobian import by_argument
from jacserve_server.transforms.point import Point, check_scalar


def gradient(point: Point, layout: Layout) -> Any:
    """Returns the only row of J: [n], or an array shaped like each argument.

    Raises:
        ServiceError: The function has more than one result.
    """
    _ = point.matrix if layout != "blocks" else point.blocks
    check_scalar(point.resource, point.results, "gradient", "Ask for jacobian.")
    if layout != "blocks":
        return point.matrix[0]
    # Empty results may stand beside the only number.
    [blocks] = [blocks for leaf, blocks in point.blocks if leaf.array.size]
    pairs = zip(blocks, point.arguments, strict=True)
    return by_argument(point, [block.reshape(x.shape) for block, x in pairs])
