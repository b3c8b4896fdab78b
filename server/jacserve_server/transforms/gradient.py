"""The gradient of a scalar function."""

from typing import Any

from jacserve.tensors import format_shape
from jacserve.vocabulary import Layout
from jacserve_server.errors import ServiceError
from jacserve_server.transforms.jacobian import by_argument
from jacserve_server.transforms.point import Point


def gradient(point: Point, layout: Layout) -> Any:
    """Returns the only row of J: [n], or an array shaped like each argument.

    Raises:
        ServiceError: The function has more than one result.
    """
    sizes = [leaf.array.size for leaf, _ in point.blocks]
    if sum(sizes) != 1:
        shapes = ", ".join(format_shape(leaf.array.shape) for leaf, _ in point.blocks)
        raise ServiceError(
            "QUANTITY_UNSUPPORTED",
            f"{point.resource} has {sum(sizes)} results (shape {shapes}), but a "
            "gradient belongs to a function with 1. Ask for jacobian.",
            field="quantities",
            function=point.resource,
            quantity="gradient",
            rows=sum(sizes),
        )
    if layout == "matrix":
        return point.matrix[0]
    # Empty results may stand beside the only number.
    [blocks] = [blocks for leaf, blocks in point.blocks if leaf.array.size]
    pairs = zip(blocks, point.arguments, strict=True)
    return by_argument(point, [block.reshape(x.shape) for block, x in pairs])
