"""Dimensions of arrays: sizes, names, and expressions such as "2*n + 1"."""

import ast
from collections.abc import Callable, Mapping
from types import MappingProxyType

Dimension = int | str


class DimensionError(ValueError):
    """A dimension can't be parsed or evaluated."""


_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = MappingProxyType(
    {
        ast.Add: int.__add__,
        ast.Sub: int.__sub__,
        ast.Mult: int.__mul__,
        ast.FloorDiv: int.__floordiv__,
    }
)


def size_of(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    """Evaluates a dimension.

    Args:
        dimension: A size, a name, or an expression with +, -, * and //.
        sizes: The sizes of the names.

    Returns:
        The size.

    Raises:
        DimensionError: The expression has anything else in it, or a name without
            a size.
    """
    if isinstance(dimension, int):
        return dimension
    if dimension in sizes:  # Also where the name is a keyword, such as "in".
        return sizes[dimension]
    try:
        size = _evaluate(ast.parse(dimension, mode="eval").body, sizes)
    except (SyntaxError, ZeroDivisionError) as error:
        raise DimensionError(f"dimension {dimension!r}: {error}") from error
    if size < 0:
        raise DimensionError(f"dimension {dimension!r} is {size}, which is negative")
    return size


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(size)):
            return size
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.Name(id=name):
            raise DimensionError(f"no argument has the dimension {name!r} by itself")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            apply = _OPERATORS[type(op)]
            return apply(_evaluate(left, sizes), _evaluate(right, sizes))
        case _:
            raise DimensionError(
                f"dimension {ast.unparse(node)!r} is not a sum, difference, product or "
                "whole quotient (//) of sizes and names"
            )
