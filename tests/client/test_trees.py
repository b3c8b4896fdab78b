from typing import NamedTuple

import pytest
from hypothesis import given, strategies as st

from jacserve import trees

TREES = st.recursive(
    st.integers(),
    lambda children: st.one_of(
        st.lists(children, min_size=1, max_size=3).map(tuple),
        st.dictionaries(
            st.text(max_size=3).filter(str.isprintable),
            children,
            min_size=1,
            max_size=3,
        ),
    ),
    max_leaves=12,
)


@given(TREES)
def test_a_tree_is_rebuilt_from_its_leaves_over_the_wire(tree) -> None:
    leaves = [
        (trees.decode_path(trees.encode_path(path)), leaf)  # pyright: ignore
        for path, leaf in trees.flatten(tree)
    ]
    assert trees.unflatten(leaves) == tree


class Pair(NamedTuple):
    first: int
    second: int


def test_lists_named_tuples_and_none() -> None:
    tree = {"b": [1, None, 3], "a": Pair(4, 5), "nothing": None}
    assert list(trees.flatten(tree)) == [
        (("b", 0), 1),
        (("b", 2), 3),
        (("a", "first"), 4),
        (("a", "second"), 5),
    ]
    assert trees.unflatten(trees.flatten(tree)) == {
        "b": (1, None, 3),
        "a": {"first": 4, "second": 5},
    }


def test_paths_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="leaf where it also has children"):
        trees.unflatten([((), 1), (("a",), 2)])


def test_keys_must_be_strings() -> None:
    with pytest.raises(TypeError, match="dictionary key 1"):
        list(trees.flatten({1: 2}))


def test_format_path() -> None:
    assert trees.format_path(("pose", 0)) == "['pose'][0]"
