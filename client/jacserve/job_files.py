"""Results of any number of points into one file, range by range, in flat memory.

A file is made in a folder beside its place and moved there at the end, so that what
stands there is whole.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy_format

from jacserve.array_files import ArrayTextError, flat
from jacserve.errors import JacobianError
from jacserve.job_tables import TableFile, check_installed
from jacserve.results import Result
from jacserve.tensors import Array

_SUFFIXES = (".npy", ".npz", ".parquet")
_RANGE_BYTES = 8 * 2**20
_MOST_CHUNK_BYTES = 64 * 2**20
_COPY_BYTES = 2**20
# Of a sparse matrix: what all points share.
_SHARED = (".rows", ".columns", ".shape")


def check_path(path: Path) -> None:
    """Checks a file's name, before anything is computed or read for it.

    Args:
        path: The file.

    Raises:
        ArrayTextError: It is of no kind that can be written, or has no folder.
        ImportError: It is a Parquet file, and pyarrow is not installed.
    """
    if path.suffix not in _SUFFIXES:
        raise ArrayTextError(f"{path} is none of {', '.join(_SUFFIXES)}. Name it so.")
    if not path.absolute().parent.is_dir():
        raise ArrayTextError(
            f"{path} can't be written: there is no folder {path.parent}. Make it first."
        )
    if path.suffix == ".parquet":
        check_installed()


def rows_at_once(sample: Result, chunk_size: int | None) -> int:
    """Chooses how many points to read at once: some MiB, in whole chunks of the store.

    Args:
        sample: The result of one point, as a batch.
        chunk_size: The points in a chunk of the store, where that is known.

    Returns:
        The number of points.
    """
    rows, _ = _arrays(sample)
    point_bytes = max(1, sum(array.nbytes for array in rows.values()))
    by_size = max(1, _RANGE_BYTES // point_bytes)
    if not chunk_size or chunk_size * point_bytes > _MOST_CHUNK_BYTES:
        return by_size
    return chunk_size * max(1, by_size // chunk_size)


class ResultFile:
    """A file of the results of many points, to be written in a with block.

    Once it is finished it is there, whole; before, and if the block raises, it is not.
    """

    def __init__(self, path: Path, point_count: int, sample: Result) -> None:
        """Checks that the file can hold the results.

        Args:
            path: An .npy file for one array, an .npz file for any number of them, or a
                .parquet file for few numbers a point.
            point_count: How many points are to come.
            sample: The result of one of them, as a batch.

        Raises:
            ArrayTextError: The file can't hold them.
            ImportError: It is a Parquet file, and pyarrow is not installed.
        """
        check_path(path)
        self._path = path
        self._point_count = point_count
        rows, self._shared = _arrays(sample)
        if path.suffix == ".npy":
            rows.pop("finite_points", None)
        labels = [*rows, *self._shared]
        if path.suffix == ".npy" and len(labels) > 1:
            raise ArrayTextError(
                f"{path} holds one array, but the result has {len(labels)}: "
                f"{', '.join(labels)}. Write to an .npz file."
            )
        if path.suffix == ".parquet" and self._shared:
            raise ArrayTextError(
                f"{path} can't hold sparse matrices. Write to an .npz file."
            )
        # Numpy's formats forget what it is, and it would come back as bytes.
        if any(array.dtype.name == "bfloat16" for array in rows.values()):
            raise ArrayTextError(
                f"{path} can't hold bfloat16. Read the points in ranges instead."
            )
        self._kinds = {label: _kind(array) for label, array in rows.items()}
        self._written_count = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Makes the folder and what is to be in it."""
        with ExitStack() as stack, _said(self._path):
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix=f".{self._path.name}.", dir=self._path.absolute().parent
                )
            )
            self._whole = Path(folder) / "whole"
            if self._path.suffix == ".parquet":
                self._rows = TableFile(self._whole, self._kinds)
            else:
                self._rows = _ArrayFiles(Path(folder), self._kinds, self._point_count)
            stack.callback(self._rows.close)
            self._stack = stack.pop_all()
        return self

    def write(self, result: Result) -> None:
        """Writes the next points.

        Args:
            result: Their result.

        Raises:
            ArrayTextError: It can't be written, or is not like those before it.
        """
        rows, shared = _arrays(result)
        rows = {label: rows[label] for label in self._kinds if label in rows}
        is_alike = {label: _kind(array) for label, array in rows.items()} == self._kinds
        if not is_alike or not _same(shared, self._shared):
            raise ArrayTextError(
                f"{self._path} can't be written: the results of some points are shaped "
                "unlike others."
            )
        with _said(self._path):
            self._rows.write(rows)
        self._written_count += len(next(iter(rows.values())))

    def finish(self) -> None:
        """Moves the file to its place, whole.

        Raises:
            ArrayTextError: Points are missing, or it can't be written.
        """
        if self._written_count != self._point_count:
            raise ArrayTextError(
                f"{self._path} can't be written: {self._written_count:,} points came "
                f"of {self._point_count:,}."
            )
        with _said(self._path):
            self._rows.close()
            if isinstance(self._rows, _ArrayFiles):
                self._rows.join(self._whole, self._path.suffix, self._shared)
            self._whole.replace(self._path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes what is not finished."""
        self._stack.close()


# The dtype of an array, and the shape at one point.
_Kind = tuple[np.dtype[Any], tuple[int, ...]]


def _kind(array: Array) -> _Kind:
    return array.dtype, array.shape[1:]


def _arrays(result: Result) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the arrays that have a row for each point, and those that have none."""
    rows: dict[str, Array] = {}
    shared: dict[str, Array] = {}
    for label, array in flat(result):
        (shared if label.endswith(_SHARED) else rows)[label] = array
    if result.finite_points is not None:
        rows["finite_points"] = result.finite_points
    return rows, shared


def _same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(
        label.endswith(".shape") or np.array_equal(array, other[label])
        for label, array in one.items()
    )


class _ArrayFiles:
    """An .npy file for each array, which may become one .npz file."""

    def __init__(
        self, folder: Path, kinds: Mapping[str, _Kind], point_count: int
    ) -> None:
        self._folder = folder
        self._point_count = point_count
        self._paths = {
            label: folder / f"{place}.npy" for place, label in enumerate(kinds)
        }
        with ExitStack() as stack:
            self._files = {
                label: stack.enter_context(path.open("wb"))
                for label, path in self._paths.items()
            }
            for label, (dtype, shape) in kinds.items():
                header = {
                    "descr": npy_format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (point_count, *shape),
                }
                npy_format.write_array_header_1_0(self._files[label], header)
            self._stack = stack.pop_all()

    def write(self, rows: Mapping[str, Array]) -> None:
        for label, array in rows.items():
            self._files[label].write(np.ascontiguousarray(array).data)

    def close(self) -> None:
        self._stack.close()

    def join(self, whole: Path, suffix: str, shared: Mapping[str, Array]) -> None:
        if suffix == ".npy":
            [path] = self._paths.values()
            path.replace(whole)
            return
        for place, (label, array) in enumerate(shared.items()):
            path = self._paths[label] = self._folder / f"shared-{place}.npy"
            is_shape = label.endswith(".shape")
            np.save(path, [self._point_count, *array[1:]] if is_shape else array)
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
            for label, path in self._paths.items():
                with (
                    path.open("rb") as source,
                    archive.open(f"{label}.npy", "w", force_zip64=True) as member,
                ):
                    shutil.copyfileobj(source, member, _COPY_BYTES)
                path.unlink()  # So that the disk need not hold everything twice.


@contextmanager
def _said(path: Path) -> Generator[None]:
    """Says of a failure which file can't be written."""
    try:
        yield
    except JacobianError:
        raise
    except OSError as error:
        raise ArrayTextError(
            f"{path} can't be written: {error.strerror or error}"
        ) from error
