"""Nested results as flat lists of arrays, and back.

A tree is an array, or a tuple, list or dictionary (with string keys) of trees. A
path says where an array stands in it: dictionary keys and tuple indices from the
root. Both keep the order in which the tree was written.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from jacserve.v1 import jacobian_pb2 as pb

Path = tuple[str | int, ...]

_MOST_CHILDREN = 2**16
_MOST_STEPS = 100


def flatten(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every leaf of a tree with its path, in order.

    A named tuple counts as a dictionary of its fields and None as nothing; whatever
    else is not a tuple, list or mapping is a leaf.

    Args:
        tree: The tree.
        path: The path of the tree itself.

    Yields:
        Paths and leaves.

    Raises:
        TypeError: A dictionary has a key that is not a string.
    """
    for step, child in _children(tree):
        yield from flatten(child, (*path, step))
    if tree is not None and not isinstance(tree, tuple | list | Mapping):
        yield path, tree


def _children(tree: Any) -> Iterator[tuple[str | int, Any]]:
    if hasattr(tree, "_fields"):
        tree = tree._asdict()
    if isinstance(tree, Mapping):
        for key, child in cast("Mapping[Any, Any]", tree).items():
            if not isinstance(key, str) or not key.isprintable():
                raise TypeError(f"dictionary key {key!r} is not a printable string")
            yield key, child
    elif isinstance(tree, tuple | list):
        yield from enumerate(cast("Iterable[Any]", tree))


def unflatten(leaves: Iterable[tuple[Path, Any]]) -> Any:
    """Rebuilds a tree of dictionaries and tuples from its leaves.

    Args:
        leaves: Paths and leaves, as `flatten` yields them.

    Returns:
        The tree. Lists come back as tuples, named tuples as dictionaries; a tuple
        has None where an index before its last is left out.

    Raises:
        ValueError: The paths do not describe one tree.
    """
    children: dict[str | int, list[tuple[Path, Any]]] = {}
    leaves = list(leaves)
    if len(leaves) == 1 and leaves[0][0] == ():
        return leaves[0][1]
    for path, leaf in leaves:
        if not path:
            raise ValueError("a tree has a leaf where it also has children")
        if len(path) > _MOST_STEPS:
            raise ValueError("a tree is too deep")
        children.setdefault(path[0], []).append((path[1:], leaf))
    built = {step: unflatten(below) for step, below in children.items()}
    if all(isinstance(step, str) for step in built):
        if not "".join(cast("Iterable[str]", built)).isprintable():
            raise ValueError("a tree has a key that is not printable")
        return built
    indices = [step for step in built if isinstance(step, int)]
    if len(indices) < len(built) or max(indices) >= _MOST_CHILDREN:
        raise ValueError("a tree has both keys and indices, or too many children")
    return tuple(built.get(index) for index in range(max(indices) + 1))


def encode_path(path: Path) -> list[pb.PathStep]:
    """Encodes a path for the wire."""
    return [
        pb.PathStep(key=step) if isinstance(step, str) else pb.PathStep(index=step)
        for step in path
    ]


def decode_path(steps: RepeatedCompositeFieldContainer[pb.PathStep]) -> Path:
    """Decodes a path of the wire."""
    return tuple(
        step.key if step.WhichOneof("step") == "key" else step.index for step in steps
    )


def format_path(path: Path) -> str:
    """Returns a path as Python writes it, such as "['pose'][0]"."""
    return "".join(f"[{step!r}]" for step in path)
