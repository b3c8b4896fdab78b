"""Reads a function's signature from its jaxtyping annotations."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from jaxtyping import AbstractArray

from jacserve.dimensions import Dimension, DimensionError
from jacserve_server.registry import underlying
from jacserve_server.signature import (
    DTYPES,
    Argument,
    Signature,
)

_EXAMPLE = 'Annotate it with a jaxtyping array, such as {}: Float[Array, "n"].'


class AnnotationError(Exception):
    """A function's annotations do not say what it takes; the text has the remedy."""


def read_signature(function: Callable[..., Any]) -> Signature:
    """Reads what a function takes.

    Args:
        function: A Python function.

    Returns:
        Its array arguments, in declared order.

    Raises:
        AnnotationError: A parameter is not annotated with a jaxtyping array whose
            rank is fixed.
    """
    try:
        hints = typing.get_type_hints(underlying(function))
    except Exception as error:
        raise AnnotationError(
            f"its annotations can't be evaluated ({type(error).__name__}: {error}). "
            "Import every name that they use."
        ) from error
    bound = function.keywords if isinstance(function, functools.partial) else {}
    parameters = [
        parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in bound
    ]
    if not parameters:
        raise AnnotationError(
            "it takes no arguments. Give it an array to differentiate by."
        )
    return Signature(
        tuple(_read_argument(parameter, hints) for parameter in parameters)
    )


def documentation_of(function: Callable[..., Any]) -> str:
    """Returns a function's docstring, or nothing."""
    return inspect.getdoc(underlying(function)) or ""


def _read_argument(parameter: inspect.Parameter, hints: dict[str, Any]) -> Argument:
    name = parameter.name
    if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
        raise AnnotationError(
            f"parameter {name} stands for any number of arguments. "
            "Name each array on its own."
        )
    if name not in hints:
        raise AnnotationError(
            f"parameter {name} has no annotation. {_EXAMPLE.format(name)}"
        )
    hint = hints[name]
    if not (isinstance(hint, type) and issubclass(hint, AbstractArray)):
        raise AnnotationError(
            f"parameter {name} is annotated {_text(hint)}, which is not an array of "
            f"known rank. {_EXAMPLE.format(name)}"
        )
    accepted = hint.dtypes
    dtypes = tuple(
        dtype
        for dtype in DTYPES
        if not isinstance(accepted, tuple | list) or dtype in accepted
    )
    if not dtypes:
        raise AnnotationError(
            f"parameter {name} is annotated {_text(hint)}, of which no dtype can be "
            f"sent. Take one of {', '.join(DTYPES)}."
        )
    try:
        shape = tuple(_read_dimension(token) for token in hint.dim_str.split())
    except DimensionError as error:
        raise AnnotationError(f"parameter {name}: {error}") from error
    return Argument(name=name, dtypes=dtypes, shape=shape)


def _text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _read_dimension(token: str) -> Dimension:
    label, _, fixed = token.partition("=")
    if fixed.isdecimal() and label.isidentifier():
        token = fixed
    if token.isdecimal():
        return int(token)
    if not any(character.isalnum() for character in token.replace("...", "")):
        raise DimensionError(
            f"dimension {token!r} stands alone. Write expressions without spaces, "
            'such as "n-1"'
        )
    if "..." in token or token[0] in "*#?_":
        raise DimensionError(
            f"dimension {token!r} has no size that a query binds. Use a number, a "
            "name, or an expression of names."
        )
    return token
