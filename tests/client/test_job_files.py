"""Files of results that are written range by range."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest

from jacserve import sparse, tensors, trees
from jacserve.array_files import ArrayTextError
from jacserve.job_files import ResultFile, check_path, rows_at_once
from jacserve.results import Result, decode_opened
from jacserve.sparse import Pattern, SparseMatrix
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import QUANTITIES

COUNT = 23
random = np.random.default_rng(0)
TREE = {
    "value": {
        "z": (random.normal(size=(COUNT, 2, 3)).astype("f"),),
        "k": np.arange(COUNT),
    },
    "jacobian": random.normal(size=(COUNT, 3)).astype(np.float16),
}
FINITE = np.arange(COUNT) % 5 != 2
LABELS = ["value['z'][0]", "value['k']", "jacobian"]
PATTERN = Pattern.of((2, 4), np.array([0, 1, 1]), np.array([3, 0, 2]))


def rows(tree: Any, start: int, stop: int, finite: Any = FINITE) -> Result:
    """What a server says of a range of points."""
    head, payloads, last = pb.Result(function="functions/f@1"), [], []
    for quantity, part in tree.items():
        for path, array in trees.flatten(part):
            output = head.outputs.add(quantity=QUANTITIES[quantity])
            output.path.extend(trees.encode_path(path))
            if isinstance(array, SparseMatrix):
                output.pattern = array.pattern.hash
                message, last = sparse.describe_pattern(array.pattern, "coo")
                head.patterns.append(message)
                array = array.data
            payloads.append(tensors.describe_into(output.tensor, array[start:stop]))
    payloads += last
    if finite is not None:
        payloads.append(tensors.describe_into(head.finite_points, finite[start:stop]))
    filled = [payload for payload in payloads if payload.size]
    return decode_opened(head, filled, "coo" if last else None)


def write(
    path: Path, tree: Any, edges=(0, 1, 8, 16, COUNT), finite: Any = FINITE
) -> None:
    with ResultFile(path, COUNT, rows(tree, 0, 1, finite)) as file:
        for start, stop in pairwise(edges):
            file.write(rows(tree, start, stop, finite))
            assert not path.is_file()
        file.finish()


def leaves(tree: Any) -> list[Any]:
    return [leaf for _, leaf in trees.flatten(tree)]


def test_npz(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", TREE)
    with np.load(tmp_path / "a.npz") as saved:
        assert list(saved) == [*LABELS, "finite_points"]
        for label, truth in zip(LABELS, leaves(TREE), strict=True):
            assert saved[label].dtype == truth.dtype
            np.testing.assert_array_equal(saved[label], truth)
        np.testing.assert_array_equal(saved["finite_points"], FINITE)


@pytest.mark.parametrize("dtype", ["bool", "int8", "float64", "complex64"])
def test_npy(tmp_path: Path, dtype: str) -> None:
    array = random.integers(0, 2, size=(COUNT, 2, 2)).astype(dtype)
    write(tmp_path / "a.npy", {"jacobian": array})
    saved = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert saved.dtype == array.dtype
    np.testing.assert_array_equal(saved, array)


def test_parquet(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", TREE)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == [*LABELS, "finite_points"]
    for label, truth in zip(LABELS, leaves(TREE), strict=True):
        np.testing.assert_array_equal(np.array(table[label].to_pylist()), truth)
    np.testing.assert_array_equal(table["finite_points"], FINITE)
    assert str(table.schema.field(LABELS[0]).type).startswith("fixed_size_list")


def test_sparse_matrices_share_their_indices(tmp_path: Path) -> None:
    matrix = SparseMatrix(random.normal(size=(COUNT, 3)), PATTERN)
    write(tmp_path / "a.npz", {"jacobian": matrix})
    with np.load(tmp_path / "a.npz") as saved:
        np.testing.assert_array_equal(saved["jacobian.data"], matrix.data)
        np.testing.assert_array_equal(saved["jacobian.rows"], PATTERN.rows)
        np.testing.assert_array_equal(saved["jacobian.columns"], PATTERN.columns)
        assert saved["jacobian.shape"].tolist() == [COUNT, 2, 4]
    other = SparseMatrix(matrix.data, Pattern.of((2, 4), PATTERN.rows, PATTERN.rows))
    with pytest.raises(ArrayTextError, match="shaped unlike others"):
        with ResultFile(
            tmp_path / "b.npz", COUNT, rows({"jacobian": matrix}, 0, 1)
        ) as f:
            f.write(rows({"jacobian": other}, 0, 5))


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.parquet"])
def test_what_was_there_stays_until_the_file_is_whole(
    tmp_path: Path, name: str
) -> None:
    path, tree = tmp_path / name, {"jacobian": TREE["jacobian"]}
    path.write_text("before")
    with ResultFile(path, COUNT, rows(tree, 0, 1)) as file:
        file.write(rows(tree, 0, 5))
        with pytest.raises(ArrayTextError, match="5 points came of 23"):
            file.finish()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(ArrayTextError, match=r"a\.npz can't be written: .*directory"):
        write(tmp_path / "a.npz", TREE)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


HALVES = np.ones((COUNT, 2), ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("name", "tree", "words"),
    [
        ("a.npy", TREE, "holds one array, but the result has 3: value"),
        ("a.npz", {"jacobian": HALVES}, "can't hold bfloat16"),
        ("a.parquet", {"jacobian": np.ones((COUNT, 1), complex)}, "no complex numbers"),
        ("a.parquet", {"jacobian": np.ones((COUNT, 33, 32))}, "has 1,057 numbers"),
        ("a.parquet", {"jacobian": np.ones((COUNT, 0))}, "arrays without numbers"),
        (
            "a.parquet",
            {"jacobian": SparseMatrix(np.ones((COUNT, 3)), PATTERN)},
            "can't hold sparse matrices",
        ),
    ],
)
def test_what_a_file_can_not_hold(tmp_path: Path, name: str, tree, words: str) -> None:
    with pytest.raises(ArrayTextError, match=words):
        write(tmp_path / name, tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.txt", "is none of .npy, .npz, .parquet"), ("no/a.npz", "no folder .*no")],
)
def test_names_of_files(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ArrayTextError, match=words):
        check_path(tmp_path / name)


def test_ranges_are_some_mebibytes_in_whole_chunks() -> None:
    point = rows({"jacobian": np.ones((1, 2**17))}, 0, 1, None)  # 1 MiB.
    assert rows_at_once(point, None) == 8
    assert rows_at_once(point, 3) == 6
    assert rows_at_once(point, 64) == 64
    assert rows_at_once(point, 65) == 8
    small = rows({"jacobian": np.ones((1, 0))}, 0, 1, None)
    assert rows_at_once(small, 1000) >= 1000
